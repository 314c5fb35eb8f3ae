"""Batches in order, from a place that can be written down and gone back to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from layercomb.errors import UsageError, one_line

Batch = tuple[Any, ...]


def check_data(owner: str, data: Any) -> None:
    """Raises a TypeError unless `data` can be gone through again and again."""
    if isinstance(data, Iterator) or not hasattr(data, '__iter__'):
        kind = type(data).__name__
        raise TypeError(
            f'{owner}: data must be iterable more than once, and {kind} is not: give a Grain '
            'dataset, a list of batches, or an object whose __iter__ starts anew'
        )


def check_loss_weights(batch: Batch, where: str) -> None:
    """Raises a UsageError if a loss weight is negative: a mean has no such weights.

    What is not finite shows in the loss, and is left to those who look at that.

    Args:
      batch: whose last array is the loss weights.
      where: how to call the batch.
    """
    weights = np.asarray(batch[-1])
    least = weights.min() if weights.size else 0
    if -np.inf < least < 0:
        raise UsageError(
            f'{where}: a loss weight is {least}: it says how much a position counts in the mean, '
            'so give 0 for padding and positive numbers elsewhere; a sign belongs into a loss of '
            'your own'
        )


@contextlib.contextmanager
def made(what: str) -> Iterator[None]:
    """Blames the data for what making a batch of it raises.

    Args:
      what: how to call the batch.

    Raises:
      UsageError: for a TypeError or ValueError, of an element that is not like the others.
    """
    try:
        yield
    except (TypeError, ValueError) as e:
        raise UsageError(f'{what}: {one_line(e)}') from e


@contextlib.contextmanager
def shaped_unlike(first: Batch, batch: Batch, where: str) -> Iterator[None]:
    """Blames the data where a model that took the first batch refuses one of another shape.

    Args:
      first: a batch that the model takes.
      batch: the one it is given.
      where: how to call that one.

    Raises:
      UsageError: for a ValueError, if the shapes differ.
    """
    try:
        yield
    except ValueError as e:
        if [x.shape for x in batch] == [x.shape for x in first]:
            raise
        cause = str(e).strip().splitlines()[0]
        raise UsageError(
            f'{where} has shape {batch[0].shape}, the first one {first[0].shape}, and does not fit '
            f'the model: {cause}'
        ) from e


class Batches:
    """An iterator over batches that knows its position.

    An iterator with `get_state` and `set_state`, such as Grain's, is asked for its own. Any other
    is gone through again from the start, so its batches must come out the same each time.

    Args:
      data: an iterable of tuples of arrays.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        self._iterator: Any = iter(data)
        self._peeked: Batch | None = None
        self.taken = 0

    def peek(self) -> Batch:
        """The next batch, which stays the next."""
        if self._peeked is None:
            self._peeked = self._next()
        return self._peeked

    def take(self) -> Batch:
        """The next batch."""
        batch, self._peeked = self.peek(), None
        self.taken += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Where `take` stands, as JSON can hold it."""
        if self._peeked is not None:
            raise RuntimeError('a batch was peeked at: the iterator stands one further than `take`')
        state = self._iterator.get_state() if hasattr(self._iterator, 'get_state') else None
        if isinstance(state, bytes):
            state = {'utf8': state.decode()}
        return {'taken': self.taken, 'state': state}

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes to a position of an equal data set; nothing may have been taken yet.

        Raises:
          UsageError: if it is a position in data of another kind.
        """
        state = position['state']
        if (state is None) == hasattr(self._iterator, 'get_state'):
            raise UsageError(
                'the checkpoint was made with data of another kind: continue with the same data, '
                'or choose another output_dir'
            )
        if state is None:
            for _ in range(position['taken']):
                self.take()
        else:
            self._iterator.set_state(state['utf8'].encode() if 'utf8' in state else state)
            self._peeked = None
        self.taken = position['taken']

    def _next(self) -> Batch:
        try:
            with made(f'batch {self.taken + 1} of the data'):
                batch = next(self._iterator)
        except StopIteration:
            raise UsageError(
                f'the data ended after {self.taken} batches: repeat it (num_epochs=None, or '
                'dataset.repeat()), or ask for fewer steps'
            ) from None
        if not isinstance(batch, (tuple, list)) or not all(hasattr(x, 'shape') for x in batch):
            raise TypeError(
                'data must yield tuples of arrays (inputs…, targets, loss_weights), got '
                f'{type(batch).__name__}'
            )
        return tuple(batch)
