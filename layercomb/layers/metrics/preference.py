"""Losses and metrics of pairs of answers, of which one is preferred to the other.

The rows of a batch take turns, preferred and rejected: rows 2i and 2i + 1 answer one prompt. Of a
row y, the metrics take what the model gains on a reference, in nats::

    r(y) = Σ_t w_t log π(y_t | y_<t) − Σ_t w_t log π_ref(y_t | y_<t)

over the positions of loss weight w_t, which is 0 in the prompt and in padding. With
`length_normalized`, both sums are divided by Σ_t w_t. Of a pair (c, d) of preferred and rejected,
h = r(c) − r(d).

Targets are (2B, L, 2) int32: at each position the token, and the bits of a float32, of which the
weighted sum over the row is the row's log-likelihood under the reference (a Loop fills in the
mean). A value of a position is log π(y_t) less that number, so pieces of the sequence can be taken
one at a time (`loss_chunk_len`), and logits (2B, L, V) never exist; `sums` then makes pairs of
whole rows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Positive
from layercomb.layers.metrics.classification import cross_entropy
from layercomb.layers.metrics.metric import Metric, Shape, weighted_sum


class Preference(Metric):
    """A mean over pairs of rows; subclasses write `of_pairs`, a number from each pair's h.

    See `PreferenceLoss` for what a batch holds.

    Attributes:
      length_normalized: whether a row's log-likelihood is the mean over its answer, Σ w log π /
        Σ w, instead of the sum.
    """

    position_wise = True
    together = 2
    takes = 'logits (2B, L, V), targets (2B, L, 2) int32 and weights (2B, L)'

    length_normalized: bool = False

    def of_pairs(self, h: jax.Array) -> jax.Array:
        """A number for each pair.

        Args:
          h: (B,) float32, how much more the model gains on the reference at the preferred answer
            than at the rejected one, in nats.
        """
        raise NotImplementedError

    def targets_shape(self, outputs_shape: Shape) -> Shape:
        """(2B, L, 2) beside logits (2B, L, V)."""
        return (*outputs_shape[:-1], 2)

    def check(self, outputs: Any, targets: Any, weights: Any) -> None:
        """Raises a ValueError or TypeError unless the arrays are those of pairs."""
        shape, owner = tuple(outputs.shape), type(self).__name__
        got = tuple(targets.shape), tuple(weights.shape)
        right = len(shape) > 1 and got == (self.targets_shape(shape), shape[:-1])
        if not right:
            raise ValueError(
                f'{owner} takes {self.takes}, got {shape}, {got[0]} and {got[1]}: make the batches '
                'by data.preference_batches'
            )
        if targets.dtype != jnp.int32:
            raise TypeError(
                f'{owner}: targets hold the bits of a float32 beside each token, and must be '
                f'int32, got {targets.dtype}: make the batches by data.preference_batches'
            )

    def scores(
        self, outputs: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """log π(y_t), less the reference's share, of each position."""
        reference = jax.lax.bitcast_convert_type(targets[..., 1], jnp.float32)
        return -cross_entropy(outputs, targets[..., 0]) - reference, weights

    def sums(self, values: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        """Σ over pairs, and how many there are; a pair with a row without weights is none.

        Args:
          values: (2B, L) float32, of positions, from `scores`.
          weights: (2B, L) float32.

        Raises:
          ValueError: for an odd number of rows.
        """
        if values.shape[0] % 2:
            raise ValueError(
                f'{type(self).__name__} takes pairs of rows, preferred and rejected in turn, got '
                f'{values.shape[0]} rows: make the batches by data.preference_batches'
            )
        axes = tuple(range(1, values.ndim))
        gains = jnp.sum(jnp.where(weights == 0, 0, values * weights), axes)  # (2B,)
        lengths = jnp.sum(weights, axes)
        if self.length_normalized:
            gains = gains / jnp.where(lengths == 0, 1, lengths)
        counts = (lengths[0::2] != 0) & (lengths[1::2] != 0)  # (B,)
        return weighted_sum(self.of_pairs(gains[0::2] - gains[1::2]), counts.astype(jnp.float32))


class PreferenceLoss(Preference):
    """The loss of DPO: −log σ(β h), in nats a pair.

    With a pair's h as above, log-likelihoods of the preferred less those of the rejected answer,
    each less the reference's::

        h    = (log π(c|x) − log π_ref(c|x)) − (log π(d|x) − log π_ref(d|x))
        loss = −(1 − ε) log σ(β h) − ε log σ(−β h)      kind='sigmoid'
        loss = (h − 1 / (2 β))²                          kind='ipo'

    A batch is (inputs, targets, loss_weights) of `data.preference_batches`: (2B, L) int32,
    (2B, L, 2) int32 and (2B, L) float32, preferred and rejected rows in turn, whose weights are 1
    in answers and 0 elsewhere. If model and reference are one, the loss is log 2. The mean is over
    pairs, and a pair counts 1 however long it is.

    Attributes:
      length_normalized: whether log-likelihoods are means over the answer's tokens instead of sums.
      beta: β, above 0; the lower, the further the model may go from the reference.
      label_smoothing: ε of conservative DPO, how often a label is thought to be wrong, below ½.
      kind: 'sigmoid', or 'ipo' for a loss that ends at h = 1 / (2 β).

    Raises:
      ValueError: for `label_smoothing` with 'ipo', which has none.

    References:
      Rafailov et al., Direct Preference Optimization, 2023, https://arxiv.org/abs/2305.18290
      Mitchell, A note on DPO with noisy preferences (cDPO), 2023,
        https://ericmitchell.ai/cdpo.pdf
      Azar et al., IPO, 2023, https://arxiv.org/abs/2310.12036
    """

    lower_is_better = True

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Bound(0, 0.5)] = 0.0
    kind: Literal['sigmoid', 'ipo'] = 'sigmoid'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == 'ipo' and self.label_smoothing:
            raise ValueError(
                "PreferenceLoss: kind='ipo' has no label_smoothing: leave it out, or take "
                "kind='sigmoid'"
            )

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or 'loss'

    def of_pairs(self, h: jax.Array) -> jax.Array:
        """The loss of each pair."""
        if self.kind == 'ipo':
            return jnp.square(h - 1 / (2 * self.beta))
        loss = -jax.nn.log_sigmoid(self.beta * h)
        if self.label_smoothing:
            wrong = -jax.nn.log_sigmoid(-self.beta * h)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * wrong
        return loss


class PreferenceAccuracy(Preference):
    """How often h > 0: the preferred answer gained more; 1 or 0 a pair, ½ if h = 0.

    A model that is the reference still has ½, up to rounding.
    """

    has_gradient = False
    lower_is_better = False

    def of_pairs(self, h: jax.Array) -> jax.Array:
        """1, 0 or ½."""
        return (1 + jnp.sign(h)) / 2


class RewardMargin(Preference):
    """β h, the mean over pairs: how much more reward the preferred answer has, in nats.

    Attributes:
      length_normalized: as of `PreferenceLoss`.
      beta: β of the loss.
    """

    has_gradient = False
    lower_is_better = False

    beta: Positive = 0.1

    def of_pairs(self, h: jax.Array) -> jax.Array:
        """β h."""
        return self.beta * h
