"""Attention of the next position to what it finds in a cache, and to the keys near by.

Shape letters: B batch, H heads, N = B·H, M heads of keys and values in all rows, L room, K depth of
queries and keys, D depth of values, J keys that one query finds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.layers.attention import tiles
from layercomb.layers.attention.lsh import rings
from layercomb.layers.attention.selected.cache import PlacedCache, of_places, once
from layercomb.layers.quantized.native import has_kernels, with_kernel
from layercomb_kernels import Reading


def next_attention(
    reading: Reading, q: jax.Array, found: jax.Array, cache: PlacedCache, real: jax.Array
) -> jax.Array:
    """Attention of one position of each row; zero where it sees nothing, or is padding.

    Args:
      reading: what it sees beside what it finds, and how its scores are made.
      q: (N, K).
      found: (N, J) int32, positions; negative where there is none.
      cache: with its key and value.
      real: (B,) bool, whether it is a real position.

    Returns:
      (N, D).
    """
    attend: Callable[..., Any] = functools.partial(_plain, reading)
    if has_kernels(1, q, cache.k, cache.v):
        by_kernel = functools.partial(layercomb_kernels.placed_attention, reading)
        attend = with_kernel(attend, by_kernel)
    return attend(q, found, cache.k, cache.v, cache.at, cache.n_real, real)


def _plain(
    reading: Reading,
    q: jax.Array,
    found: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    at: jax.Array,
    n_real: jax.Array,
    real: jax.Array,
) -> jax.Array:
    """The same by XLA. Positions behind the room are its last one; no more are real than fit."""
    room, h = keys.shape[1], len(q) // len(real)
    n_real = jnp.minimum(n_real, room)
    last = jnp.arange(min(reading.local_len, room), dtype=jnp.int32)[None]
    first = jnp.arange(min(reading.n_sinks, room), dtype=jnp.int32)[None]
    places = n_real[:, None] - 1 - last, jnp.broadcast_to(first, (len(real), first.size))
    others = [jnp.repeat(of_places(at, n_real, x), h, 0) for x in places]
    where = jnp.minimum(jnp.concatenate([found, *others], 1), room - 1)  # (N, J')
    there = jnp.maximum(where, 0)
    s = rings.products(q, there, keys) * reading.scale
    seen = once(where) if reading.once else where >= 0
    seen = seen & jnp.repeat(real, h)[:, None]
    p = tiles.softmax_of(seen, tiles.capped(s, reading.softcap))
    # NaN that is not seen would show even in a product with 0.
    its = jnp.where(seen[..., None], rings.taken(values, there), 0)
    return tiles.dot('nj,njd->nd', p, its)
