"""From sources to batches: deterministic, resumable Grain data sets of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data import checks
from layercomb.data.adapted import Adapted, adapted
from layercomb.data.checks import Seed, Shard, Source
from layercomb.data.packing import Arrays, Windows, token_stream
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer
from layercomb.errors import UsageError, require

if TYPE_CHECKING:
    import grain


@checked
def batches(
    source: Source[Arrays],
    batch_size: Size,
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    shard: Shard | None = None,
) -> grain.IterDataset:
    """Returns batches of examples that all have one shape, such as those of `duplication`.

    The batches depend on the arguments alone. The iterator's `get_state()` holds the number of
    examples taken, not counting those that a thread has made ahead, and can be written as JSON;
    `set_state` on an iterator of an equal data set, whose batch size may differ, goes on from
    there. With `shard=(i, n)`, n hosts share the rows of batches n times as large: training does
    not depend on the number of hosts, and all get equally many batches.

    Args:
      source: a sequence of (inputs, targets, …, loss_weights), numpy arrays.
      batch_size: rows of a batch; with `shard`, on this host.
      seed: of the order.
      shuffle: whether to take the examples in another order each epoch.
      num_epochs: how often to go through the source; None for ever. At the end of the last epoch
        the batch is filled with zeros, of weight 0.
      shard: (index, count) of this host; None for that of `jax.distributed`, whose processes share
        the rows of a batch.

    Returns:
      A data set of tuples like the examples, with a leading axis B.

    Raises:
      TypeError: if an argument has the wrong type, or an example is no tuple.
      ValueError: if one is out of range.
      UsageError: if Grain is not installed.
    """
    shard, n_rows = checks.split('batches', shard, batch_size)
    if not isinstance(first := checks.source('batches', source)[0], tuple) or len(first) < 3:
        raise TypeError(
            f'batches takes (inputs, targets, loss_weights), and the source holds '
            f'{type(first).__name__}: use data.packed or data.bucketed for documents'
        )
    examples = in_order(source, seed, shuffle, num_epochs)
    from layercomb.data import iterators

    padding = None if num_epochs is None else tuple(np.zeros_like(x) for x in first)
    return iterators.Examples(examples, n_rows, shard, _stacked, padding)


@checked
def packed(
    source: Source[str | bytes],
    length: Size,
    batch_size: Size,
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    streaming: bool = False,
    shard: Shard | None = None,
) -> grain.IterDataset:
    """Returns batches of windows of the text eos, document, eos, document, …, eos.

    Inputs are the tokens of a window, targets the tokens after them. In an epoch every token of
    every document, and the separator after it, is a target once. The last window is padded with
    weight 0. For order, resuming and hosts, see `batches`.

    Args:
      source: a sequence of documents, str or bytes.
      length: tokens in a window, L.
      batch_size: rows of a batch, B; with `shard`, on this host.
      tokenizer: what encodes the documents.
      seed: of the order.
      shuffle: whether to take the windows, or when streaming the documents, in another order each
        epoch.
      num_epochs: how often to go through the source; None for ever.
      streaming: False keeps all tokens in memory (a byte each with `ByteTokenizer`); True reads
        documents as they are needed. Then each host reads all and keeps its rows, so that all get
        equally many batches; with a `shard` and without `num_epochs` it reads documents of its own.
      shard: (index, count) of this host; None for that of `jax.distributed`, whose processes share
        the rows of a batch.

    Returns:
      A data set of (inputs, targets, loss_weights), (B, L) int32, int32 and float32.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is out of range.
      UsageError: if the source holds no text, or Grain is not installed.
    """
    tokenizer = adapted(tokenizer, 'packed')
    part, n_rows = checks.split('packed', shard, batch_size)
    checks.source('packed', source)
    nothing = UsageError(f'the {len(source)} documents are empty: give a source that holds text')
    if streaming:
        # The first document that is not empty ends the search, so a second is hardly ever read.
        if not any(tokenizer.encode(source[i]).size for i in range(len(source))):
            raise nothing
        return _streamed(
            in_order(source, seed, shuffle, num_epochs),
            length, n_rows, tokenizer, part, apart=num_epochs is None and shard is not None,
        )  # fmt: skip
    stream = token_stream(source, tokenizer)
    if stream.size == len(source) + 1:
        raise nothing
    return batches(
        Windows(stream, length),
        batch_size,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
        shard=shard,
    )


@checked
def bucketed(
    source: Source[Any],
    boundaries: Sequence[Size],
    batch_sizes: Sequence[Size],
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    num_epochs: Size | None = None,
    shard: Shard | None = None,
) -> grain.IterDataset:
    """Returns batches of whole documents of about the same length.

    A document becomes inputs `eos, tokens` and targets `tokens, eos`, and waits in the shortest
    bucket that holds it until that bucket is full. A document longer than the last boundary is cut
    to it. There are as many shapes of batches as buckets. For order, resuming and hosts, see
    `batches`; each host reads all documents, and all hosts get the same shapes.

    Args:
      source: a sequence of documents, str or bytes; or of tuples of 1-D arrays, the last of which
        holds the loss weights. The length of a tuple is that of its longest array.
      boundaries: lengths of the buckets, increasing.
      batch_sizes: rows of a batch in each bucket; with `shard`, on this host.
      tokenizer: what encodes the documents.
      seed: of the order.
      shuffle: whether to take the documents in another order each epoch.
      num_epochs: how often to go through the source; None for ever. At the end the buckets are
        emptied, padded to full batches.
      shard: (index, count) of this host; None for that of `jax.distributed`, whose processes share
        the rows of a batch.

    Returns:
      A data set of (inputs, targets, loss_weights), int32, int32 and float32, each (B, L) with the
      batch size and the boundary of a bucket, padded with zeros; or of tuples like the source's.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is out of range.
      UsageError: if Grain is not installed.
    """
    if not boundaries or list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f'bucketed: boundaries must be increasing lengths, got {boundaries!r}')
    if len(boundaries) != len(batch_sizes):
        raise ValueError(
            f'bucketed: {len(boundaries)} boundaries and {len(batch_sizes)} batch_sizes: '
            'give one batch size for each boundary'
        )
    tokenizer = adapted(tokenizer, 'bucketed')
    parts = [checks.split('bucketed', shard, n) for n in batch_sizes]
    (index, count), _ = parts[0]
    documents = in_order(checks.source('bucketed', source), seed, shuffle, num_epochs)
    from layercomb.data import iterators

    examples = documents.map(partial(_as_example, tokenizer=tokenizer))
    dataset = iterators.Buckets(examples, boundaries, [count * n for _, n in parts])
    return dataset.map(partial(_rows, index, count))


def in_order(
    source: Source[Any], seed: int, shuffle: bool, num_epochs: int | None
) -> grain.MapDataset:
    """The elements of a source epoch by epoch, with random access; None repeats them for ever."""
    grain = require('grain', 'train')
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed)
    return dataset.repeat(num_epochs)


def _streamed(
    documents: grain.MapDataset,
    length: int,
    batch_size: int,
    tokenizer: Adapted,
    shard: tuple[int, int],
    apart: bool,
) -> grain.IterDataset:
    grain = require('grain', 'train')
    from layercomb.data import iterators

    index, count = shard
    if apart:
        documents, index, count = documents[index::count], 0, 1
    rows = batch_size * count
    fill = partial(grain.experimental.batch_and_pad, batch_size=rows)
    dataset = iterators.PackedDocuments(documents, length, tokenizer).batch(rows, batch_fn=fill)
    return dataset.map(partial(_rows, index, count))


def _stacked(examples: Sequence[Arrays]) -> Arrays:
    first, *others = ([np.shape(x) for x in example] for example in examples)
    for other in others:
        if other != first:
            raise ValueError(
                f'batches takes examples of one shape, and the source holds {first} and {other}: '
                'pad them, or use data.bucketed'
            )
    return tuple(np.stack(column) for column in zip(*examples, strict=True))


def _rows(index: int, count: int, batch: Arrays) -> Arrays:
    return tuple(x[index::count] for x in batch)


def _as_example(document: Any, tokenizer: Adapted) -> Arrays:
    if isinstance(document, tuple):
        example = tuple(np.asarray(x) for x in document)
        if any(x.ndim != 1 for x in example):
            raise ValueError(
                'bucketed takes documents, or tuples of 1-D arrays, and the source holds arrays of '
                f'{[x.shape for x in example]}: use data.batches for examples of one shape'
            )
        return example
    ids = tokenizer.encode(document)
    eos = np.array([tokenizer.eos_id], np.int32)
    return (
        np.concatenate([eos, ids]),
        np.concatenate([ids, eos]),
        np.ones(ids.size + 1, np.float32),
    )
