"""Batches in order, with a position that can be saved and restored."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from layercomb.errors import UsageError, one_line
from layercomb.shapes import describe

Batch = tuple[Any, ...]

# Keys of the states of this library's pipelines: they count examples, not batches.
_COUNTS_EXAMPLES = {'examples', 'document', 'waiting'}
# Data sets that end where their parents end.
_AS_LONG = {
    'BatchIterDataset',
    'Buckets',
    'Examples',
    'FilterIterDataset',
    'MapIterDataset',
    'MapWithIndexIterDataset',
    'PackedDocuments',
    'PreferenceBatches',
    'PrefetchIterDataset',
    'RandomMapIterDataset',
}
_ENDLESS = 1 << 60  # Grain's length of what is repeated for ever is near the greatest integer


def check_data(owner: str, data: Any) -> None:
    """Raises a TypeError unless `data` can be iterated over more than once.

    Args:
      owner: who was given the data, for messages.
      data: the value to check.
    """
    if isinstance(data, Iterator) or not hasattr(data, '__iter__'):
        kind = type(data).__name__
        raise TypeError(
            f'{owner}: data must be iterable more than once, and {kind} is not: give a Grain '
            'dataset, a list of batches, or an object whose __iter__ starts anew'
        )


def check_loss_weights(batch: Batch, where: str) -> None:
    """Raises a UsageError if a loss weight is negative.

    Infinite weights and NaN pass: they show in the loss, which is checked for them.

    Args:
      batch: its last array holds the loss weights.
      where: what messages call the batch.
    """
    weights = np.asarray(batch[-1])
    least = weights.min() if weights.size else 0
    if -np.inf < least < 0:
        raise UsageError(
            f'{where}: a loss weight is {least}: it says how much a position counts in the mean, '
            'so give 0 for padding and positive numbers elsewhere; a sign belongs into a loss of '
            'your own'
        )


def check_segments(batch: Batch, where: str) -> None:
    """Raises a UsageError unless the third array from the end numbers the documents of each row.

    Args:
      batch: (inputs…, segments, targets, loss_weights).
      where: what messages call the batch.
    """
    segments, shape = np.asarray(batch[-3]), np.shape(batch[0])[:2]
    if segments.dtype.kind not in 'iu' or segments.shape != shape or len(shape) != 2:
        raise UsageError(
            f'{where}: segments are {segments.dtype}{list(segments.shape)}: give integers '
            f'{list(shape)}, the number of the document that each position belongs to'
        )
    falls = segments[:, 1:] < segments[:, :-1]
    if falls.any():
        row, at = np.argwhere(falls)[0]
        raise UsageError(
            f'{where}: segments fall from {segments[row, at]} to {segments[row, at + 1]} at '
            f'position {at + 1} of row {row}: number documents as they stand in a row, and padding '
            'at its end by one more'
        )


@contextlib.contextmanager
def made(what: str) -> Iterator[None]:
    """Turns an error in making a batch into a UsageError that names the batch.

    Args:
      what: what messages call the batch.

    Raises:
      UsageError: for a TypeError or ValueError, as an element raises that differs from the others.
    """
    try:
        yield
    except (TypeError, ValueError) as e:
        raise UsageError(f'{what}: {one_line(e)}') from e


@contextlib.contextmanager
def shaped_unlike(first: Batch, batch: Batch, where: str) -> Iterator[None]:
    """Turns a model's ValueError into a UsageError if the batch differs in shape from the first.

    Args:
      first: a batch that the model accepted.
      batch: the batch it is given now.
      where: what messages call that batch.

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

    If the data's iterator has `get_state` and `set_state`, as Grain's have, its own state is the
    position. Other data is read again from the start, so its batches must be the same each time.

    An interrupt while a batch is made (Ctrl-C, an error that is then fixed) leaves the position as
    it was: the next call makes the same batch.

    Args:
      data: an iterable of tuples of arrays.

    Attributes:
      taken: how many batches were taken.
      examples: how many rows these batches had in all.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        self._data = data
        self._iterator: Any = iter(data)
        self._peeked: Batch | None = None
        self._interrupted = False
        self.taken = self.examples = 0
        self._anchor = _Anchor(0, self._own_state())

    def peek(self) -> Batch:
        """The next batch, without taking it.

        Raises:
          UsageError: if the data has ended, or the batch cannot be made.
        """
        if self._peeked is None:
            if self._interrupted:  # a generator that has raised cannot continue
                self._iterator = self._gone_back()
                self._interrupted = False
            self._peeked = self._next()
        return self._peeked

    def take(self) -> Batch:
        """Takes the next batch; errors are those of `peek`."""
        batch, self._peeked = self.peek(), None
        self.taken += 1
        self.examples += n_rows(batch)
        return batch

    def position(self) -> dict[str, Any]:
        """The position after the last `take`, in types that JSON can hold.

        Returns:
          'taken' and 'examples', two counts, and 'state', the iterator's own; None if it has none.

        Raises:
          TypeError: if JSON cannot hold the iterator's own state.
          RuntimeError: after `peek`, before the batch is taken.
        """
        if self._peeked is not None:
            raise RuntimeError('a batch was peeked at: the iterator stands one further than `take`')
        state = self._own_state()
        self._anchor = _Anchor(self.taken, state)
        if isinstance(state, bytes):
            state = {'utf8': state.decode()}
        try:
            state = json.loads(json.dumps(state))
        except TypeError as e:
            raise TypeError(
                'where the data stands cannot be saved: get_state() of its iterator gives what '
                f'JSON cannot hold ({e}): give numbers, texts, lists and dicts'
            ) from None
        return {'taken': self.taken, 'examples': self.examples, 'state': state}

    def go_to(self, position: dict[str, Any], resized: bool = False) -> None:
        """Goes to a position of an equal data set; nothing may have been taken yet.

        Args:
          position: from `position`.
          resized: whether the batch size has changed. The position is then found by examples, not
            by batches.

        Raises:
          UsageError: if the position is of another kind of data, or no batch of the present size
            starts there.
        """
        state = position['state']
        if (state is None) == hasattr(self._iterator, 'get_state'):
            raise UsageError(
                'the checkpoint was made with data of another kind: continue with the same data, '
                'or choose another output_dir'
            )
        if state is None:
            self._skip(position, resized)
            return
        known = state if isinstance(state, dict) else {}
        if resized and not _COUNTS_EXAMPLES & known.keys():
            raise UsageError(
                'the position of this data counts batches, so their size cannot change: keep it, '
                'or make them by data.batches, data.packed or data.bucketed'
            )
        state = known['utf8'].encode() if 'utf8' in known else state
        self._iterator.set_state(state)
        self._peeked = None
        self.taken, self.examples = position['taken'], position.get('examples', 0)
        self._anchor = _Anchor(self.taken, copy.deepcopy(state))

    def _own_state(self) -> Any:
        has_state = hasattr(self._iterator, 'get_state')
        return copy.deepcopy(self._iterator.get_state()) if has_state else None

    def _skip(self, position: dict[str, Any], resized: bool) -> None:
        """Takes batches until as many examples, or batches, are taken as at the position."""
        by, goal = ('examples', position['examples']) if resized else ('taken', position['taken'])
        while getattr(self, by) < goal:
            rows = n_rows(self.take())
        if getattr(self, by) > goal:
            raise UsageError(
                f'{goal} examples were taken, and batches of {rows} do not end there: choose a '
                'batch size that divides them'
            )

    def _gone_back(self) -> Any:
        """A new iterator at the position of the old one."""
        iterator: Any = iter(self._data)
        if self._anchor.state is not None:
            iterator.set_state(copy.deepcopy(self._anchor.state))
        for _ in range(self.taken - self._anchor.taken):
            next(iterator)
        return iterator

    def _next(self) -> Batch:
        try:
            with made(f'batch {self.taken + 1} of the data'):
                batch = next(self._iterator)
        except StopIteration:
            raise UsageError(
                f'the data ended after {self.taken} batches: repeat it (num_epochs=None, or '
                'dataset.repeat()), or ask for fewer steps'
            ) from None
        except BaseException:
            self._interrupted = True
            raise
        # A malformed first batch is a mistake in the program, a later one is in the data.
        blamed = made(f'batch {self.taken + 1} of the data') if self.taken else nullcontext()
        with blamed:
            return checked(batch)


