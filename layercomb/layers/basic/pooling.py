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
    """A reduction over windows of height and width: (B, H, W, D) → (B, H', W', D), in x's dtype.

    Attributes:
      window: height and width.
      strides: along height and width; None takes the window's size.
      padding: 'same' or 'valid'.

    Raises:
      TypeError: for integers.
      ValueError: for another padding or rank; for an input smaller than the window, if 'valid'.
    """

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
        """Combines the entries of each window: (B, H, W, D) → (B, H', W', D)."""
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
        """No weights and no state; checks that the input is floating-point (B, H, W, D)."""
        (x,) = signature
        check_rank(type(self).__name__, x, '(batch, height, width, channels)', 4)
        check_float(type(self).__name__, x)
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(B, H, W, D) → (B, H', W', D)."""
        (x,) = inputs
        return (self.reduce(x),), state


class MaxPool(Pool):
    """The largest entry of each window."""

    start = -jnp.inf
    combine = staticmethod(jax.lax.max)


class AvgPool(Pool):
    """The mean of each window; padding does not count."""

    position_wise = False
    start = 0.0
    combine = staticmethod(jax.lax.add)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(B, H, W, D) → (B, H', W', D), the sum over each window by its number of entries."""
        (x,) = inputs
        return (self.reduce(x) / self.reduce(jnp.ones_like(x)),), state
