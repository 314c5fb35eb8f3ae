"""Rehearsal: pieces of other text in each row of a batch, so that less is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercomb.data.finetuning.documents import Document, is_document
from layercomb.errors import UsageError


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What is rehearsed, and how much of it.

    Attributes:
      documents: (ids, weights) with random access, shuffled and repeated for ever.
      n: how many there are before they repeat.
      positions: of a row that are kept for it.
      weight: times the weights of its tokens.
    """

    documents: Any
    n: int
    positions: int
    weight: float = 1.0


class Reader:
    """Reads documents one after another, in pieces; a place in them is two numbers.

    Attributes:
      rehearsal: what is read.
      place: of the next piece: the number of its document, and of its first token there.

    >>> documents = [(np.arange(n), np.ones(n, np.float32)) for n in (6, 3, 9)]
    >>> reader = Reader(Rehearsal(documents, n=3, positions=3))
    >>> [ids.tolist() for ids, _ in reader.take(3)], [ids.tolist() for ids, _ in reader.take(4)]
    ([[0, 1, 2, 3]], [[3, 4, 5], [0, 1, 2]])
    """

    def __init__(self, rehearsal: Rehearsal, place: Sequence[int] = (0, 0)):
        self.rehearsal = rehearsal
        self.place = tuple(place)
        self._read: tuple[int, Document] | None = None

    def take(self, n: int) -> list[Document]:
        """Pieces that take n positions of a row in all: each token is predicted once.

        A piece starts at the last token of the one before it. Weights are those of the documents,
        times that of the rehearsal.

        Raises:
          UsageError: if no document has two tokens.
          TypeError, UsageError: if one is no document, or not all of it is learnt.
        """
        taken: list[Document] = []
        first = self.place[0]
        while n > 0:
            number, start = self.place
            if number > first + self.rehearsal.n and not taken:
                raise UsageError('rehearsal: its documents have no text: give others, or none')
            ids, weights = self._document(number)
            end = min(start + n, len(ids) - 1)
            if end > start:
                its_weights = np.float32(self.rehearsal.weight) * weights[start : end + 1]
                taken.append((ids[start : end + 1], its_weights))
                n -= end - start
            self.place = (number, end) if end < len(ids) - 1 else (number + 1, 0)
        return taken

    def _document(self, number: int) -> Document:
        if self._read is None or self._read[0] != number:
            self._read = number, whole(self.rehearsal.documents[number])
        return self._read[1]


def whole(document: Any) -> Document:
    """A document of which a piece can be rehearsed.

    Raises:
      TypeError: if it is no document.
      UsageError: if a token after the first is not learnt.
    """
    if not is_document(document):
        raise TypeError(
            'rehearsal takes documents (ids, weights), 1-D arrays of one length, and there is '
            f'{document!r:.60}: give e.g. data.text_folder(…)'
        )
    if not document[1][1:].all():
        raise UsageError(
            'rehearsal is cut to fit, so that answers could lose their questions: give text of '
            'which every token is learnt, such as data.text_folder, and no conversations'
        )
    made: Document = document
    return made
