"""Rings: the last C positions of each bucket, the only ones that decoding reads.

A ring of C places holds the positions that exactly causal LSH attention sees in a bucket, the
current one included. One token thus reads R·C keys, at any position. Memory: a place takes 4 bytes,
a head 4·R·n·C. Automatic buckets average half a chunk, which makes 8·R bytes per position of
`max_len`; keys and values take 8·K in float32.

Shape letters: N rows · heads, M rows · heads of values, L length, R hash rounds, C chunk, n
buckets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.layers.attention import tiles
from layercomb.layers.attention.lsh.rounds import UNIT_EPSILON, sorted_by_bucket
from layercomb.layers.attention.lsh.windows import unit
from layercomb.layers.quantized.native import has_kernels, with_kernel
from layercomb.layers.quantized.rows import IN_BOUNDS, rows

_DROWNING = 1e30


def empty(n_rows: int, n_hashes: int, n_buckets: int, chunk_len: int) -> jax.Array:
    """Empty rings: negative numbers, all different within a ring.

    Returns:
      (N, R, n, C) int32, for N = n_rows, R = n_hashes, n = n_buckets and C = chunk_len.
    """
    return jnp.broadcast_to(
        jnp.arange(-chunk_len, 0, dtype=jnp.int32), (n_rows, n_hashes, n_buckets, chunk_len)
    )


def push(
    rings: jax.Array, buckets: jax.Array, position: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts each row's next position into its bucket of each round, over the oldest one.

    Args:
      rings: (N, R, n, C) int32.
      buckets: (N, R) integers, of the new position.
      position: (N,) int32.
      real: (N,) bool; padding is not stored.

    Returns:
      The new rings; and the rings of the given buckets, (N, R, C), negative at empty places.
    """
    n_rows, n_hashes = buckets.shape
    of_row, of_round = (jnp.arange(n, dtype=jnp.int32) for n in (n_rows, n_hashes))
    at = of_row[:, None], of_round, buckets.astype(jnp.int32)
    ring = rings.at[at].get(**IN_BOUNDS)  # (N, R, C)
    oldest = ring == ring.min(-1, keepdims=True)
    ring = jnp.where(oldest & real[:, None, None], position[:, None, None], ring)
    return rings.at[at].set(ring, unique_indices=True, **IN_BOUNDS), ring


def cosines(
    q: jax.Array, at: jax.Array, keys: jax.Array, epsilon: float = UNIT_EPSILON
) -> jax.Array:
    """q[n] · k / √(‖k‖² + ε) for chosen keys k of each query, without copying the cache.

    Args:
      q: (N, K).
      at: (N, J) int32, within bounds.
      keys: k (N, L, K).
      epsilon: ε.

    Returns:
      (N, J) float32.
    """
    f = _fast_cosines if has_kernels(1, q, keys) else _cosines
    return f(q, at, keys, jnp.float32(epsilon))


def products(q: jax.Array, at: jax.Array, keys: jax.Array) -> jax.Array:
    """q[n] · k for chosen keys k of each query, without copying the cache.

    Args:
      q, at, keys: as of `cosines`.

    Returns:
      (N, J) float32.
    """
    if not has_kernels(1, q, keys):
        return tiles.dot('nk,njk->nj', q, taken(keys, at))
    # Beside this ε the lengths of keys vanish in float32: cosines are products, over its root.
    return cosines(q, at, keys, _DROWNING) * jnp.float32(_DROWNING**0.5)


def means(p: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """Σ_j p[n, j] v[m, at[n, j]], the weighted sum of chosen values; N/M neighbours share m.

    Args:
      p: (N, J) float32.
      at: (N, J) int32, within bounds.
      values: v (M, L, D); M divides N.

    Returns:
      (N, D) float32.
    """
    return (_fast_means if has_kernels(1, p, values) else _means)(p, at, values)


def taken(x: jax.Array, at: jax.Array) -> jax.Array:
    """Chosen rows of each of N queries, of which N/M neighbours share some.

    Args:
      x: (M, L, D); M divides N.
      at: (N, J) int32, within bounds.

    Returns:
      (N, J, D).
    """
    (m, length, d), n = x.shape, len(at)
    of_row = jnp.arange(n, dtype=jnp.int32)[:, None]
    of_row = of_row if m == n else of_row // (n // m)
    return rows(x.reshape(m * length, d), at + of_row * length)


def _cosines(q: jax.Array, at: jax.Array, keys: jax.Array, epsilon: jax.Array) -> jax.Array:
    return tiles.dot('nk,njk->nj', q, unit(taken(keys, at), epsilon))


def _means(p: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    return tiles.dot('nj,njd->nd', p, taken(values, at))


def _cosines_by_kernel(
    q: jax.Array, at: jax.Array, keys: jax.Array, epsilon: jax.Array
) -> jax.Array:
    return layercomb_kernels.gathered_cosines(q, at, keys, epsilon)


_fast_cosines = with_kernel(_cosines, _cosines_by_kernel)
_fast_means = with_kernel(_means, layercomb_kernels.gathered_means)


def filled(rings: jax.Array, buckets: jax.Array, mask: jax.Array, position: jax.Array) -> jax.Array:
    """Rings of the real positions that each row has taken, from their buckets.

    Args:
      rings: (N, R, n, C), of which only the shape is used.
      buckets: (N, L, R), of each position.
      mask: (B, L) bool, True = a real position.
      position: (B,) int32, how many positions each row has taken.

    Returns:
      (N, R, n, C) int32.
    """
    buckets = buckets.swapaxes(1, 2)  # (N, R, L)
    _, _, n_buckets, chunk_len = rings.shape
    length = buckets.shape[2]
    numbers = jnp.arange(length, dtype=jnp.int32)
    seen = mask & (numbers[None] < position[:, None])  # (B, L)
    seen = jnp.repeat(seen, len(buckets) // len(seen), 0)[:, None]  # (N, 1, L)
    buckets = jnp.where(seen, buckets.astype(jnp.int32), n_buckets)

    def one(buckets: jax.Array) -> jax.Array:
        order, bucket = sorted_by_bucket(buckets, n_buckets)
        # A position is among the last C of its bucket if the bucket C places later differs.
        last = bucket != jnp.pad(
            bucket[chunk_len:], (0, min(chunk_len, length)), constant_values=-1
        )
        place = numbers % chunk_len  # C neighbours get different places
        at = jnp.where(last, bucket, n_buckets), place  # padding is dropped
        return empty(1, 1, n_buckets, chunk_len)[0, 0].at[at].set(order, mode='drop')

    return jax.vmap(jax.vmap(one))(buckets)
