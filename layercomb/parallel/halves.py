"""Float32 weights in two halves of 16 bits, so that the first can be sent without the second.

The first half of a number is the bfloat16 next to it, and the second holds its last 16 bits::

    bits + 2¹⁵ = 2¹⁶ high + rest        low = the last 16 of bits

From both, the number comes back bit for bit. So the narrow copy takes no memory of its own. The
second half travels as float32 words, two numbers in one: a cotangent is a float.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.trees import Tree

LOW = '_low_bits'  # the first half stands at a weight's path, and the second at path + LOW

_HALF = 16  # bits
_NAN = np.uint32(0x7FC00000)  # the bits of a NaN that is rounded to itself


def is_halved(x: Any, n_parts: int = 1) -> bool:
    """Whether an array can be in halves: float32 whose last axis has pairs.

    Args:
      x: an array or a `jax.ShapeDtypeStruct`.
      n_parts: how many parts of the last axis are to have pairs.
    """
    return x.dtype == jnp.float32 and len(x.shape) > 0 and x.shape[-1] % (2 * n_parts) == 0


def split(weights: Tree, paths: Iterable[str]) -> Tree:
    """Weights, some of them in halves; where there is no array, there are two times none.

    Args:
      weights: arrays, of JAX or NumPy, or None.
      paths: of those, others are left out.
    """
    flat = trees.flatten(weights)
    for path in [path for path in paths if path in flat]:
        x = flat[path]
        high, low = (None, None) if x is None else _halves(x)
        weights = trees.put(_with(weights, path, high), path + LOW, low)
    return weights


def joined(weights: Tree) -> Tree:
    """The inverse of `split`.

    Args:
      weights: of which some are in halves.
    """
    flat = trees.flatten(weights)
    for path in halved(weights):
        high, low = flat[path], flat[path + LOW]
        whole = None if high is None else _whole(high, low)
        weights = trees.drop(_with(weights, path, whole), path + LOW)
    return weights


def first(weights: Tree) -> Tree:
    """The first halves, and what is in no halves.

    Args:
      weights: of which some are in halves.
    """
    for path in halved(weights):
        weights = trees.drop(weights, path + LOW)
    return weights


def others(weights: Tree) -> Tree:
    """What is in no halves.

    Args:
      weights: of which some are in halves.
    """
    for path in halved(weights):
        weights = trees.drop(trees.drop(weights, path), path + LOW)
    return weights


def widened(weights: Tree, like: Tree) -> Tree:
    """First halves as float32, to compute with.

    Args:
      weights: of `first`.
      like: what those were of.
    """
    chosen = set(halved(like))

    def one(path: str, x: Any) -> Any:
        return x.astype(jnp.float32) if path in chosen else x

    return trees.map_with_path(one, weights)


def halved(weights: Tree) -> list[str]:
    """The paths of weights that are in halves.

    Args:
      weights: of which some are.
    """
    flat = trees.flatten(weights)
    return [path for path in flat if path + LOW in flat]


def _with(weights: Tree, path: str, value: Any) -> Tree:
    return trees.put(trees.drop(weights, path), path, value)


def _halves(x: Any) -> tuple[Any, Any]:
    bits = x.view(np.uint32)
    where: Any = np.where if isinstance(x, np.ndarray) else jnp.where
    bits = where(x != x, _NAN, bits)  # others would be rounded to 0
    high = ((bits + np.uint32(1 << _HALF - 1)) >> np.uint32(_HALF)).astype(np.uint16)
    return high.view(jnp.bfloat16), bits.astype(np.uint16).view(np.float32)


def _whole(high: Any, low: Any) -> Any:
    top, rest = (half.view(np.uint16).astype(np.uint32) for half in (high, low))
    top = top - (rest >> np.uint32(_HALF - 1))
    return ((top << np.uint32(_HALF)) | rest).view(np.float32)
