"""Numbers of one byte in blocks that share a scale, after a code that is fine near 0.

A block is at most `BLOCK` numbers along the last axis. So the bytes have the shape of the array,
and are sharded as it is: along any of its axes, the last one in pieces of whole blocks, devices
need nothing from each other. And a block never mixes the layers of a stack, experts or rows. Each
block has one float32 scale: 1 + 4 / 256 bytes a number.

The code is a tree of seven decades, as of Dettmers et al. A place t from 1 to 128 stands for::

    g(t) = 10^(i − 7) (1 + 9 f)        t = 2^i (1 + f), 0 ≤ f < 1

so that there are 64 places between 0.1 and 1, 32 between 0.01 and 0.1, and one at 10⁻⁷. Numbers of
both signs have t = 0, 1, …, 127 and their negatives; if none of a block is negative, half steps do:
t = 0, 1, 1.5, …, 128. The sign of the scale says which of both a block has.

g is convex and in straight pieces, the greatest of the lines through them. Its inverse is the least
of the inverse lines. Neither needs a table, a logarithm or a search.

References:
  Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization,
  https://arxiv.org/abs/2110.02861
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.optimizers import rounding

BLOCK = 256

# (slope, offset) of each piece of g: through the origin, then from 2^i to 2^(i + 1).
_LINES = [(1e-7, 0.0)] + [(9e-7 * 5.0**i, -8e-7 * 10.0**i) for i in range(7)]
_SIGNED_TOP = 127  # the last place of numbers of both signs
_UNSIGNED_TOP = 128
_ZERO = 128  # the byte of 0 among numbers of both signs


class Bytes(NamedTuple):
    """An array in one byte a number.

    Attributes:
      codes: uint8, of the array's shape (…, D).
      scales: float32 (…, ⌈D / 256⌉), of each block: what its largest number stands for. It is
        negative where the block holds numbers of both signs.
    """

    codes: jax.Array
    scales: jax.Array


def scales(x: jax.Array) -> jax.Array:
    """The scale of each block of an array: see `Bytes`.

    Args:
      x: float32 (…, D), of at least one axis.
    """
    blocks = _blocks(x)  # (…, n, block)
    largest, least = _extremes(blocks)
    signed = jnp.maximum(largest, -least) / _value(jnp.float32(_SIGNED_TOP))
    return jnp.where(least < 0, -signed, largest)


def narrow(
    x: jax.Array, key: jax.Array | None = None, its_scales: jax.Array | None = None
) -> Bytes:
    """Rounds an array to one byte a number.

    Numbers of both signs become the nearest of the code. Those of a block without negative ones,
    such as a mean of squares, are rounded by chance, so that the mean is right: it changes by a
    hundredth a step or less, and would not fall when gradients do, were it rounded to the nearest.
    A positive one never becomes 0: a divisor stays one.

    Args:
      x: float32 (…, D), of at least one axis.
      key: of the chances; None rounds all numbers to the nearest.
      its_scales: what `scales` gives, if it is known already.

    >>> narrow(jnp.zeros((3, 600))).scales.shape
    (3, 3)
    """
    made = scales(x) if its_scales is None else its_scales
    blocks, scale = _blocks(x), made[..., None]
    place = _place(jnp.abs(blocks) / jnp.where(scale == 0, 1, jnp.abs(scale)))
    both = _ZERO + jnp.sign(blocks) * jnp.round(place)
    up = 0.5 if key is None else rounding.chances(blocks.shape, key).astype(jnp.float32) / 2**16
    halves = jnp.clip(jnp.floor(2 * place + up) - 1, jnp.sign(blocks), 2 * _UNSIGNED_TOP - 1)
    codes = jnp.where(scale < 0, both, halves).astype(jnp.uint8)
    return Bytes(codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], made)


def wide(x: Bytes) -> jax.Array:
    """The float32 array of the numbers that bytes stand for.

    Args:
      x: as of `narrow`.

    >>> wide(narrow(jnp.array([0.0, 1.0, 4.0]))).round(6)
    Array([0.      , 0.990625, 4.      ], dtype=float32)
    """
    codes = _blocks(x.codes).astype(jnp.float32)
    scale = x.scales[..., None]
    signed = scale < 0
    place = jnp.where(signed, jnp.abs(codes - _ZERO), (codes + 1) / 2)
    sign = jnp.sign(jnp.where(signed, codes - _ZERO, codes))
    values = sign * _value(place) * jnp.abs(scale)
    return values.reshape(*x.codes.shape[:-1], -1)[..., : x.codes.shape[-1]]


def _blocks(x: jax.Array) -> jax.Array:
    """(…, D) as equal blocks (…, n, block), the last one filled up by zeros."""
    width = x.shape[-1]
    n = -(-width // BLOCK)
    block = -(-width // max(n, 1))
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * block - width)])
    return filled.reshape(*x.shape[:-1], n, block)


def _extremes(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest and the least number of each block, in one pass.

    XLA computes such a pair where what it is made of is computed. Each by itself would be given to
    a library on a CPU, and have the whole array laid out for it.
    """

    def both(a: Any, b: Any) -> Any:
        return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])

    begin = jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
    largest, least = jax.lax.reduce((blocks, blocks), begin, both, (blocks.ndim - 1,))
    return largest, least


def _value(place: jax.Array) -> jax.Array:
    """g."""
    return functools.reduce(jnp.maximum, [slope * place + offset for slope, offset in _LINES])


def _place(value: jax.Array) -> jax.Array:
    """The inverse of g."""
    lines = [(1 / slope, -offset / slope) for slope, offset in _LINES]
    return functools.reduce(jnp.minimum, [slope * value + offset for slope, offset in lines])
