"""Locality-sensitive hashing by random rotations: near vectors mostly get the same bucket.

Shape letters: B batch, H heads, L length, K depth of a head, R rounds; T positions at a time; F
half the sum of the factors of the number of buckets.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import layercomb_kernels
from layercomb.layers.attention import tiles
from layercomb.layers.attention.lsh.torch_normal import torch_normal
from layercomb.layers.quantized.native import has_kernels, with_kernel

# Positions and heads hashed at a time: a full (H, L, R·buckets) array would be too large. A CPU
# reads each score four times, and from a cache if a piece has so few; but products of a few rows
# read the rotations too often.
CPU_SCORES, CPU_LEAST, CPU_MOST = 96 * 1024, 64, 1024
TOGETHER = 8192, 8
# Cost per position: n / 2 products for one hash of n buckets, about √n for two factors.
FACTORED_FROM = 256


def automatic_buckets(length: int, chunk_len: int) -> tuple[int, ...]:
    """The number of buckets, in factors, for buckets that average half a chunk.

    Args:
      length: L, the length that the model is made for.
      chunk_len: C.

    Returns:
      One even number near 2·L / C; from 256 on, two factors near its square root.

    >>> automatic_buckets(4096, 64), automatic_buckets(65536, 64), automatic_buckets(64, 64)
    ((128,), (64, 32), (2,))
    """
    n = max(2, 2 * length // chunk_len)
    if n < FACTORED_FROM:
        return (n + n % 2,)
    first = 2 ** math.ceil(math.log2(n) / 2)
    second = -(-n // first)
    return first, second + second % 2


def factors_of(n_buckets: int | tuple[int, ...]) -> tuple[int, ...]:
    """The factors of the number of buckets, as a tuple."""
    return n_buckets if isinstance(n_buckets, tuple) else (n_buckets,)


def smallest_dtype(n: int) -> Any:
    """The smallest integer dtype that holds the numbers 0 … n − 1, as decisions are kept."""
    return next((t for t in (jnp.uint8, jnp.uint16) if n - 1 <= jnp.iinfo(t).max), jnp.int32)


def check_buckets(n_buckets: int | tuple[int, ...]) -> None:
    """Checks the number of buckets, or each of its factors.

    Raises:
      ValueError: if one is neither 1 nor even and positive.
    """
    for n in factors_of(n_buckets):
        if n != 1 and (n < 1 or n % 2):
            raise ValueError(
                f'n_buckets={n_buckets!r}: a rotation and its negative make buckets in pairs, so '
                f'each number must be even, or 1 for a single bucket: use {max(2, n + n % 2)}'
            )


def lsh_buckets(
    x: jax.Array, rng: jax.Array, *, n_buckets: int | tuple[int, ...], n_hashes: int
) -> jax.Array:
    """The bucket of every vector in every round: h(x) = argmax [x A; −x A].

    A (K, n_buckets / 2) is Gaussian, drawn for each head and round, the same for all rows of the
    batch. Round r does not depend on n_hashes. Factors (f₁, f₂, …) are hashed separately and
    combined, h = (h₁ f₂ + h₂) …, so that many buckets are cheap.

    Args:
      x: (B, H, L, K), floating; no gradient flows.
      rng: a typed key, or one for every head, (H,).
      n_buckets: 1 or an even number, or a tuple of such factors.
      n_hashes: R, at least 1.

    Returns:
      (B, H, R, L) int32, from 0 to the product of the factors − 1.

    Raises:
      ValueError: for a factor that is odd and not 1, or L = 0.

    References:
      Andoni et al. 2015, https://arxiv.org/abs/1509.02897
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
    """
    rotations = lsh_rotations(rng, x.shape[1], x.shape[3], n_buckets=n_buckets, n_hashes=n_hashes)
    return rotated_buckets(x, rotations, n_buckets=n_buckets)


def lsh_rotations(
    rng: jax.Array,
    n_heads: int,
    depth: int,
    *,
    n_buckets: int | tuple[int, ...],
    n_hashes: int,
) -> jax.Array:
    """The rotations of `lsh_buckets`, transposed.

    Args:
      rng: a typed key, or one for every head, (H,).
      n_heads: H.
      depth: K.
      n_buckets: 1 or an even number, or a tuple of such factors.
      n_hashes: R, at least 1.

    Returns:
      (H, R, F, K) float32, F being half the sum of the factors.
    """
    check_buckets(n_buckets)
    width = sum(f // 2 for f in factors_of(n_buckets))

    def rotation(key: jax.Array, r: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, r), (depth, width), jnp.float32).T

    keys, rounds = tiles.keys_of_heads(rng, n_heads), jnp.arange(n_hashes, dtype=jnp.int32)
    return jax.vmap(lambda key: jax.vmap(lambda r: rotation(key, r))(rounds))(keys)


def torch_rotations(
    seed: int, n_heads: int, depth: int, *, n_buckets: int | tuple[int, ...], n_hashes: int
) -> jax.Array:
    """The rotations that transformers' Reformer draws from its ``hash_seed``.

    Its buckets are numbered with the first factor counting fastest, ours with the last one: its
    factors (f₁, f₂) are (f₂, f₁) here.

    Args:
      seed: the ``hash_seed``.
      n_heads, depth, n_buckets, n_hashes: as of `lsh_rotations`.

    Returns:
      (H, R, F, K) float32.

    Raises:
      ValueError: for a number of buckets that is odd, which it cannot have.
    """
    factors = factors_of(n_buckets)
    if any(f < 1 or f % 2 for f in factors):
        raise ValueError(f"n_buckets={n_buckets!r}: torch's rotations make even numbers of buckets")
    halves = [f // 2 for f in reversed(factors)]
    made = torch_normal(seed, (n_heads, depth, n_hashes, sum(halves)))
    parts = np.split(made, np.cumsum(halves)[:-1], axis=-1)
    return jnp.asarray(np.concatenate(parts[::-1], -1).transpose(0, 2, 3, 1))


def rotated_buckets(
    x: jax.Array, rotations: jax.Array, *, n_buckets: int | tuple[int, ...]
) -> jax.Array:
    """The buckets of `lsh_buckets`, from given rotations.

    Args:
      x: (B, H, L, K), floating; no gradient flows.
      rotations: (H, R, F, K), as of `lsh_rotations`.
      n_buckets: as of `lsh_buckets`.

    Returns:
      (B, H, R, L) int32.

    Raises:
      ValueError: if L is 0.
    """
    factors = factors_of(n_buckets)
    b, h, length, k = x.shape
    n_hashes = rotations.shape[1]
    if not length:
        raise ValueError(f'LSH attention needs one position at least, got the shape {x.shape}')
    x = lax.stop_gradient(x).astype(jnp.float32)

    if length == 1:
        return _of_one(factors, x[:, :, 0], rotations)[..., None]

    def hash_piece(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, head = piece  # (T, K), ()
        return _chosen(factors, jnp.einsum('tk,rfk->rtf', x, rotations[head]))  # (R, T)

    together, n_heads = _together(n_hashes * rotations.shape[2])
    t = min(length, together)
    n = -(-length // t)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, n * t - length), (0, 0)])
    heads = jnp.broadcast_to(jnp.arange(h, dtype=jnp.int32)[:, None], (b, h, n)).reshape(-1)
    x = x.reshape(b * h * n, t, k)
    pieces = lax.map(hash_piece, (x, heads), batch_size=n_heads if n_heads > 1 else None)
    buckets = pieces.reshape(b, h, n, n_hashes, t).swapaxes(2, 3)  # (B, H, R, n, T)
    return buckets.reshape(b, h, n_hashes, n * t)[..., :length]


def _of_one(factors: tuple[int, ...], x: jax.Array, rotations: jax.Array) -> jax.Array:
    """The buckets (B, H, R) of one position (B, H, K)."""

    def plain(x: jax.Array, rotations: jax.Array) -> jax.Array:
        return _chosen(factors, jnp.einsum('bhk,hrfk->bhrf', x, rotations))

    if not has_kernels(len(x), x, rotations):
        return plain(x, rotations)
    by_kernel = functools.partial(layercomb_kernels.nearest_rotations, factors)
    return with_kernel(plain, by_kernel)(x, rotations)


def _chosen(factors: tuple[int, ...], y: jax.Array) -> jax.Array:
    """Buckets from scores: (…, F) → (…)."""
    bucket, start = jnp.zeros(y.shape[:-1], jnp.int32), 0
    for factor in factors:
        if factor > 1:
            bucket = bucket * factor + nearest(y[..., start : start + factor // 2])
            start += factor // 2
    return bucket


def _together(n_scores: int) -> tuple[int, int]:
    """How many positions and heads are hashed at a time, with so many scores of each."""
    if jax.default_backend() != 'cpu':
        return TOGETHER
    return min(max(CPU_SCORES // max(n_scores, 1), CPU_LEAST), CPU_MOST), 1


def nearest(y: jax.Array) -> jax.Array:
    """argmax [y; −y] over the last axis, faster on a CPU than XLA's argmax.

    Args:
      y: (…, F) float32.

    Returns:
      (…) int32, from 0 to 2·F − 1.
    """
    half = y.shape[-1]
    high, low = y.max(-1), y.min(-1)
    positive = high >= -low
    extreme = jnp.where(positive, high, low)
    places = jnp.where(y == extreme[..., None], jnp.arange(half, dtype=jnp.int32), half)
    # NaN equals nothing: it gets a real bucket, not that of padding, and shows in the scores.
    return jnp.minimum(places.min(-1), half - 1) + jnp.where(positive, 0, half).astype(jnp.int32)
