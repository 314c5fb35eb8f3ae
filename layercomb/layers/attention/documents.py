"""Which blocks of a packed row hold positions of one document.

Shape letters: B batch, L length; Nq blocks of queries, Nk blocks of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# The first block that meets each block, and the one after the last.
Bounds = tuple[jax.Array, jax.Array]


class Meeting(NamedTuple):
    """Which blocks may hold positions of one document, in any row of the batch.

    Attributes:
      of_queries: the blocks of keys that meet each block of queries, two (Nq,) int32.
      of_keys: the blocks of queries that meet each block of keys, two (Nk,) int32.
    """

    of_queries: Bounds
    of_keys: Bounds


def meeting(segments: jax.Array, q_block: int, k_block: int) -> Meeting | None:
    """Compares the least and the greatest number in each block.

    No pair of one document is left out, also where numbers decrease along a row; then more blocks
    meet than need to.

    Args:
      segments: (B, L) int32, the document of each position.
      q_block, k_block: positions in a block of queries, and of keys.

    Returns:
      None if there is one block of each.
    """
    if min(q_block, k_block) >= segments.shape[1]:
        return None
    queries, keys = _range(segments, q_block), _range(segments, k_block)
    return Meeting(_bounds(queries, keys), _bounds(keys, queries))


def _range(segments: jax.Array, block: int) -> Bounds:
    """The least and the greatest number in each block, (B, N) each."""
    segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode='edge')
    blocks = segments.reshape(len(segments), -1, block)  # (B, N, block)
    return blocks.min(2), blocks.max(2)


def _bounds(ours: Bounds, theirs: Bounds) -> Bounds:
    """Of all rows: the first of their blocks whose range meets ours, and the one after the last."""
    greatest = lax.cummax(theirs[1], axis=1)
    least = lax.cummin(theirs[0], axis=1, reverse=True)
    first = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side='left'))(greatest, ours[0])
    after = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side='right'))(least, ours[1])
    return first.min(0).astype(jnp.int32), after.max(0).astype(jnp.int32)
