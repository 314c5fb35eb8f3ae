"""The Grain data set of packed rows. This imports Grain, so only `packed_documents` imports it."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from layercomb.data.finetuning import packing
from layercomb.data.finetuning.documents import Document
from layercomb.data.finetuning.rehearsal import Reader, Rehearsal
from layercomb.data.iterators import ReadAhead, identity_of
from layercomb.data.packing import Arrays
from layercomb.errors import UsageError

_REHEARSED = 128  # documents looked at: the manual of another Python differs in few


class PackedRows(grain.IterDataset):
    """Batches of rows, each of which several documents share: see `packed_documents`.

    The state is the number of the next document and of those that wait, and the place in what is
    rehearsed.

    Attributes:
      documents: (ids, weights) with random access, already shuffled and repeated.
      length: positions of a row.
      batch_size: rows of a batch, on this host.
      shard: (index, count) of this host.
      epoch: how many documents an epoch has.
      rehearsal: what fills the rest of each row; None leaves it empty.
    """

    def __init__(
        self,
        documents: grain.MapDataset,
        length: int,
        batch_size: int,
        shard: tuple[int, int],
        epoch: int,
        rehearsal: Rehearsal | None = None,
    ):
        super().__init__(documents)
        self.documents, self.length, self.epoch = documents, length, epoch
        self.batch_size, self.shard = batch_size, shard
        self.rehearsal = rehearsal

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedRowIterator(self)

    @property
    def n_rows(self) -> int:
        """Rows of a batch of all hosts together."""
        return self.batch_size * self.shard[1]

    def identity(self) -> dict[str, Any]:
        """What identifies the data when a run is resumed: see `identity_of`."""
        made = {'length': self.length, **identity_of(self.documents)}
        if self.rehearsal is not None:
            its = identity_of(self.rehearsal.documents, _REHEARSED)
            size = {'positions': self.rehearsal.positions, 'weight': self.rehearsal.weight}
            made['rehearsal'] = {**size, **its}
        return made


class _PackedRowIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackedRows):
        super().__init__()
        self._dataset = dataset
        self._documents = ReadAhead(dataset.documents)
        self._next = 0
        self._pool = packing.Pool(dataset.length)
        self._read: dict[int, Document] = {}
        self._rehearse(None)

    def __next__(self) -> Arrays:
        given, (index, count) = self._dataset, self._dataset.shard
        rows = []
        for i in range(given.n_rows):
            self._fill()
            kept = 0 if given.rehearsal is None else given.rehearsal.positions
            taken = [self._read.pop(n) for n in self._pool.take(kept)] if self._pool else []
            if not taken and not i:
                raise StopIteration
            if taken and self._reader is not None:
                room = given.length - sum(packing.n_positions(weights) for _, weights in taken)
                taken += self._reader.take(room)
            if i % count == index:
                rows.append(packing.row(taken, given.length))
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def _fill(self) -> None:
        """Reads documents until enough wait."""
        n_empty, n = 0, self._dataset.epoch
        while not self._pool.full and self._next < len(self._documents):
            n_empty = 0 if self._wait(self._next, self._documents[self._next]) else n_empty + 1
            self._next += 1
            # One that is first in an epoch may be last in the next one.
            if n_empty == 2 * n - 1 or n_empty == self._next == len(self._documents):
                raise UsageError(
                    f'none of the {n:,} documents has a token to learn: give longer rows and a '
                    'larger max_len, or other documents'
                )

    def _wait(self, number: int, document: Document) -> bool:
        """Lets a document wait; False if nothing in it is weighted."""
        size = packing.n_positions(document[1])
        if size:
            self._pool.add(number, size)
            self._read[number] = document
        return size > 0

    def get_state(self) -> dict[str, Any]:
        state = {'next': self._next, 'waiting': self._pool.waiting}
        if self._reader is not None:
            state['rehearsed'] = list(self._reader.place)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._pool, self._read = state['next'], packing.Pool(self._dataset.length), {}
        for number in state['waiting']:
            self._wait(number, self._dataset.documents[number])
        self._rehearse(state.get('rehearsed'))

    def _rehearse(self, place: Any) -> None:
        """Goes to a place of what is rehearsed; None for its beginning."""
        given = self._dataset.rehearsal
        self._reader = None if given is None else Reader(given, place or (0, 0))
