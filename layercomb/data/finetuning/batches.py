"""Documents as batches, several in each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layercomb.checks import Fraction, Positive, Size, checked
from layercomb.data import checks
from layercomb.data.checks import Seed, Shard, Source
from layercomb.data.finetuning.documents import Document, is_document
from layercomb.data.finetuning.packing import n_positions
from layercomb.data.finetuning.rehearsal import Rehearsal, whole
from layercomb.data.pipelines import in_order
from layercomb.errors import UsageError

if TYPE_CHECKING:
    import grain


@checked
def packed_documents(
    documents: Source[Document],
    length: Size,
    batch_size: Size,
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    shard: Shard | None = None,
    rehearsal: Source[Document] | None = None,
    rehearsal_share: Fraction = 0.25,
    rehearsal_weight: Positive = 1.0,
) -> grain.IterDataset:
    """Returns batches of whole documents, as many in each row as fit.

    A row is made of the document that waits longest and of the longest that fit beside it, of the
    next 256 (or more, if they fill less than four rows). Segments say which document a position
    belongs to: positions with different numbers are not to see each other, as
    `TrainTask(packed=True)` has it. A document of n tokens takes n − 1 positions: nothing is
    predicted from its last one. What follows its last weighted token is left out, and so is a
    document without one. In an epoch each document comes once.

    The batches depend on the arguments alone. The state of the iterator is small and exact: it
    holds the numbers of the documents that wait, which are read again when it is resumed. With
    `shard=(i, n)`, n hosts share the rows of batches n times as large, and each reads all
    documents.

    A model that is taught something forgets other things. With `rehearsal`, pieces of other text
    fill what documents leave free in each row, at least `rehearsal_share` of it unless the first
    document is longer than the rest. A row may hold more tokens of it than of answers; a smaller
    `rehearsal_weight` keeps it from drowning them.

    Args:
      documents: a sequence of (ids, weights), such as `chat` returns.
      length: positions of a row, L.
      batch_size: rows of a batch, B; with `shard`, on this host.
      seed: of the order.
      shuffle: whether to take the documents in another order each epoch.
      num_epochs: how often to go through the documents; None for ever. At the end the last batch is
        filled with rows of weight 0.
      shard: (index, count) of this host; None for that of `jax.distributed`, whose processes share
        the rows of a batch.
      rehearsal: other documents, all of which is learnt, such as `python_manual` or `text_folder`
        returns; they are cut to fit, and begin anew when they end. None for none.
      rehearsal_share: of the positions of a row, 0 … 1, for them.
      rehearsal_weight: times the weights of their tokens.

    Returns:
      A data set of (inputs, segments, targets, loss_weights), (B, L) int32, int32, int32, float32.
      In a row, segments count from 1 and do not decrease; padding has the number after the last,
      token 0 and weight 0.

    Raises:
      TypeError: if an argument has the wrong type, or an element is no document.
      ValueError: if one is out of range, or there are no documents.
      UsageError: if Grain is not installed; while it is read, if a document does not fit into a
        row, none has a weighted token, or what is rehearsed has no text or tokens without weight.

    >>> import numpy as np
    >>> documents = [(np.arange(n), np.ones(n, np.float32)) for n in (4, 5, 3)]
    >>> (batch,) = packed_documents(documents, 6, 2, shuffle=False, num_epochs=1)
    >>> for x in batch[:2]:
    ...     print(x)
    [[0 1 2 0 1 0]
     [0 1 2 3 0 0]]
    [[1 1 1 2 2 3]
     [1 1 1 1 2 2]]
    """
    shard, n_rows = checks.split('packed_documents', shard, batch_size)
    fitting = _Fitting(checks.source('packed_documents', documents, 'documents'), length)
    ordered = in_order(fitting, seed, shuffle, num_epochs)
    from layercomb.data.finetuning import iterators

    other = None
    if rehearsal is not None:
        source = checks.source('packed_documents', rehearsal, 'rehearsal')
        whole(source[0])
        ordered_others = in_order(source, seed, shuffle, None)
        positions = round(rehearsal_share * length)
        other = Rehearsal(ordered_others, len(source), positions, rehearsal_weight)
    return iterators.PackedRows(ordered, length, n_rows, shard, len(fitting), other)


@dataclass(frozen=True, eq=False)
class _Fitting(Sequence[Document]):
    """Documents, each of which proves to fit into a row when it is asked for.

    Attributes:
      documents: a sequence of them.
      length: positions of a row.
    """

    documents: Sequence[Document]
    length: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Any) -> Any:
        document = self.documents[index]
        if not is_document(document):
            raise TypeError(
                'packed_documents takes documents (ids, weights), 1-D arrays of one length, and '
                f'the source holds {document!r:.60}: give e.g. data.chat(…)'
            )
        needed = n_positions(document[1])
        if needed > self.length:
            name = getattr(self.documents, 'where', 'document {}'.format)(index)
            raise UsageError(
                f'{name} needs {needed:,} positions, and a row has {self.length:,}: give '
                f'max_len={self.length + 1} where documents are made, or longer rows'
            )
        return document
