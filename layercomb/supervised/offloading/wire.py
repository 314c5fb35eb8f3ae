"""Integers as floats of the same bits: cotangents are floats, and carry an optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.shapes import is_float

_WORD = 4  # bytes of a float32


def sent(x: Any) -> Any:
    """An array as a gradient can carry it, without a copy; floats stay as they are.

    Args:
      x: (n, …), of any dtype of up to four bytes.
    """
    if is_float(x):
        return x
    values = np.ascontiguousarray(x)
    return values.view(np.float32) if is_packed(x) else values.astype(np.float32)


def received(x: Any, like: Any) -> Any:
    """The inverse of `sent`, outside of compiled functions.

    Args:
      x: what `sent` gave.
      like: of the array's shape and dtype.
    """
    if is_float(like):
        return x
    values = np.ascontiguousarray(x)
    return values.view(like.dtype) if is_packed(like) else values.astype(like.dtype)


def opened(x: jax.Array, like: Any) -> jax.Array:
    """The inverse of `sent`, inside of compiled functions.

    Args:
      x: what `sent` gave, or a part of it along the first axis.
      like: of the array's shape and dtype.
    """
    if is_float(like):
        return x
    if not is_packed(like):
        return x.astype(like.dtype)
    made = jax.lax.bitcast_convert_type(x, like.dtype)
    return made.reshape(*x.shape[:-1], -1) if made.ndim > x.ndim else made


def closed(x: jax.Array) -> jax.Array:
    """`sent` inside of compiled functions.

    Args:
      x: (n, …), of any dtype of up to four bytes.
    """
    if is_float(x):
        return x
    if not is_packed(x):
        return x.astype(jnp.float32)
    size = x.dtype.itemsize
    words = x if size == _WORD else x.reshape(*x.shape[:-1], -1, _WORD // size)
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def is_packed(x: Any) -> bool:
    """Whether the bytes of each row are whole words; if not, small integers become their values.

    Args:
      x: of a shape and dtype.
    """
    size = jnp.dtype(x.dtype).itemsize
    if x.dtype == jnp.bool_ or size == _WORD:
        return bool(size == _WORD)
    return len(x.shape) > 1 and x.shape[-1] * size % _WORD == 0
