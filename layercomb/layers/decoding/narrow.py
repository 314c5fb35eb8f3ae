"""Keys and values of a decoding cache in 16 or 8 bits, which take less memory and are read sooner.

What is appended is rounded, and what is read is widened again: attention itself is float32. In 16
bits a number is a bfloat16. In 8 bits a vector, of one position and head, is int8 with a scale.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from layercomb.layers.state.parts import Part

CacheBits = Literal[16, 8]
_LARGEST = 127


class Rounded(Part):
    """Vectors in int8, each with the scale by which its integers are multiplied.

    Both arrays have the same axes, so that rows, heads and positions are found alike in both.

    Attributes:
      integers: (…, K) int8, from −127 to 127.
      scales: (…, 1) float32, the largest size in a vector / 127; NaN if anything is not finite.
    """

    integers: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is rounded, (…, K)."""
        return self.integers.shape

    def widened(self) -> jax.Array:
        """The numbers, (…, K) float32."""
        return self.integers.astype(jnp.float32) * self.scales


Kept = Any  # an array or `Rounded`


def zeros(shape: tuple[int, ...], dtype: Any, bits: int | None) -> Kept:
    """Room for vectors.

    Args:
      shape: (…, K).
      dtype: of the vectors before they are rounded.
      bits: 16 or 8; None keeps the dtype, and so does 16 where that has no more.
    """
    if bits == 8:
        return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
    narrows = bits is not None and jnp.dtype(dtype).itemsize > 2
    return jnp.zeros(shape, jnp.bfloat16 if narrows else dtype)


def rounded(x: jax.Array, like: Kept) -> Kept:
    """Vectors (…, K) as a cache keeps them.

    Args:
      x: floats.
      like: what is kept, an array or `Rounded`.
    """
    if not isinstance(like, Rounded):
        return x.astype(like.dtype)
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(-1, keepdims=True, initial=0) / _LARGEST
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    times = jnp.where(finite, jnp.round(x / jnp.where(scales > 0, scales, 1)), 0)
    integers = jnp.clip(times, -_LARGEST, _LARGEST).astype(jnp.int8)
    return Rounded(integers, jnp.where(finite, scales, jnp.nan))


def widened(kept: Kept) -> jax.Array:
    """What is kept, as float32."""
    return kept.widened() if isinstance(kept, Rounded) else kept.astype(jnp.float32)


def is_narrow(kept: Kept, dtype: Any) -> bool:
    """Whether vectors are kept otherwise than as an array of a dtype."""
    return isinstance(kept, Rounded) or kept.dtype != dtype
