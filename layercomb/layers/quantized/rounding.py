"""Weights as integers and scales: the nearest, or the best for the inputs that they multiply.

A matrix is rows (…, n), and each row is multiplied by inputs of n features. A group of g neighbours
in a row shares a scale: ŵ = scale · q.

Shape letters: R rows, G groups in a row, g weights in a group, n = G · g.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.quantized.fitting import Inputs, fitted
from layercomb.layers.quantized.nearest import nearest


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def narrow(
    wide: jax.Array,
    axes: str,
    bits: int,
    group_size: int,
    minima: bool = False,
    inputs: Inputs | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Rounds a matrix, or a stack of them, to narrow weights.

    To the nearest or, if it is known what the matrix multiplies, so that products with that change
    least.

    Args:
      wide: floating, with the axes that `axes` names; any others come first.
      axes: letters ``i`` and ``o``, see `matrix`.
      bits: 4, 8 or 16.
      group_size: wanted number of weights that share a scale; the nearest divisor of the row's
        length is taken (of half of it for int4), by ratio.
      minima: whether a group has a minimum, too: see `from_least`.
      inputs: that a matrix multiplies which is not stacked; None if they are not known.

    Returns:
      Values and scales, as of `Narrow`; scales are None for 16 bits.
    """
    n_lead, n_i = wide.ndim - len(axes), axes.count('i')
    lead, shape = wide.shape[:n_lead], wide.shape[n_lead:]
    if axes == 'oi':
        o = shape[:-1]
    else:
        o = shape[n_i:]
        wide = jnp.moveaxis(wide.reshape(*lead, math.prod(shape[:n_i]), *o), n_lead, -1)
    if bits == 16:
        return wide.astype(jnp.bfloat16), None
    length = wide.shape[-1]
    size = group_of(length // 2 if bits == 4 else length, group_size)  # a group is within one half
    wide = wide.astype(jnp.float32)
    if minima:
        q, scales = from_least(wide, bits, size)
    else:
        q, scales = integers(wide, bits, size, inputs)
    return (_pack(q) if bits == 4 else q), scales


def can_narrow(shape: tuple[int, ...], axes: str, bits: int) -> bool:
    """Whether a matrix can be stored in so many bits: int4 needs rows of even length.

    Args:
      shape: of the wide matrix.
      axes: letters ``i`` and ``o``, one for each axis.
      bits: 4, 8 or 16.
    """
    length = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == 'i')
    return bits != 4 or length % 2 == 0


def group_of(length: int, group_size: int) -> int:
    """The divisor of `length` nearest to `group_size`, by ratio.

    >>> group_of(768, 64), group_of(100, 64), group_of(48, 64)
    (64, 50, 48)
    """
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    return min(divisors, key=lambda n: abs(math.log(n / group_size)))


def _pack(q: jax.Array) -> jax.Array:
    """int8 from −8 to 7, (…, n) → two int4 per byte, (…, n / 2) uint8."""
    n = q.shape[-1] // 2
    q = lax.bitcast_convert_type(q, jnp.uint8)
    return (q[..., :n] & 15) | (q[..., n:] << 4)


def integers(
    rows: jax.Array, bits: int, size: int, inputs: Inputs | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to integers and scales.

    Args:
      rows: W (…, n) float32.
      bits: 4 or 8.
      size: g, which divides n.
      inputs: that W is for; None to round to the nearest.

    Returns:
      q (…, n) int8 and scales (…, G) float32.
    """
    groups = rows.reshape(*rows.shape[:-1], -1, size)  # (…, n) → (…, G, g)
    if inputs is None:
        q, scales = nearest(groups, bits)
    else:
        q, scales = fitted(rows.reshape(-1, rows.shape[-1]), bits, size, inputs)
    return q.reshape(rows.shape), scales.reshape(groups.shape[:-1])


def from_least(rows: jax.Array, bits: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to integers that count from the least weight of each group.

    ŵ = scale · (q + 2^(bits − 1)) + minimum: the least weight is the minimum, and the largest is
    the largest integer.

    Args:
      rows: W (…, n) float32.
      bits: 4 or 8.
      size: g, which divides n.

    Returns:
      q (…, n) int8; and scales, with minima behind them, (…, 2G) float32.
    """
    groups = rows.reshape(*rows.shape[:-1], -1, size)  # (…, n) → (…, G, g)
    least, half = groups.min(-1, keepdims=True), 2 ** (bits - 1)
    scales = (groups.max(-1, keepdims=True) - least) / (2 * half - 1)
    steps = (groups - least) / jnp.where(scales == 0, 1, scales) - half
    q = jnp.clip(jnp.round(steps), -half, half - 1).astype(jnp.int8)
    return q.reshape(rows.shape), jnp.concatenate([scales, least], -2).squeeze(-1)
