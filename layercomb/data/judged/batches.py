"""Batches of preferences: rows take turns, preferred and rejected."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data import pipelines
from layercomb.data.checks import Seed, Shard
from layercomb.data.judged.preferences import Preferences
from layercomb.data.packing import Arrays


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceBatches:
    """What `preference_batches` returns: an iterable of batches, as a task takes it.

    Attributes:
      source: the pairs.
      options: further arguments of `data.batches`, by name.
    """

    source: Preferences
    options: dict[str, Any]

    def __iter__(self) -> Any:
        return iter(self._dataset)

    @property
    def parents(self) -> tuple[Any, ...]:
        """The Grain data set, which knows what identifies it."""
        return (self._dataset,)

    @cached_property
    def _dataset(self) -> Any:
        return pipelines.batches(self.source, **self.options).map(in_turn)

    def referred(self, reference: np.ndarray) -> PreferenceBatches:
        """The same batches with log-likelihoods of the reference.

        Args:
          reference: (N, 2) float32, see `Preferences`.
        """
        source = dataclasses.replace(self.source, reference=reference)
        return dataclasses.replace(self, source=source)


@checked
def preference_batches(
    source: Preferences,
    batch_size: Size,
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    shard: Shard = (0, 1),
) -> PreferenceBatches:
    """Returns batches of pairs, for a task whose loss is `tl.PreferenceLoss`.

    The rows of a batch take turns, preferred and rejected, so it has twice as many as pairs. The
    Loop fills in the log-likelihoods of the reference, the model that it starts from; until then
    they are NaN.

    Args:
      source: of `data.preferences`.
      batch_size: B, pairs in a batch, on this host.
      seed, shuffle, num_epochs, shard: as for `data.batches`.

    Returns:
      An iterable of (inputs, targets, loss_weights): (2B, L) int32, (2B, L, 2) int32 and (2B, L)
      float32. Its iterators can be stopped and resumed, as those of `data.batches`.

    Raises:
      TypeError, ValueError: if an argument has the wrong type or range.
      UsageError: if Grain is not installed.
    """
    options = {'batch_size': batch_size, 'seed': seed, 'shuffle': shuffle}
    return PreferenceBatches(source, {**options, 'num_epochs': num_epochs, 'shard': shard})


def in_turn(batch: Arrays) -> Arrays:
    """(B, 2, …) → (2B, …), row after row."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in batch)
