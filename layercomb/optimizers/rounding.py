"""Rounding by chance: what is rounded has the right mean, however small the steps it is made of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two bfloat16 around it, at random, so that the mean is x.

    The nearer one is the likelier: a number at a quarter of the way goes up once in four times. A
    sum or mean that is kept in bfloat16 would stand still as soon as what is added is less than
    1/512 of it; rounded so, it moves as it should on average.

    Args:
      x: float32, of any shape.
      key: of the numbers that decide; an equal key rounds alike.

    Returns:
      bfloat16, of the same shape. What is not finite stays so.

    References:
      Gupta et al. 2015, Deep Learning with Limited Numerical Precision,
      https://arxiv.org/abs/1502.02551
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = ((bits + chances(x.shape, key)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def chances(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Numbers from 0 to 2¹⁶ − 1, each as likely: a hash of each place and the key.

    They are computed where they are used, without arrays of their own: `jax.random.bits` takes as
    much memory as what is rounded, and most of the time of an update.

    Args:
      shape: of the array.
      key: whose hash it is.

    Returns:
      uint32, of that shape.

    References:
      Wellons 2018, https://nullprogram.com/blog/2018/07/31/, for the constants
    """
    place = jnp.full(shape, jax.random.bits(key, (), jnp.uint32))
    stride = jnp.uint32(0x9E3779B9)
    for axis in reversed(range(len(shape))):
        place = place + stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride = stride * jnp.uint32(shape[axis] & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        place = (place ^ (place >> shift)) * jnp.uint32(factor)
    return place >> 16


def tree_to_bfloat16(tree: Any, key: jax.Array) -> Any:
    """Rounds each float32 array of a tree by `to_bfloat16`, with numbers of its own.

    Args:
      tree: a pytree of arrays; others than float32 are left as they are.
      key: of the numbers that decide.
    """
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        to_bfloat16(x, jax.random.fold_in(key, i)) if x.dtype == jnp.float32 else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, rounded)
