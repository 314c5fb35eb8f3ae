"""From sources to batches: deterministic, resumable Grain data sets of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from layercomb.data import checks
from layercomb.data.packing import Arrays, Windows, encode_checked, token_stream
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer
from layercomb.errors import UsageError, require

if TYPE_CHECKING:
    import grain


def batches(
    source: Sequence[Arrays],
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Returns batches of examples that all have one shape, such as those of `duplication`.

    The batches depend on the arguments alone. Their iterator's `get_state()` is the number of
    examples taken, whatever a thread has made ahead, and goes through JSON; `set_state` on an
    iterator of an equal data set, whose batch size may differ, goes on from there. With
    `shard=(i, n)`, n hosts take the rows of batches n times as large, so training does not depend
    on how many they are, and all get equally many batches.

    Args:
      source: a sequence of (inputs, targets, …, loss_weights), numpy arrays.
      batch_size: rows of a batch, on this host.
      seed: of the order.
      shuffle: whether to take the examples in another order each epoch.
      num_epochs: how often to go through the source; None for ever. At the end of the last one
        the batch is filled with zeros, of weight 0.
      shard: (index, count) of this host.

    Returns:
      A data set of tuples like the examples, with a leading axis B.

    Raises:
      TypeError: if an argument has the wrong type, or an example is no tuple.
      ValueError: if one is out of range.
      UsageError: if Grain is not installed.
    """
    batch_size = checks.integer('batch_size', batch_size, 1)
    if not isinstance(first := checks.source(source)[0], tuple) or len(first) < 3:
        raise TypeError(
            f'batches takes (inputs, targets, loss_weights), and the source holds '
            f'{type(first).__name__}: use data.packed or data.bucketed for documents'
        )
    shard = checks.shard(shard)
    examples = _in_order(source, seed, shuffle, num_epochs)
    from layercomb.data import iterators

    padding = None if num_epochs is None else tuple(np.zeros_like(x) for x in first)
    return iterators.Examples(examples, batch_size, shard, _stacked, padding)


def packed(
    source: Sequence[str | bytes],
    length: int,
    batch_size: int,
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    streaming: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Returns batches of windows of the text eos, document, eos, document, …, eos.

    Inputs are the tokens of a window, targets the tokens after them. In an epoch every token of
    every document, and the separator after it, is a target once. The last window is padded with
    weight 0. About order, resuming and hosts, see `batches`.

    Args:
      source: a sequence of documents, str or bytes.
      length: tokens in a window, L.
      batch_size: rows of a batch, B, on this host.
      tokenizer: what encodes the documents.
      seed: of the order.
      shuffle: whether to take the windows, or when streaming the documents, in another order each
        epoch.
      num_epochs: how often to go through the source; None for ever.
      streaming: False keeps all tokens in memory (a byte each with `ByteTokenizer`); True reads
        documents as they are needed. Hosts then share out the documents, except when `num_epochs`
        is given: each then reads all and keeps its rows, so that all get equally many batches.
      shard: (index, count) of this host.

    Returns:
      A data set of (inputs, targets, loss_weights), (B, L) int32, int32 and float32.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is out of range.
      UsageError: if the source holds no text, or Grain is not installed.
    """
    length = checks.integer('length', length, 1)
    batch_size = checks.integer('batch_size', batch_size, 1)
    tokenizer = checks.tokenizer(tokenizer)
    checks.source(source)
    nothing = UsageError(f'the {len(source)} documents are empty: give a source that holds text')
    if checks.flag('streaming', streaming):
        # The first one that is not empty ends it, so this hardly ever reads a second.
        if not any(encode_checked(source[i], tokenizer).size for i in range(len(source))):
            raise nothing
        return _streamed(
            _in_order(source, seed, shuffle, num_epochs),
            length, batch_size, tokenizer, checks.shard(shard), endless=num_epochs is None,
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


def bucketed(
    source: Sequence[Any],
    boundaries: Sequence[int],
    batch_sizes: Sequence[int],
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Returns batches of whole documents of about the same length.

    A document becomes inputs `eos, tokens` and targets `tokens, eos`, and waits in the first
    bucket that is long enough until the bucket is full; longer ones are cut to the last boundary.
    So there are as many shapes of batches as there are buckets. About order, resuming and hosts,
    see `batches`; each host reads all documents, and all are given the same shapes.

    Args:
      source: a sequence of documents, str or bytes, or of tuples of 1-D arrays, the last of which
        is the loss weights: a tuple is as long as its longest array.
      boundaries: lengths of the buckets, increasing.
      batch_sizes: rows of a batch in each bucket, on this host.
      tokenizer: what encodes the documents.
      seed: of the order.
      shuffle: whether to take the documents in another order each epoch.
      num_epochs: how often to go through the source; None for ever. At the end what waits is given
        out, padded to full batches.
      shard: (index, count) of this host.

    Returns:
      A data set of (inputs, targets, loss_weights), each (B, L) of a bucket's sizes, int32, int32
      and float32, padded with zeros; or of tuples such as the source holds.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if one is out of range.
      UsageError: if Grain is not installed.
    """
    boundaries = _integers('boundaries', boundaries)
    batch_sizes = _integers('batch_sizes', batch_sizes)
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f'boundaries={boundaries}: give increasing lengths')
    if len(boundaries) != len(batch_sizes):
        raise ValueError(
            f'{len(boundaries)} boundaries and {len(batch_sizes)} batch_sizes: '
            'give one batch size for each boundary'
        )
    tokenizer = checks.tokenizer(tokenizer)
    index, count = checks.shard(shard)
    documents = _in_order(checks.source(source), seed, shuffle, num_epochs)
    from layercomb.data import iterators

    examples = documents.map(partial(_as_example, tokenizer=tokenizer))
    dataset = iterators.Buckets(examples, boundaries, [count * n for n in batch_sizes])
    return dataset.map(partial(_rows, index, count))


def _in_order(
    source: Sequence[Any], seed: int, shuffle: bool, num_epochs: int | None
) -> grain.MapDataset:
    grain = require('grain', 'train')
    seed, num_epochs = checks.seed(seed), checks.epochs(num_epochs)
    dataset = grain.MapDataset.source(source)
    if checks.flag('shuffle', shuffle):
        dataset = dataset.shuffle(seed)
    return dataset.repeat(num_epochs)


def _streamed(
    documents: grain.MapDataset,
    length: int,
    batch_size: int,
    tokenizer: Tokenizer,
    shard: tuple[int, int],
    endless: bool,
) -> grain.IterDataset:
    grain = require('grain', 'train')
    from layercomb.data import iterators

    index, count = shard
    if endless:
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


def _as_example(document: Any, tokenizer: Tokenizer) -> Arrays:
    if isinstance(document, tuple):
        example = tuple(np.asarray(x) for x in document)
        if any(x.ndim != 1 for x in example):
            raise ValueError(
                'bucketed takes documents, or tuples of 1-D arrays, and the source holds arrays of '
                f'{[x.shape for x in example]}: use data.batches for examples of one shape'
            )
        return example
    ids = encode_checked(document, tokenizer)
    eos = np.array([tokenizer.eos_id], np.int32)
    return (
        np.concatenate([eos, ids]),
        np.concatenate([ids, eos]),
        np.ones(ids.size + 1, np.float32),
    )


def _integers(name: str, values: Any) -> tuple[int, ...]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f'{name}={values!r}: give a list of positive integers')
    return tuple(checks.integer(f'an element of {name}', value, 1) for value in values)
