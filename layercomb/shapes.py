"""Signatures: what shape and dtype a value has, without the value.

A signature is a tuple of `jax.ShapeDtypeStruct`, one a value on the stack. Layers are initialised
from signatures alone, so a model of any size can be described, counted and checked before a byte
of it exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Signature = tuple[jax.ShapeDtypeStruct, ...]


def shape_dtype(shape: Iterable[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The signature of one value.

    >>> shape_dtype((2, 64), 'int32')
    ShapeDtypeStruct(shape=(2, 64), dtype=int32)
    """
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def signature_of(values: Any) -> Signature:
    """The signature of a value or of a tuple of values.

    Args:
      values: an array, a `jax.ShapeDtypeStruct`, or a tuple or list of these. Arrays are anything
        with a shape and a dtype; Python numbers and nested lists of numbers are converted.

    Returns:
      A tuple of `jax.ShapeDtypeStruct`, one a value.

    Raises:
      TypeError: if a value is none of these.

    >>> signature_of(jnp.zeros((2, 3)))
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32),)
    """
    if not isinstance(values, (tuple, list)):
        values = (values,)
    return tuple(_one(v) for v in values)


def describe(signature: Iterable[Any]) -> str:
    """A signature in short form; a value that is no array is shown by its type.

    >>> describe([shape_dtype((2, 5, 8)), shape_dtype((2, 5), bool)])
    'float32[2,5,8], bool[2,5]'
    """
    return ', '.join(map(_describe_one, signature))


def is_float(x: Any) -> bool:
    """Whether `x`, an array or a signature, holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def as_deep(x: Any, like: jax.Array) -> jax.Array:
    """`x` with axes of size 1 in front, so that it has as many axes as `like`: (D,) → (1, 1, D).

    NumPy does so implicitly, but ``jax_numpy_rank_promotion='raise'`` forbids that. The compiled
    program is the same.

    >>> as_deep(jnp.ones(3), jnp.ones((2, 5, 3))).shape
    (1, 1, 3)
    """
    return jax.lax.broadcast_to_rank(x, like.ndim)


def check_float(owner: str, x: Any, cure: str = 'embed integers first, with tl.Embedding') -> None:
    """Raises a TypeError unless `x` is floating-point and has a last axis.

    Args:
      owner: what the message begins with.
      x: an array or a signature.
      cure: what the message advises for integers.
    """
    if x.shape and is_float(x):
        return
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        cure = 'give real numbers, e.g. their absolute values'
    elif is_float(x):
        cure = 'add an axis, x[None]'
    raise TypeError(
        f'{owner} takes floating-point vectors along the last axis, got {describe([x])}: {cure}'
    )


def check_rank(owner: str, x: Any, wanted: str, rank: int) -> None:
    """Raises a ValueError unless an array or a signature has `rank` axes."""
    if len(x.shape) != rank:
        cure = ': add a batch axis, x[None]' if len(x.shape) == rank - 1 else ''
        raise ValueError(f'{owner} takes {wanted}, got the shape {tuple(x.shape)}{cure}')


def check_axis(owner: str, x: Any, axis: int) -> None:
    """Raises a ValueError unless an array or a signature has the axis."""
    n = len(x.shape)
    if not -n <= axis < n:
        raise ValueError(f'{owner}: there is no axis {axis} in the shape {tuple(x.shape)}')


def check_sequence(owner: str, x: Any) -> None:
    """Raises a ValueError unless `x` is a batch of sequences of vectors, (B, L, D)."""
    check_rank(owner, x, '(batch, length, features)', 3)


def check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless a mask is boolean, and of the shape (batch, length).

    Numbers are refused, because libraries differ in their meaning: 1 may mean real or hidden, and
    an additive mask has 0 where a position is real.
    """
    if mask.dtype == jnp.bool_ and tuple(mask.shape) == shape:
        return
    if mask.dtype != jnp.bool_:
        cure = 'True where a position is real, e.g. mask != 0'
    elif tuple(mask.shape) == (shape[0], 1, 1, shape[1]):
        cure = 'give mask[:, 0, 0]'
    else:
        cure = f'one entry a position; np.broadcast_to(mask, {shape}) repeats what all rows share'
    raise ValueError(f'mask must be bool{shape}, got {mask.dtype}{tuple(mask.shape)}: {cure}')


def check_width(x: Any, width: int) -> None:
    """Raises unless `x` is floating-point (…, width), as the weights were made for.

    Without this check, results for integers would be truncated to integers.

    Raises:
      TypeError: for integers.
      ValueError: for another width.
    """
    if not is_float(x):
        raise TypeError(
            f'the weights were made for floating-point inputs, got {describe([x])}: convert them, '
            'x.astype(np.float32)'
        )
    if x.shape[-1] != width:
        raise ValueError(
            f'the input is {x.shape[-1]} wide and the weights were made for {width}: give the '
            'shape that the model was initialised with'
        )


def nearest_divisor(n: int, to: int) -> int:
    """The divisor of `n` nearest to a number.

    >>> nearest_divisor(96, 30)
    32
    """
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return min([*small, *(n // i for i in reversed(small))], key=lambda i: abs(i - to))


def nearest_multiple(n: int, of: int) -> int:
    """The positive multiple of a number nearest to `n`.

    >>> nearest_multiple(100, 64)
    128
    """
    return max(1, round(n / of)) * of


def _describe_one(x: Any) -> str:
    if not (hasattr(x, 'shape') and hasattr(x, 'dtype')):
        return type(x).__name__
    return f'{x.dtype}[{",".join(map(str, x.shape))}]'


def _one(value: Any) -> jax.ShapeDtypeStruct:
    if hasattr(value, 'shape') and hasattr(value, 'dtype'):
        return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype)
    array = np.asarray(value)
    if array.dtype == object or not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(
            f'a signature is made of arrays or jax.ShapeDtypeStruct, got {value!r}: '
            f'pass e.g. lc.shape_dtype((batch, length), "int32")'
        )
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
