"""`Flatten` and `Mean`: reduce the number of axes."""

from __future__ import annotations

import math

import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import check_axis, check_mask
from layercomb.trees import Tree


class Flatten(Layer):
    """Joins all axes from `first_axis` on into one: (B, H, W, C) → (B, H·W·C).

    Attributes:
      first_axis: the first axis to join, at least 1.

    Raises:
      ValueError: when applied to an input without that axis.
    """

    first_axis: Size = 1

    position_wise = property(lambda self: self.first_axis != 1)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(B, H, W, C) → (B, H·W·C), or as `first_axis` says."""
        (x,) = inputs
        if self.first_axis >= len(x.shape):
            n = len(x.shape)
            lower = f'give first_axis below {n}, or ' if n > 1 else 'give '
            raise ValueError(
                f'Flatten: there is no axis {self.first_axis} to join with those after it in the '
                f'shape {tuple(x.shape)}: {lower}x[...{", None" * (self.first_axis + 1 - n)}]'
            )
        return (
            x.reshape(*x.shape[: self.first_axis], math.prod(x.shape[self.first_axis :])),
        ), state


class Mean(Layer):
    """The mean over `axis`, by default of positions: (B, L, …) → (B, …).

    With `masked`, a second input (B, L) boolean says which positions are real: y = Σ m x / Σ m. A
    row without real positions gives zeros.

    Attributes:
      axis: the axis that is averaged and removed.
      masked: whether to take a mask; the axis is then 1.

    Raises:
      ValueError: for a mask with another axis; when applied to an input without the axis, or a mask
        that is not boolean (B, L).
    """

    axis: int = 1
    masked: bool = False

    position_wise = False
    float32 = True
    n_in = property(lambda self: 1 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked and self.axis != 1:
            raise ValueError(f'Mean: a mask (B, L) runs along axis 1, got axis={self.axis}')

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """x (B, L, …), and a mask (B, L) if `masked` → (B, …)."""
        x = inputs[0]
        check_axis('Mean', x, self.axis)
        if not self.masked:
            return (x.mean(self.axis),), state
        check_mask(inputs[1], tuple(x.shape[:2]))
        real = inputs[1].astype(x.dtype)  # (B, L)
        total = jnp.einsum('bl...,bl->b...', x, real)
        count = jnp.maximum(real.sum(1), 1)
        return (total / count.reshape(-1, *[1] * (total.ndim - 1)),), state
