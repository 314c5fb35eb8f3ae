"""Losses and metrics of logits and classes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Rate
from layercomb.layers.metrics.metric import Metric, cure_of_targets
from layercomb.shapes import as_deep, describe


class CrossEntropyLoss(Metric):
    """−log softmax(logits)[target], in nats.

    A target outside the vocabulary gives NaN, never a silent zero.

    Attributes:
      label_smoothing: ε; the target's probability is 1 − ε, and ε is spread over all V evenly.
    """

    lower_is_better = True

    label_smoothing: Rate = 0.0

    position_wise = True

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

    position_wise = True
    lower_is_better = True

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

    lower_is_better = True

    bytes_per_token: float = 1.0

    position_wise = True

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross entropy of each position."""
        return cross_entropy(logits, targets)

    def finish(self, mean: float) -> float:
        """In bits, a byte."""
        return mean / math.log(2) / self.bytes_per_token


class Accuracy(Metric):
    """How often the largest logit is the target's: 1 or 0 for each target."""

    position_wise = True
    has_gradient = False
    lower_is_better = False

    def values(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """1 where right, 0 where wrong."""
        check_targets(targets)
        # Integers of one type, since that of argmax is what JAX is set to.
        found, targets = (y.astype(jnp.int32) for y in (jnp.argmax(logits, -1), targets))
        return (found == targets).astype(jnp.float32)


class SequenceAccuracy(Metric):
    """How often a whole sequence is right: (B, L, V), (B, L), (B, L) → (B,), (B,).

    A sequence is right if the largest logit is the target's at every position whose weight is not
    0. Its own weight is 1, whatever those weights are; it is 0 if they are all 0.
    """

    position_wise = False
    has_gradient = False
    lower_is_better = False

    def scores(
        self, outputs: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """1 or 0 for each sequence, and 1 or 0 for whether it counts."""
        if not targets.shape:
            raise ValueError(
                f'{type(self).__name__} takes a batch of sequences, got one target: add the axes '
                '(B, L)'
            )
        check_targets(targets)
        axes = tuple(range(1, len(targets.shape)))
        counts = weights != 0
        found, targets = (y.astype(jnp.int32) for y in (jnp.argmax(outputs, -1), targets))
        right = (found == targets) | ~counts
        return jnp.all(right, axes), jnp.any(counts, axes)


class MaskedSequenceAccuracy(SequenceAccuracy):
    """The same as `SequenceAccuracy`, by Trax's other name."""


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log Σ exp(logits) − logits[target].

    Args:
      logits: (…, V) float32.
      targets: (…) integers below V.

    Returns:
      (…) float32; NaN where the target is outside the vocabulary.

    Raises:
      TypeError: if the targets are no integers.
      ValueError: if the shapes are not those; nothing is broadcast.
    """
    check_targets(targets)
    shape, got = jnp.shape(logits), jnp.shape(targets)
    if not shape or shape[:-1] != got:
        raise ValueError(
            f'cross_entropy takes logits (…, V) and targets (…), got {shape} and {got}: '
            f'{cure_of_targets(targets, shape, shape[:-1])}'
        )
    targets = targets.astype(jnp.int32)  # bytes, uint8, cannot hold a vocabulary's size
    picked = _picked(logits, targets)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    return jnp.where(inside, jax.nn.logsumexp(logits, -1) - picked, jnp.nan)


@jax.custom_jvp
def _picked(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits[target], (…, V) → (…); any value where the target is outside the vocabulary.

    A gather on a CPU, where a comparison takes as long as the exponentials. Elsewhere a comparison,
    which devices that share the vocabulary can compute apart.
    """
    if jax.default_backend() != 'cpu':
        return _compared(logits, targets)
    return jnp.take_along_axis(logits, targets[..., None], -1, mode='clip')[..., 0]


@_picked.defjvp
def _picked_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By comparison: its gradient is elementwise, where a gather's is a scatter."""
    return _picked(*primals), _compared(tangents[0], primals[1])


def _compared(logits: jax.Array, targets: jax.Array) -> jax.Array:
    ids = as_deep(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0), -1)


def check_targets(targets: jax.Array) -> None:
    """Raises a TypeError unless targets are integers."""
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f'targets must be integers, got {describe([targets])}: a batch is '
            '(inputs…, targets, loss_weights)'
        )
