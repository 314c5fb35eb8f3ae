"""`MaxPool` and `AvgPool`."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Size
from layercomb.layers.basic.convolution import (
    check_padding,
    check_window,
)
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import Signature, check_float, check_rank
from layercomb.trees import Tree


class Pool(Layer):
    """A reduction over windows of height and width: (B, H, W, D) → (B, H', W', D)."""

    window: tuple[Size, Size] = (2, 2)
    strides: tuple[Size, Size] | None = None
    padding: str = 'valid'

    position_wise = False
    start: ClassVar[float]
    combine: ClassVar[Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_padding(type(self).__name__, self.padding)

    def reduce(self, x: jax.Array) -> jax.Array:
        """Combines the entries of each window."""
        check_window(type(self).__name__, self.window, x, self.padding)
        return jax.lax.reduce_window(
            x,
            np.asarray(self.start, x.dtype),  # jnp's would be traced, and lose the gradient
            self.combine,
            (1, *self.window, 1),
            (1, *(self.strides or self.window), 1),
            self.padding.upper(),
        )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        (x,) = signature
        check_rank(type(self).__name__, x, '(batch, height, width, channels)', 4)
        check_float(type(self).__name__, x)
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        (x,) = inputs
        return (self.reduce(x),), state


class MaxPool(Pool):
    """The largest entry of each window."""

    start = -jnp.inf
    combine = staticmethod(jax.lax.max)


class AvgPool(Pool):
    """The mean of each window; what lies in the padding does not count."""

    position_wise = False
    start = 0.0
    combine = staticmethod(jax.lax.add)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        (x,) = inputs
        return (self.reduce(x) / self.reduce(jnp.ones_like(x)),), state
