"""Grain iterators with a small state. This imports Grain, so only the pipelines import it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from layercomb.data.adapted import Adapted
from layercomb.data.packing import Arrays, window

_AHEAD = 8  # elements read before they are asked for
_BATCHES_AHEAD = 4  # batches made before they are asked for
_SAMPLES = 8  # examples whose checksums identify a data set


class ReadAhead:
    """The elements of a data set by index; the next few are read ahead in a thread.

    The interpreter waits for the thread of an executor when it exits. A daemon thread may be killed
    inside Grain's C++, which then aborts.
    """

    def __init__(self, dataset: grain.MapDataset):
        self._dataset = dataset
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='read-ahead')
        self._futures: dict[int, Future[Any]] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        ahead = range(index, min(index + _AHEAD, len(self)))
        self._futures = {
            i: self._futures.get(i) or self._pool.submit(self._dataset.__getitem__, i)
            for i in ahead
        }
        return self._futures[index].result()


class Examples(grain.IterDataset):
    """Batches of examples of one shape, in order.

    The state is the number of examples that all hosts together have taken. So a run can go on with
    another batch size or number of hosts, from the next example that it has not seen.

    Attributes:
      examples: tuples of arrays with random access, already shuffled and repeated.
      batch_size: rows of a batch, on this host.
      shard: (index, count) of this host, which takes every count-th example.
      stack: a function from the examples of a batch to the batch.
      padding: an example that fills up the last batch; None drops an incomplete batch.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        batch_size: int,
        shard: tuple[int, int],
        stack: Callable[[Sequence[Arrays]], Arrays],
        padding: Arrays | None,
    ):
        super().__init__(examples)
        self.examples, self.batch_size, self.shard = examples, batch_size, shard
        self.stack, self.padding = stack, padding

    def __iter__(self) -> grain.DatasetIterator:
        return _ExampleIterator(self)

    @property
    def n_rows(self) -> int:
        """Rows of a batch of all hosts together."""
        return self.batch_size * self.shard[1]

    def identity(self) -> dict[str, Any]:
        """What identifies the data when a run is resumed: see `identity_of`."""
        return {'rows': self.n_rows, **identity_of(self.examples)}


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, dataset: Examples):
        super().__init__()
        self._dataset = dataset
        self._taken = 0
        self._batches: Any = None

    def __next__(self) -> Arrays:
        if self._batches is None:
            self._batches = self._from(self._taken)
        batch = next(self._batches)
        self._taken += self._dataset.n_rows
        return batch

    def _from(self, start: int) -> Any:
        """The batches from example `start` on; a thread makes a few of them ahead."""
        given, (index, count) = self._dataset, self._dataset.shard
        if start >= len(given.examples):
            return iter(())
        examples = given.examples[start:]
        if given.padding is not None and (missing := -len(examples) % given.n_rows):
            padding = grain.MapDataset.source([given.padding] * missing)
            examples = grain.MapDataset.concatenate([examples, padding])
        batches = examples[index::count].batch(
            given.batch_size, drop_remainder=True, batch_fn=given.stack
        )
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
        return iter(batches.to_iter_dataset(options))

    def get_state(self) -> dict[str, Any]:
        return {'examples': self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        # Checkpoints of earlier versions count batches of the present size.
        counted = 'examples' in state
        self._taken = state['examples'] if counted else state['next_index'] * self._dataset.n_rows
        self._batches = None


def identity_of(examples: grain.MapDataset, n_samples: int = _SAMPLES) -> dict[str, Any]:
    """What identifies a data set: how many examples it has, and checksums of a few of them.

    The few are spread over an epoch, in the order in which they are taken. So another seed, another
    source, or a source of another length has another identity.

    Args:
      examples: tuples of arrays, or documents, with random access.
      n_samples: how many are looked at, and the first and the last.

    Returns:
      ``n``, the examples of one epoch, and ``samples``, their checksums; JSON can hold both.
    """
    source = examples
    while source.parents:
        source = source.parents[0]
    n = min(len(source), len(examples))
    picked = sorted({*range(min(n, 2)), *(i * (n - 1) // n_samples for i in range(n_samples + 1))})
    return {'n': len(source), 'samples': [_checksum(examples[i]) for i in picked]}


def _checksum(example: Any) -> int:
    parts = example if isinstance(example, tuple) else (example,)
    checksum = 0
    for x in parts:
        data = x.encode() if isinstance(x, str) else x
        data = bytes(data) if isinstance(data, (bytes, bytearray)) else np.asarray(data).tobytes()
        checksum = zlib.crc32(data, checksum)
    return checksum


class PackedDocuments(grain.IterDataset):
    """Windows of the text eos, document, eos, document, …

    Yields (inputs, targets, loss_weights), (L,) int32, int32 and float32. The state is the document
    and the offset where the next window starts, so resuming reads one document again. (Grain's own
    concatenation keeps tuples in its state; JSON turns them into lists, and then it loses a
    document.)

    Attributes:
      documents: texts with random access, already shuffled and repeated.
      length: L, of a window.
      tokenizer: what encodes the documents.
    """

    def __init__(self, documents: grain.MapDataset, length: int, tokenizer: Adapted):
        super().__init__(documents)
        self.documents, self.length, self.tokenizer = documents, length, tokenizer

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self)

    def identity(self) -> dict[str, Any]:
        """What identifies the data when a run is resumed: see `identity_of`."""
        return {'length': self.length, **identity_of(self.documents)}


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackedDocuments):
        super().__init__()
        self._length, self._tokenizer = dataset.length, dataset.tokenizer
        self._documents = ReadAhead(dataset.documents)
        self._document = self._offset = 0
        self._encoded: tuple[int, np.ndarray] | None = None

    def __next__(self) -> Arrays:
        parts: list[np.ndarray] = []
        missing = self._length + 1
        while self._document <= len(self._documents):
            part = self._piece(self._document)[self._offset :][:missing]
            parts.append(part)
            missing -= part.size
            if not missing:
                self._offset += part.size - 1  # the next window starts at this one's last token
                break
            self._document, self._offset = self._document + 1, 0
        tokens = np.concatenate([np.zeros(0, np.int32), *parts])
        if tokens.size <= 1:
            raise StopIteration
        return window(tokens, self._length)

    def _piece(self, document: int) -> np.ndarray:
        """The separator and the document after it; after the last document, the separator."""
        if self._encoded is None or self._encoded[0] != document:
            ids = np.zeros(0, np.int32)
            if document < len(self._documents):
                ids = self._tokenizer.encode(self._documents[document])
            eos = np.array([self._tokenizer.eos_id], np.int32)
            self._encoded = document, np.concatenate([eos, ids])
        return self._encoded[1]

    def get_state(self) -> dict[str, Any]:
        return {'document': self._document, 'offset': self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._document, self._offset = state['document'], state['offset']


class Buckets(grain.IterDataset):
    """Batches of examples of about the same length.

    An example goes to the shortest bucket that holds it, or is cut to the longest one. A full
    bucket becomes a batch, padded with zeros to its boundary. When the examples end, the buckets
    are emptied from the shortest to the longest, padded with empty rows. The state is the number of
    the next example and of those that wait in buckets, which are read again when it is resumed.

    Attributes:
      examples: tuples of 1-D arrays with random access; the last array holds the loss weights.
      boundaries: the lengths of the buckets, increasing.
      batch_sizes: rows in a batch of each bucket.
    """

    def __init__(
        self, examples: grain.MapDataset, boundaries: Sequence[int], batch_sizes: Sequence[int]
    ):
        super().__init__(examples)
        self.examples, self.boundaries, self.batch_sizes = examples, boundaries, batch_sizes

    def __iter__(self) -> grain.DatasetIterator:
        return _BucketIterator(self)

    def identity(self) -> dict[str, Any]:
        """What identifies the data, see `identity_of`, and the sizes of its batches as `rows`."""
        rows = [list(self.boundaries), list(self.batch_sizes)]
        return {'rows': rows, **identity_of(self.examples)}


class _BucketIterator(grain.DatasetIterator):
    def __init__(self, dataset: Buckets):
        super().__init__()
        self._boundaries, self._batch_sizes = dataset.boundaries, dataset.batch_sizes
        self._examples, self._ahead = dataset.examples, ReadAhead(dataset.examples)
        self._next = 0
        self._waiting: list[list[int]] = [[] for _ in dataset.boundaries]
        self._fetched: dict[int, Arrays] = {}

    def __next__(self) -> Arrays:
        while (bucket := self._full()) is None and self._next < len(self._examples):
            example = self._fetched[self._next] = self._ahead[self._next]
            self._waiting[self._bucket_of(example)].append(self._next)
            self._next += 1
        if bucket is None:
            bucket = next((i for i, waiting in enumerate(self._waiting) if waiting), None)
        if bucket is None:
            raise StopIteration
        return self._leave(bucket)

    def _full(self) -> int | None:
        """A bucket that is full, if there is one."""
        sizes = zip(self._waiting, self._batch_sizes, strict=True)
        return next((i for i, (waiting, size) in enumerate(sizes) if len(waiting) >= size), None)

    def _bucket_of(self, example: Arrays) -> int:
        length = max(x.size for x in example)
        bucket = int(np.searchsorted(self._boundaries, length))
        return min(bucket, len(self._boundaries) - 1)

    def _leave(self, bucket: int) -> Arrays:
        size = self._batch_sizes[bucket]
        waiting, self._waiting[bucket] = self._waiting[bucket][:size], self._waiting[bucket][size:]
        # Examples that waited when the run was stopped are read again.
        examples = [self._fetched.pop(i, None) or self._examples[i] for i in waiting]
        shape = size, self._boundaries[bucket]  # (B, L)
        columns = zip(*examples, strict=True)
        batch = tuple(np.zeros(shape, np.result_type(*column)) for column in columns)
        for row, example in enumerate(examples):
            for padded, x in zip(batch, example, strict=True):
                padded[row, : x.size] = x[: shape[1]]
        return batch

    def get_state(self) -> dict[str, Any]:
        return {'next': self._next, 'waiting': [list(waiting) for waiting in self._waiting]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._fetched = state['next'], {}
        self._waiting = [[] for _ in self._boundaries]
        for i in sorted(i for waiting in state['waiting'] for i in waiting):
            # A run may go on with other buckets, so examples are sorted anew.
            self._fetched[i] = self._examples[i]
            self._waiting[self._bucket_of(self._fetched[i])].append(i)
