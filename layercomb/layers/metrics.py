"""Losses and metrics: layers from (logits, targets, weights) to values and weights a position.

Each gives two outputs of the targets' shape, a value and a weight, both float32. The metric is the
weighted mean of the values (`weighted_mean`), passed through `Metric.finish`; padding has weight 0.
Logits are (…, V), targets (…) integers, weights (…).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from layercomb.layers.base import Layer, Mode, snake_case
from layercomb.layers.fields import Rate
from layercomb.shapes import as_deep, describe


class Metric(Layer):
    """(logits, targets, weights) → (values, weights); subclasses write `values`."""

    n_in = 3
    n_out = 2
    float32 = True

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or snake_case(type(self).__name__)

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """A value for each position."""
        raise NotImplementedError

    def finish(self, mean: float) -> float:
        """The metric, of the weighted mean of its values."""
        return mean

    def init(self, signature, rng, mode=Mode.TRAIN):
        logits, targets, weights = signature
        if logits.shape[:-1] != targets.shape or targets.shape != weights.shape:
            raise ValueError(
                f'{type(self).__name__} takes logits (…, V), targets (…) and weights (…), got '
                f'{tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(weights.shape)}'
            )
        return {}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        logits, targets, loss_weights = inputs
        values = self.values(logits.astype(jnp.float32), targets)
        return (values, loss_weights.astype(jnp.float32)), state


class CrossEntropyLoss(Metric):
    """−log softmax(logits)[target], in nats.

    A target outside the vocabulary gives NaN, never a silent zero.

    Attributes:
      label_smoothing: ε; the target's probability is 1 − ε, and ε is spread over all V evenly.
    """

    label_smoothing: Rate = 0.0

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or 'loss'

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross entropy of each position."""
        loss = cross_entropy(logits, targets)
        if self.label_smoothing:
            spread = jax.nn.logsumexp(logits, -1) - logits.mean(-1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * spread
        return loss


class Perplexity(Metric):
    """e to the mean cross entropy."""

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross entropy of each position."""
        return cross_entropy(logits, targets)

    def finish(self, mean: float) -> float:
        """Its exponential."""
        return math.exp(min(mean, 700.0))


class BitsPerByte(Metric):
    """The mean cross entropy in bits, per byte of text.

    Attributes:
      bytes_per_token: 1 where a token is a byte; else the mean over the data.
    """

    bytes_per_token: float = 1.0

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross entropy of each position."""
        return cross_entropy(logits, targets)

    def finish(self, mean: float) -> float:
        """In bits, a byte."""
        return mean / math.log(2) / self.bytes_per_token


class Accuracy(Metric):
    """How often the largest logit is the target's."""

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """1 where right, 0 where wrong."""
        check_targets(targets)
        # Integers of one type, since that of argmax is what JAX is set to.
        found, targets = (y.astype(jnp.int32) for y in (jnp.argmax(logits, -1), targets))
        return (found == targets).astype(jnp.float32)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log Σ exp(logits) − logits[target].

    Args:
      logits: (…, V) float32.
      targets: (…) integers below V.

    Returns:
      (…) float32; NaN where the target is outside the vocabulary.

    Raises:
      TypeError: if the targets are no integers.
    """
    check_targets(targets)
    # A comparison instead of a gather: its gradient is elementwise, where a gather's is a scatter.
    targets = targets.astype(jnp.int32)  # bytes, uint8, cannot hold a vocabulary's size
    ids = as_deep(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0), -1)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    return jnp.where(inside, jax.nn.logsumexp(logits, -1) - picked, jnp.nan)


def check_targets(targets: jax.Array) -> None:
    """Raises a TypeError unless targets are integers."""
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f'targets must be integers, got {describe([targets])}: a batch is '
            '(inputs…, targets, loss_weights)'
        )


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ wv / Σ w, over the positions whose weight is not 0; 0 where there is none."""
    total, weight = weighted_sum(values, weights)
    return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


def weighted_sum(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ wv and Σ w; what has weight 0 adds nothing, not even a NaN."""
    return jnp.sum(jnp.where(weights == 0, 0, values * weights)), jnp.sum(weights)
