"""The memory of a recurrent layer in decoding: kept at every position, and gone on from."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from layercomb.layers.decoding.caches import Past, poison_overflow, refuse_overflow


def continued(
    run: Callable[[jax.Array], jax.Array], kept: Past, length: int
) -> tuple[jax.Array, Past]:
    """The memories of the next positions, each row from where it stands.

    Args:
      run: from the memory before them, (B, n), to those after each, (B, length, n).
      kept: the state in ``PREDICT``; `past` has the memory after position t at t + 1.
      length: how many positions come next.

    Returns:
      (B, length, n), and the state with them written.

    Raises:
      ValueError: if the state is known to have no room for them.
    """
    position, room = kept.position.rows, kept.past.shape[1] - 1
    refuse_overflow(position, length, room)
    start = jnp.take_along_axis(kept.past, position[:, None, None], 1, mode='clip')[:, 0]
    memories = run(start)
    past = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(
        kept.past, memories, position + 1, 0
    )
    moved = Past(past, kept.position.moved(length))
    return poison_overflow(memories, position, length, room), moved
