"""Narrow weights are constants: who asks for their gradient is told so."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb import trees
from layercomb.layers.quantized.matrix import SCALES
from layercomb.shapes import is_float
from layercomb.trees import Tree


def constant(x: jax.Array) -> jax.Array:
    """x itself, (…) → (…), where its gradient is not asked for.

    Inside `all_constant` it has none: the gradient of all weights is asked for there, whether they
    train or not.

    Raises:
      ValueError: when its gradient is taken.
    """
    if _ALL_CONSTANT.get():
        return lax.stop_gradient(x)
    _refusing(x)  # x is returned and not this, which a scan would not know for the weight itself
    return x


def refuse_narrow(weights: Tree) -> None:
    """Refuses the gradient of narrow weights, for what asks for all gradients inside.

    Args:
      weights: of a layer.

    Raises:
      ValueError: when the gradient of one that is narrow is taken.
    """
    found = trees.flatten(weights)
    for path, x in found.items():
        of = found.get(path.removesuffix(SCALES))
        if x.dtype == jnp.bfloat16 or (of is not x and of is not None and not is_float(of)):
            constant(x)


_ALL_CONSTANT: contextvars.ContextVar[bool] = contextvars.ContextVar('all_constant', default=False)


@contextlib.contextmanager
def all_constant() -> Iterator[None]:
    """In the block, `constant` refuses nothing: what is asked for a narrow weight is zero."""
    token = _ALL_CONSTANT.set(True)
    try:
        yield
    finally:
        _ALL_CONSTANT.reset(token)


@jax.custom_jvp
def _refusing(x: jax.Array) -> jax.Array:
    return x


@_refusing.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        'quantized weights do not train: train the wide model and quantize it afterwards, or let '
        'only other weights train, with TrainTask(trainable=…)'
    )
