"""Where several devices split a batch: what a layer draws or averages over all of its rows."""

from __future__ import annotations

import jax

from layercomb.layers.facts.sequence import SEQUENCE

ROW_AXES = ('data', 'fsdp')  # of a mesh: devices along them have rows of their own
SPLIT_AXES = (*ROW_AXES, SEQUENCE)  # devices along them have rows or positions of their own


def own_key(rng: jax.Array, by_position: bool = True) -> jax.Array:
    """The key of what is drawn for each position, such as the mask of dropout.

    Where several devices split a batch, each has a key of its own; elsewhere it is `rng`. What is
    drawn once for all rows and positions takes `rng` itself.

    Args:
      rng: a typed key.
      by_position: whether what is drawn differs from position to position; False if it is drawn
        once for all positions of a row.
    """
    for name in _split_axes():
        if name == SEQUENCE and not by_position:
            continue
        rng = jax.random.fold_in(rng, jax.lax.axis_index(name))
    return rng


def over_rows(x: jax.Array) -> jax.Array:
    """The sum over all devices that split a batch; `x` itself on one device.

    Args:
      x: this device's summand of something that belongs to the whole batch.
    """
    names = _split_axes()
    return jax.lax.psum(x, names) if names else x


def xla_splits() -> bool:
    """Whether XLA splits arrays over devices by itself; a kernel would be given whole ones."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in mesh.auto_axes)


def _split_axes() -> tuple[str, ...]:
    """The axes of the mesh that split a batch, inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in SPLIT_AXES if name in mesh.manual_axes and mesh.shape[name] > 1)
