"""Batches of preferences: rows take turns, preferred and rejected."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data import checks, pipelines
from layercomb.data.checks import Seed, Shard, Source
from layercomb.data.judged.preferences import with_reference
from layercomb.data.packing import Arrays
from layercomb.data.sources import Mapped


@dataclasses.dataclass(frozen=True, eq=False)
class Referred(Sequence[Arrays]):
    """Pairs with the log-likelihoods of a reference.

    Attributes:
      source: pairs, see `preferences`.
      reference: (N, 2) float32, of the preferred and the rejected answer of each, in nats.
    """

    source: Sequence[Arrays]
    reference: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(range(len(self))[index], self.__getitem__)
        inputs, targets, weights = self.source[index]
        return inputs, with_reference(targets, weights, self.reference[index]), weights


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceBatches:
    """What `preference_batches` returns: an iterable of batches, as a task takes it.

    Attributes:
      source: the pairs.
      options: further arguments of `data.batches`, by name.
    """

    source: Sequence[Arrays]
    options: dict[str, Any]

    def __iter__(self) -> Any:
        return iter(self._dataset)

    @property
    def parents(self) -> tuple[Any, ...]:
        """The Grain data set, which knows what identifies it."""
        return (self._dataset,)

    @cached_property
    def _dataset(self) -> Any:
        return pipelines.batches(self.source, **self.options).map(_in_turn)

    def referred(self, reference: np.ndarray) -> PreferenceBatches:
        """The same batches with log-likelihoods of the reference.

        Args:
          reference: (N, 2) float32, see `Referred`.
        """
        return dataclasses.replace(self, source=Referred(self.source, reference))


@checked
def preference_batches(
    source: Source[Arrays],
    batch_size: Size,
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    shard: Shard | None = None,
) -> PreferenceBatches:
    """Returns batches of pairs, for a task whose loss is `tl.PreferenceLoss`.

    The rows of a batch take turns, preferred and rejected, so it has twice as many as pairs. The
    Loop fills in the log-likelihoods of the reference, the model that it starts from; until then
    they are NaN.

    Args:
      source: of `data.preferences`, or a part of it.
      batch_size: B, pairs in a batch; with `shard`, on this host.
      seed, shuffle, num_epochs, shard: as for `data.batches`.

    Returns:
      An iterable of (inputs, targets, loss_weights): (2B, L) int32, (2B, L, 2) int32 and (2B, L)
      float32. Its iterators can be stopped and resumed, as those of `data.batches`.

    Raises:
      TypeError, ValueError: if an argument has the wrong type or range, or the source is empty or
        holds something else.
      UsageError: if Grain is not installed.
    """
    first: Any = checks.source('preference_batches', source)[0]
    shapes = [np.shape(x) for x in first] if isinstance(first, tuple) else []
    if len(shapes) != 3 or shapes[1] != (*shapes[0], 2) or shapes[0][:1] != (2,):
        raise TypeError(
            f'preference_batches takes the pairs of data.preferences, and the source holds '
            f'{type(first).__name__} of {shapes}: give those'
        )
    options: dict[str, Any] = {'batch_size': batch_size, 'seed': seed, 'shuffle': shuffle}
    return PreferenceBatches(
        cast(Any, source), {**options, 'num_epochs': num_epochs, 'shard': shard}
    )


def _in_turn(batch: Arrays) -> Arrays:
    """(B, 2, …) → (2B, …), row after row."""
    return tuple(x.reshape(-1, *x.shape[2:]) for x in batch)
