"""Streams as integers on a fixed-point grid, and the lowest bits of integers packed into bytes.

Shape letters: B batch, N values of a sample, W bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_TOP = 2.0**31 - 2.0**11  # what float32 rounds below it fits into int32


@dataclasses.dataclass(frozen=True)
class Grid:
    """Numbers k · 2^−fraction, whose k is an int32: up to ±2^(31 − fraction).

    Attributes:
      fraction: how many bits stand after the point.

    >>> x = jnp.array([0.5, -21000.25])
    >>> Grid(16).of(x).tolist(), Grid(16).floats(Grid(16).of(x)).tolist()
    ([32768, -1376272384], [0.5, -21000.25])
    """

    fraction: int

    def of(self, x: jax.Array) -> jax.Array:
        """The nearest k, int32, of floats; what lies outside, or is NaN, is some k inside."""
        k = jnp.round(self.scaled(x))
        return jnp.clip(jnp.where(jnp.isnan(k), 0, k), -_TOP, _TOP).astype(jnp.int32)

    def scaled(self, x: jax.Array) -> jax.Array:
        """x · 2^fraction, float32: k before it is rounded."""
        return x.astype(jnp.float32) * jnp.float32(2.0**self.fraction)

    def floats(self, k: jax.Array) -> jax.Array:
        """k · 2^−fraction, float32."""
        return k.astype(jnp.float32) * jnp.float32(2.0**-self.fraction)


def fits(k: jax.Array) -> jax.Array:
    """Which samples have all their values on a grid: k (B, …) float32 → (B,) bool.

    NaN and infinities do not fit.
    """
    return (jnp.abs(k) < _TOP).all(tuple(range(1, k.ndim)))


def pack(k: jax.Array, m: int) -> jax.Array:
    """The lowest `m` bits of integers, packed: (B, …) int32 → (B, W) uint8, `m` bits a value.

    >>> pack(jnp.array([[1, 2, 3, 16]]), 4).shape
    (1, 2)
    """
    fields = []
    for start, width in _fields(m):
        parts = _parts(k.reshape(k.shape[0], -1) >> start, 8 // width)  # (B, 8 / width, N')
        parts = (parts & (2**width - 1)).astype(jnp.uint8)
        byte = parts[:, 0]
        for i in range(1, 8 // width):
            byte = byte | (parts[:, i] << jnp.uint8(i * width))
        fields.append(byte)
    return jnp.concatenate(fields, 1)


def unpack(packed: jax.Array, m: int, shape: tuple[int, ...]) -> jax.Array:
    """What `pack` packed: (B, W) uint8 → int32 of `shape`, 0 … 2^m − 1."""
    n = math.prod(shape[1:])
    made, at = jnp.zeros((shape[0], n), jnp.int32), 0
    for start, width in _fields(m):
        size = -(-n // (8 // width))
        byte = packed[:, at : at + size]
        shifts = [byte >> jnp.uint8(i * width) for i in range(8 // width)]
        field = jnp.concatenate(shifts, 1)[:, :n] & jnp.uint8(2**width - 1)
        made, at = made | (field.astype(jnp.int32) << start), at + size
    return made.reshape(shape)


def _fields(m: int) -> Iterator[tuple[int, int]]:
    """(first bit, width) of the fields that `m` bits are cut into: powers of two.

    >>> list(_fields(4)), list(_fields(5))
    ([(0, 4)], [(0, 4), (4, 1)])
    """
    start = 0
    for width in (8, 4, 2, 1):
        if m & width:
            yield start, width
            start += width


def _parts(x: jax.Array, n: int) -> jax.Array:
    """(B, N) → (B, n, N / n), with zeros at the end where `n` does not divide N."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)))
    return x.reshape(x.shape[0], n, -1)