class _Anchor(NamedTuple):
    """A position to restart an iterator from: its own state after `taken` batches."""

    taken: int
    state: Any


def checked(batch: Any) -> Batch:
    """A batch as a tuple, whose numpy arrays are copies.

    Steps that wait to be computed read their batches late, and JAX may read an array where it lies,
    so data that fills one array again and again must not change what was given before.

    Raises:
      TypeError: if it is no tuple of arrays.
      ValueError: if its inputs have different numbers of rows, or one has no axes.
    """
    if not isinstance(batch, (tuple, list)) or not all(hasattr(x, 'shape') for x in batch):
        raise TypeError(
            'data must yield tuples of arrays (inputs…, targets, loss_weights), got '
            f'{type(batch).__name__}'
        )
    inputs = batch[:-2]  # targets and loss weights are compared with the outputs, by the loss
    if len({x.shape[:1] for x in inputs}) > 1 or not all(x.shape for x in inputs):
        raise ValueError(
            f'the inputs of a batch must have one number of rows, their first axis, got '
            f'({describe(inputs)}): check the data'
        )
    return tuple(x.copy() if type(x) is np.ndarray else x for x in batch)


def n_rows(batch: Batch) -> int:
    """How many examples a batch holds: the length of its first axis."""
    return batch[0].shape[0] if batch else 0


def is_endless(data: Any) -> bool:
    """Whether a Grain data set is known to repeat for ever; False if that is not known."""
    try:
        return len(data) >= _ENDLESS
    except (TypeError, OverflowError):  # an IterDataset has no length
        passes_on = type(data).__name__ in _AS_LONG
        return passes_on and any(map(is_endless, getattr(data, 'parents', ())))
