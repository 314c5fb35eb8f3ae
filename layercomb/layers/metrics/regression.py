"""Losses and metrics of numbers: outputs, targets and weights are all of one shape.

As in `metrics`, the loss is the weighted mean of the values; those of weight 0 do not count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layercomb.layers.metrics.metric import Metric, Shape
from layercomb.shapes import describe


class Elementwise(Metric):
    """A metric with a target for each entry of the outputs; subclasses write `compare`."""

    takes = 'outputs (…), targets (…) and weights (…), all of one shape'
    computes_in = ('apply', 'scores', 'values', 'compare')

    def targets_shape(self, outputs_shape: Shape) -> Shape:
        """That of the outputs."""
        return outputs_shape

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """A value for each pair of entries, float32."""
        raise NotImplementedError

    def values(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """`compare`, of targets in float32."""
        if jnp.issubdtype(targets.dtype, jnp.complexfloating):
            raise TypeError(f'{type(self).__name__} takes real targets, got {describe([targets])}')
        return self.compare(outputs, targets.astype(jnp.float32))

    def scores(
        self, outputs: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Both are 0 where the weight is, so that a missing target may be NaN there."""
        nothing = weights == 0
        outputs, targets = (jnp.where(nothing, jnp.zeros_like(x), x) for x in (outputs, targets))
        return super().scores(outputs, targets, weights)


class L2Loss(Elementwise):
    """(y − t)², the squared error, without a factor ½."""

    position_wise = True
    lower_is_better = True

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The squared error of each entry."""
        return jnp.square(outputs - targets)


class SmoothL1Loss(Elementwise):
    """½ (y − t)² where |y − t| < 1, and |y − t| − ½ elsewhere.

    References:
      Huber 1964; Girshick, Fast R-CNN, 2015, https://arxiv.org/abs/1504.08083
    """

    position_wise = True
    lower_is_better = True

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The smoothed distance of each entry."""
        distance = jnp.abs(outputs - targets)
        near = distance < 1
        # The square of an infinite distance must not meet the gradient, as 0 · ∞.
        square = jnp.square(jnp.where(near, distance, 0))
        return jnp.where(near, 0.5 * square, distance - 0.5)


class BinaryCrossEntropyLoss(Elementwise):
    """−t log σ(x) − (1 − t) log(1 − σ(x)), in nats, of logits x and targets t.

    Outputs are logits, any number, ±∞ too; it is computed by log(1 + eˣ), which is exact for large
    ones. Targets are 0 or 1, or probabilities between, of any numeric dtype. One outside of 0 … 1
    gives NaN, never a silent number.
    """

    position_wise = True
    lower_is_better = True

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross entropy of each entry."""
        # What is multiplied by 0 is finite, or 0 · ∞ would be NaN.
        if_1 = targets * jax.nn.softplus(-jnp.where(targets == 0, 0, outputs))
        if_0 = (1 - targets) * jax.nn.softplus(jnp.where(targets == 1, 0, outputs))
        return jnp.where(is_rate(targets), if_1 + if_0, jnp.nan)


class BinaryAccuracy(Elementwise):
    """How often a logit is above 0 where the target is 1, and is not above 0 where it is 0.

    A target between 0 and 1 counts as 1 if it is above ½, else as 0; one outside gives NaN.
    """

    position_wise = True
    has_gradient = False
    lower_is_better = False

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """1 where right, 0 where wrong."""
        right = (outputs > 0) == (targets > 0.5)
        return jnp.where(is_rate(targets), right.astype(jnp.float32), jnp.nan)


def is_rate(targets: jax.Array) -> jax.Array:
    """Where targets, of any shape, lie in 0 … 1: boolean."""
    return (targets >= 0) & (targets <= 1)
