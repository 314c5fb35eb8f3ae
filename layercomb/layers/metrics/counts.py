"""Metrics that are no means: functions of the confusion matrix over all data.

A position's value is its cell of the confusion matrix, ``n · target + found``, and `sums` adds the
weights of each cell. So positions may come in slices (`loss_chunk_len`), as those of a mean. Counts
are exact up to 2²⁴ positions a batch, and are added over batches in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound
from layercomb.layers.metrics.classification import check_targets
from layercomb.layers.metrics.metric import Metric
from layercomb.layers.metrics.regression import Elementwise, is_rate

# A float32 holds the number of a cell, below n², exactly.
Classes = Annotated[int, Bound(2, 4097)]


class Counts(Metric):
    """A metric of the confusion matrix of `n_classes` classes; subclasses write `of_counts`.

    The found class is that of the largest logit. A target that is no class makes the counts NaN,
    so that an evaluation is refused.

    Attributes:
      n_classes: of targets, and of logits, at most 4096.
    """

    has_gradient = False
    position_wise = True  # each position has its own cell
    spans_devices = True

    n_classes: Classes

    def of_counts(self, counts: np.ndarray) -> Any:
        """The metric, from summed weights by target (row) and found class, float64 (n, n)."""
        raise NotImplementedError

    def check(self, outputs: Any, targets: Any, weights: Any) -> None:
        """Raises, too, unless there is a logit for each class."""
        super().check(outputs, targets, weights)
        if outputs.shape[-1] != self.n_classes:
            raise ValueError(
                f'{type(self).__name__} is of n_classes={self.n_classes}, got '
                f'{outputs.shape[-1]} logits: give n_classes={outputs.shape[-1]}'
            )

    def values(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The cell of each position, NaN where the target is no class."""
        check_targets(targets)
        found, targets = (y.astype(jnp.int32) for y in (jnp.argmax(outputs, -1), targets))
        inside = (targets >= 0) & (targets < self.n_classes)
        return jnp.where(inside, (self.n_classes * targets + found).astype(jnp.float32), jnp.nan)

    def sums(self, values: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        """The summed weights of each cell: float32 (n, n)."""
        return (count_cells(values, weights, self.n_classes),)

    def total(self, sums: Sequence[Any]) -> Any:
        """`of_counts` of the summed counts, float64 (n, n)."""
        return self.of_counts(np.asarray(sums[0], np.float64))


class ConfusionMatrix(Counts):
    """How often each class (rows) was taken for each (columns), as summed weights: n lists of n."""

    def of_counts(self, counts: np.ndarray) -> Any:
        """Lists of the counts."""
        return counts.tolist()


class F1(Counts):
    """2 · TP / (2 · TP + FP + FN) of a class: the harmonic mean of precision and recall.

    Attributes:
      n_classes: of targets, and of logits, at most 4096.
      average: 'macro', the mean over classes, where one that is neither a target nor found
        anywhere is left out; or 'binary', of class 1 of two, 0 if it is neither.
    """

    lower_is_better = False

    average: Literal['macro', 'binary'] = 'macro'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average == 'binary' and self.n_classes != 2:
            raise ValueError(
                f"F1: average='binary' is of 2 classes, got n_classes={self.n_classes}: give "
                "average='macro'"
            )

    def of_counts(self, counts: np.ndarray) -> float:
        """The score of class 1, or the mean over classes."""
        scores = f1_scores(counts)
        if self.average == 'binary':
            return float(np.nan_to_num(scores[1]))
        return float(np.nanmean(scores))


class BinaryF1(Elementwise):
    """`F1` of entries with one logit each: found is what is above 0, and targets are 0 or 1.

    A target between 0 and 1 counts as 1 if it is above ½, else as 0; one outside makes the counts
    NaN, so that an evaluation is refused. The score is 0 if no entry is 1 or was found to be.
    """

    has_gradient = False
    lower_is_better = False
    position_wise = True
    spans_devices = True

    def compare(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The cell of each entry: 2 · target + found."""
        target, found = ((x > at).astype(jnp.float32) for x, at in ((targets, 0.5), (outputs, 0)))
        return jnp.where(is_rate(targets), 2 * target + found, jnp.nan)

    def sums(self, values: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        """The summed weights of each cell: float32 (2, 2)."""
        return (count_cells(values, weights, 2),)

    def total(self, sums: Sequence[Any]) -> float:
        """The score of what is 1."""
        return float(np.nan_to_num(f1_scores(np.asarray(sums[0], np.float64))[1]))


def count_cells(cells: jax.Array, weights: jax.Array, n: int) -> jax.Array:
    """The summed weights of each of n² cells.

    Args:
      cells: (…) float32, whole numbers below n², or NaN.
      weights: (…) float32; what has weight 0 counts nowhere, not even a NaN.
      n: the number of classes.

    Returns:
      float32 (n, n); its first entry is NaN if a cell that counts is.
    """
    strange = jnp.isnan(cells)
    counted = jnp.where(strange & (weights != 0), jnp.nan, weights)
    numbers = jnp.where(strange, 0, cells).astype(jnp.int32)
    flat = jnp.zeros(n * n, jnp.float32).at[numbers.ravel()].add(counted.ravel())
    return flat.reshape(n, n)


def f1_scores(counts: np.ndarray) -> np.ndarray:
    """F1 of each class, (n,), of counts (n, n) by target and found class; NaN where there is none.

    >>> f1_scores(np.array([[3.0, 1.0], [1.0, 1.0]])).tolist()
    [0.75, 0.5]
    """
    right, either = np.diagonal(counts), counts.sum(0) + counts.sum(1)
    return np.divide(2 * right, either, out=np.full(len(counts), np.nan), where=either > 0)
