"""Where several devices split the positions of a sequence: what a layer needs of the others' parts.

A mesh with an axis `SEQUENCE` gives each device L/n neighbouring positions of each row. Layers that
work on each position by itself need to know nothing of it. One that mixes positions, or depends on
their numbers, declares ``spans_devices`` and takes what it needs by these functions, which change
nothing where there is one device. They are called inside `jax.shard_map` of a `parallel.Layout`.

Shape letters: B batch, L the whole length, n devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

SEQUENCE = 'sequence'  # of a mesh: devices along it have positions of their own, of the same rows


def sequence_parts() -> int:
    """n, how many devices split a sequence; 1 where each has whole ones."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[SEQUENCE] if SEQUENCE in mesh.manual_axes else 1


def first_position(length: int) -> jax.Array | int:
    """The number of this device's first position in the whole sequence.

    Args:
      length: of this device's part, L/n.

    Returns:
      int32 (); 0 on one device.
    """
    if sequence_parts() == 1:
        return 0
    return jax.lax.axis_index(SEQUENCE) * jnp.int32(length)


def all_positions(x: jax.Array, axis: int = 1) -> jax.Array:
    """All devices' positions.

    Args:
      x: this device's part, (…, L/n, …).
      axis: of the positions.

    Returns:
      (…, L, …).
    """
    if sequence_parts() == 1:
        return x
    return jax.lax.all_gather(x, SEQUENCE, axis=axis, tiled=True)


def any_position(x: jax.Array, axes: tuple[int, ...] = (1,)) -> jax.Array:
    """Whether a value is True at any position, of all devices.

    Args:
      x: (…, L/n, …) bool.
      axes: which are summed up, that of positions among them.

    Returns:
      Without these axes.
    """
    found = x.any(axes)
    if sequence_parts() == 1 or not axes:
        return found
    return jax.lax.pmax(found.astype(jnp.int32), SEQUENCE) > 0


def over_positions(x: jax.Array) -> jax.Array:
    """The sum over the devices that split a sequence; `x` itself on one device.

    Args:
      x: this device's summand of something that belongs to whole rows, such as (B, D).
    """
    return x if sequence_parts() == 1 else jax.lax.psum(x, SEQUENCE)


def of_whole(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """This device's part of a function of whole sequences.

    Args:
      f: (B, L) → (B, L).
      x: (B, L/n), small enough that each device holds all of it.

    Returns:
      (B, L/n).
    """
    length = x.shape[1]
    y = f(all_positions(x))
    return jax.lax.dynamic_slice_in_dim(y, first_position(length), length, 1)


def surrounded(x: jax.Array, before: int, after: int = 0, axis: int = 1) -> jax.Array:
    """This device's positions between those of its neighbours.

    Args:
      x: (…, L/n, …).
      before: how many positions before them.
      after: how many after them.
      axis: of the positions.

    Returns:
      (…, before + L/n + after, …). Beyond both ends of the sequence are zeros.
    """
    if sequence_parts() == 1:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (before, after)
        return jnp.pad(x, pads)
    return jnp.concatenate(
        [*reversed(_next_to(x, before, axis, -1)), x, *_next_to(x, after, axis, 1)], axis
    )


def _next_to(x: jax.Array, count: int, axis: int, way: int) -> list[jax.Array]:
    """Pieces of so many positions in all, of the devices on one side, the nearest first."""
    n, length, pieces, away = sequence_parts(), x.shape[axis], [], 0
    while count > 0:
        size, away = min(count, length), away + 1
        start = 0 if way > 0 else length - size
        piece = jax.lax.slice_in_dim(x, start, start + size, axis=axis)
        pairs = [(i, i - way * away) for i in range(n) if 0 <= i - way * away < n]
        # Without a sender, a device receives zeros.
        pieces.append(jax.lax.ppermute(piece, SEQUENCE, pairs) if pairs else jnp.zeros_like(piece))
        count -= size
    return pieces
