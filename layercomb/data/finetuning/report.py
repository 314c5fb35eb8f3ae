"""What there is to learn, and what does not fit: a report on documents before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercomb.checks import Fraction, Size, checked
from layercomb.data import checks
from layercomb.data.checks import Source
from layercomb.data.finetuning import packing
from layercomb.data.finetuning.documents import Document, Measured

_CHECKED = 200_000  # rows whose form is checked


@dataclass(frozen=True)
class LengthReport:
    """How long documents are, and how they fill the rows of batches; its str is for people.

    Attributes:
      n_documents: how many there are.
      n_seen: how many of them were looked at, evenly spread; all else is about these.
      length: positions of a row.
      n_tokens: tokens, without those cut off.
      n_learnt: tokens with a weight.
      lengths: tokens of the shortest, the median, at the 90th percentile and of the longest
        document, with those cut off.
      n_truncated: documents that were cut.
      n_cut: tokens that they lost.
      n_dropped: documents that are left out, since they have no weighted token.
      n_skipped: answers without weight, since the template writes them in another way when more
        follows.
      n_too_long: documents that do not fit into a row, which training refuses.
      n_rows: rows that the documents make when packed.
      packed: the share of positions of those rows that hold a document.
      unpacked: the same, with a document in each row.
      said: how the source is read; '' if it does not say.
    """

    n_documents: int
    n_seen: int
    length: int
    n_tokens: int
    n_learnt: int
    lengths: tuple[int, int, int, int]
    n_truncated: int
    n_cut: int
    n_dropped: int
    n_skipped: int
    n_too_long: int
    n_rows: int
    packed: float
    unpacked: float
    said: str = ''

    def __str__(self) -> str:
        shortest, median, most, longest = (f'{n:,}' for n in self.lengths)
        seen = f'{self.n_seen:,} of ' if self.n_seen < self.n_documents else ''
        return '\n'.join((
            f'{seen}{self.n_documents:,} documents{f": {self.said}" if self.said else ""}',
            f'{self.n_tokens:,} tokens, {self.n_learnt:,} of them learnt',
            f'tokens of a document: at least {shortest}, half of them up to {median}, 90 % up to '
            f'{most}, at most {longest}',
            *self._losses(),
            f'{self.n_rows:,} rows of {self.length:,}, {self.packed:.1%} full; '
            f'a document in each row would fill {self.unpacked:.1%}',
        ))  # fmt: skip

    def _losses(self) -> list[str]:
        """A line on what is not learnt, if there is something."""
        told = (
            (self.n_truncated, f'{self.n_truncated:,} cut off, by {self.n_cut:,} tokens in all'),
            (self.n_dropped, f'{self.n_dropped:,} left out, with nothing to learn in them'),
            (self.n_skipped, f'{self.n_skipped:,} answers not learnt: the template rewrites them'),
            (self.n_too_long, f'{self.n_too_long:,} too long for a row: give max_len'),
        )
        lines = [line for n, line in told if n]
        return ['; '.join(lines)] if lines else ['nothing is cut off or left out']


@checked
def length_report(
    documents: Source[Document],
    length: Size,
    *,
    rehearsal_share: Fraction = 0.0,
    limit: Size = 5000,
) -> LengthReport:
    """Returns what there is to learn, how long it is, and what is lost.

    Making tokens takes time, so at most `limit` documents are looked at, evenly spread. The form of
    all other rows is checked, too (up to 200,000), so that a mistake is found before training.

    Args:
      documents: a sequence of (ids, weights), such as `chat` returns.
      length: positions of a row, as of `packed_documents`.
      rehearsal_share: of these, for other text; 0 where none is rehearsed.
      limit: how many documents to look at.

    Returns:
      The report; ``print(report)`` shows it.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is out of range, or there are no documents.
      UsageError: if a row of the source is wrong.

    >>> documents = [(np.arange(n), np.ones(n, np.float32)) for n in (3, 5, 2)]
    >>> print(length_report(documents, 6))
    3 documents
    10 tokens, 7 of them learnt
    tokens of a document: at least 2, half of them up to 3, 90 % up to 5, at most 5
    nothing is cut off or left out
    2 rows of 6, 58.3% full; a document in each row would fill 38.9%
    """
    documents = checks.source('length_report', documents, 'documents')
    seen = _spread(len(documents), limit)
    _check_rest(documents, seen)
    measure = getattr(documents, 'measured', None)
    figures = np.array([_figures(measure(i) if measure else Measured(documents[i])) for i in seen])
    tokens, learnt, cut, skipped, needed = figures.T
    positions = np.minimum(needed, length)
    kept = round(rehearsal_share * length)
    n_rows = packing.n_rows([int(n) for n in positions if n], length, kept)
    at = np.percentile(tokens + cut, (0, 50, 90, 100), method='inverted_cdf').astype(int)
    filled, n_used = int(positions.sum()), int((positions > 0).sum())
    return LengthReport(
        n_documents=len(documents),
        n_seen=len(seen),
        length=length,
        n_tokens=int(tokens.sum()),
        n_learnt=int(learnt.sum()),
        lengths=(int(at[0]), int(at[1]), int(at[2]), int(at[3])),
        n_truncated=int((cut > 0).sum()),
        n_cut=int(cut.sum()),
        n_dropped=int((needed == 0).sum()),
        n_skipped=int(skipped.sum()),
        n_too_long=int((needed > length).sum()),
        n_rows=n_rows,
        packed=filled / max(n_rows * length, 1),
        unpacked=filled / max(n_used * length, 1),
        said=getattr(documents, 'said', ''),
    )


def _figures(measured: Measured) -> tuple[int, int, int, int, int]:
    """Tokens, those learnt, those cut off, answers skipped, and positions of a document."""
    (ids, weights), n_cut, n_skipped = measured
    learnt = int(np.count_nonzero(weights[1:]))
    return ids.size, learnt, n_cut, n_skipped, packing.n_positions(weights)


def _spread(n: int, limit: int) -> Sequence[int]:
    """At most `limit` numbers below n, evenly spread.

    >>> list(_spread(3, 5)), list(_spread(10, 4))
    ([0, 1, 2], [0, 2, 5, 7])
    """
    return range(n) if n <= limit else [i * n // limit for i in range(limit)]


def _check_rest(documents: Any, seen: Sequence[int]) -> None:
    """Checks the form of rows that are not looked at."""
    check = getattr(documents, 'check', None)
    if check is not None and len(seen) < len(documents):
        for i in _spread(len(documents), _CHECKED):
            check(i)
