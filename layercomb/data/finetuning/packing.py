"""Which documents share a row of a batch, and the row that they make."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

import numpy as np

from layercomb.data.packing import Arrays

WINDOW = 256  # documents that wait; with more, rows hardly get fuller
_ROWS = 4  # rows that they fill at least


class Pool:
    """Documents that wait to be put into rows.

    A row is made of the one that waits longest, and then, as long as one fits, of the longest that
    fits. It is a matter of what waits alone, not of how it came there.

    Attributes:
      length: positions of a row.

    >>> pool = Pool(10)
    >>> for number, size in enumerate([6, 3, 4, 5]):
    ...     pool.add(number, size)
    >>> pool.take(), pool.take()
    ([0, 2], [1, 3])
    """

    def __init__(self, length: int):
        self.length = length
        self._sizes: dict[int, int] = {}
        self._waiting = 0  # positions
        self._sorted: list[tuple[int, int]] = []  # (size, −number): of one size, the oldest is last

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def waiting(self) -> list[int]:
        """The numbers of the documents, sorted."""
        return sorted(self._sizes)

    @property
    def full(self) -> bool:
        """Whether there is enough to choose from."""
        return len(self) >= WINDOW and self._waiting >= _ROWS * self.length

    def add(self, number: int, size: int) -> None:
        """Lets a document wait.

        Args:
          number: of the document; smaller ones have waited longer.
          size: its positions, at most `length`.
        """
        self._sizes[number] = size
        self._waiting += size
        bisect.insort(self._sorted, (size, -number))

    def take(self, kept: int = 0) -> list[int]:
        """The numbers of the documents of the next row, which wait no longer.

        Args:
          kept: positions of the row to leave free, if its first document does.
        """
        taken, room = [], self.length - kept
        at = bisect.bisect_left(self._sorted, self._oldest())
        while at >= 0:
            size, number = self._sorted.pop(at)
            taken.append(-number)
            del self._sizes[-number]
            room -= size
            self._waiting -= size
            at = bisect.bisect_right(self._sorted, (room, math.inf)) - 1
        return taken

    def _oldest(self) -> tuple[int, int]:
        number = min(self._sizes)
        return self._sizes[number], -number


def n_positions(weights: np.ndarray) -> int:
    """The positions that a document takes in a row: those before its last weighted token.

    Args:
      weights: of the document, (n,).

    >>> n_positions(np.array([1, 0, 1, 0], np.float32))
    2
    """
    weighted = np.flatnonzero(weights[1:])
    return int(weighted[-1]) + 1 if weighted.size else 0


def row(documents: Iterable[Arrays], length: int) -> Arrays:
    """The row of a batch that documents make.

    Args:
      documents: (ids, weights) each, which fit.
      length: L, of the row.

    Returns:
      (inputs, segments, targets, loss_weights), (L,) int32, int32, int32 and float32. The documents
      are numbered from 1 in `segments`; padding has the next number, token 0 and weight 0.

    >>> document = np.array([5, 6, 7]), np.array([0, 0, 1], np.float32)
    >>> for x in row([document, document], 5):
    ...     print(x)
    [5 6 5 6 0]
    [1 1 2 2 3]
    [6 7 6 7 0]
    [0. 1. 0. 1. 0.]
    """
    inputs, targets = np.zeros((2, length), np.int32)
    segments, loss_weights = np.ones(length, np.int32), np.zeros(length, np.float32)
    at = 0
    for number, (ids, weights) in enumerate(documents, 1):
        end = at + n_positions(weights)
        n = end - at
        inputs[at:end], targets[at:end] = ids[:n], ids[1 : n + 1]
        loss_weights[at:end] = weights[1 : n + 1]
        segments[at:end], segments[end:] = number, number + 1
        at = end
    return inputs, segments, targets, loss_weights


def n_rows(sizes: Sequence[int], length: int, kept: int = 0) -> int:
    """How many rows documents make, in their order.

    Args:
      sizes: the positions of each.
      length: positions of a row.
      kept: as of `Pool.take`.

    >>> n_rows([6, 3, 4, 5, 2], 10)
    2
    """
    pool, rows, numbers = Pool(length), 0, iter(enumerate(sizes))
    while True:
        for number, size in numbers:
            pool.add(number, size)
            if pool.full:
                break
        if not len(pool):
            return rows
        pool.take(kept)
        rows += 1
