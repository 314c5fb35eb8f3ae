"""Byte models that count: baselines for language models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np

from layercomb.checks import Bound, checked
from layercomb.data.checks import Source
from layercomb.data.packing import token_stream
from layercomb.data.tokenizers import ByteTokenizer
from layercomb.errors import UsageError

_MAX_ORDER = 3  # a context and the byte after it fit in 32 bits
Order = Annotated[int, Bound(0, high=_MAX_ORDER)]


@checked
def witten_bell_bits_per_byte(
    train: Source[str | bytes],
    valid: Source[str | bytes],
    orders: Sequence[Order] = (1, 2, 3),
) -> dict[int, float]:
    """Returns the bits per byte of interpolated Witten–Bell models of bytes.

    With c(h, b) the times byte b followed context h, c(h) their sum over b, t(h) the number of
    different bytes seen after h, and h' the context h without its oldest byte:

        p(b | h) = (c(h, b) + t(h) p(b | h')) / (c(h) + t(h))

    and below the empty context all 256 bytes are equally likely. Documents are joined by NUL, and
    the separators are predicted like every other byte. This is the task that `packed` with a
    `ByteTokenizer` gives a model, so the figures can be compared.

    Args:
      train: documents to count.
      valid: documents to predict.
      orders: numbers of context bytes, 0 … 3.

    Returns:
      Bits per byte on `valid` for each order.

    Raises:
      TypeError: if an order is no int.
      ValueError: if an order is not in 0 … 3, or a source holds no byte.

    References:
      Witten and Bell 1991, The zero-frequency problem, IEEE Trans. Inf. Theory 37(4).
      Chen and Goodman 1998, An empirical study of smoothing techniques, section 2.5.

    >>> witten_bell_bits_per_byte(['abab' * 99], ['abababab'], orders=[1])[1] < 1.5
    True
    """
    _check_orders('witten_bell_bits_per_byte', orders)
    asked = _padded_stream('valid', valid)
    wanted, times = np.unique(_grams(asked, _MAX_ORDER), return_counts=True)
    known = np.full(wanted.shape, _MAX_ORDER)
    return _bits(_padded_stream('train', train), wanted, known, times, orders)


@checked
def witten_bell_bits_on_batches(
    train: Source[str | bytes],
    batches: Iterable[tuple[Any, ...]],
    orders: Sequence[Order] = (1, 2, 3),
) -> dict[int, float]:
    """Returns the bits per byte of the same models on the targets of batches.

    A neural model is measured on the same targets with the same contexts: the bytes before a target
    in its row. So models of lower order predict the first targets of a row.

    Args:
      train: documents to count.
      batches: batches of (inputs, targets, loss_weights): (B, L) bytes, bytes and weights.
      orders: numbers of context bytes, 0 … 3.

    Returns:
      Weighted mean of the bits per byte for each order.

    Raises:
      TypeError: if an order is no int.
      ValueError: if an order is not in 0 … 3, or `train` holds no byte.
      UsageError: if the batches are not of bytes, or no target counts.

    >>> batch = np.array([[97, 98, 97]]), np.array([[98, 97, 98]]), np.ones((1, 3))
    >>> witten_bell_bits_on_batches(['abab' * 99], [batch], orders=[1])[1] < 0.2
    True
    """
    _check_orders('witten_bell_bits_on_batches', orders)
    columns = [_grams_of_batch(batch) for batch in batches]
    if not any(times.size for _, _, times in columns):
        raise UsageError('no target in the batches counts: byte models have nothing to predict')
    wanted, known, times = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _bits(_padded_stream('train', train), wanted, known, times, orders)


def _check_orders(owner: str, orders: Sequence[int]) -> None:
    if not orders:
        raise ValueError(f'{owner}: orders is empty: give numbers of context bytes')


def _bits(
    seen: np.ndarray,
    wanted: np.ndarray,
    known: np.ndarray,
    times: np.ndarray,
    orders: Sequence[int],
) -> dict[int, float]:
    """Mean bits of grams for each order; each has `known` context bytes and the weight `times`."""
    p = np.full(wanted.shape, 1 / 256)
    bits = {}
    for order in range(max(orders) + 1):
        higher = _interpolate(_grams(seen, order), _last_bytes(wanted, order), p)
        p = np.where(known >= order, higher, p)
        bits[order] = float(-(times * np.log2(p)).sum() / times.sum())
    return {order: bits[order] for order in orders}


def _grams_of_batch(batch: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each target of weight above 0 with the bytes before it, their number, and its weight."""
    if len(batch) != 3 or not all(_are_bytes(np.asarray(x)) for x in batch[:2]):
        raise UsageError(
            'byte models need batches (inputs, targets, loss_weights) of bytes, as a ByteTokenizer '
            'makes: leave out train.baseline_text'
        )
    inputs, targets, weights = (np.asarray(x) for x in batch)
    n, length = inputs.shape
    before = np.concatenate([np.zeros((n, _MAX_ORDER - 1), np.uint32), inputs.astype(np.uint32)], 1)
    grams = np.zeros((n, length), np.uint32)
    for start in range(_MAX_ORDER):
        grams = (grams << np.uint32(8)) | before[:, start : start + length]
    grams = (grams << np.uint32(8)) | targets.astype(np.uint32)
    known = np.broadcast_to(np.minimum(np.arange(length) + 1, _MAX_ORDER), grams.shape)
    counts = weights != 0
    return grams[counts], known[counts], weights[counts]


def _are_bytes(tokens: np.ndarray) -> bool:
    return bool(tokens.ndim == 2 and tokens.dtype.kind in 'iu' and (tokens & 255 == tokens).all())


def _padded_stream(name: str, source: Source[str | bytes]) -> np.ndarray:
    stream = token_stream(source, ByteTokenizer())
    if stream.size == len(source) + 1:
        raise ValueError(f'{name} holds no byte: there is nothing to count')
    return np.concatenate([np.zeros(_MAX_ORDER - 1, np.uint8), stream])


def _grams(stream: np.ndarray, order: int) -> np.ndarray:
    """Every predicted byte and the `order` bytes before it, as one number, the oldest highest."""
    n = stream.size - _MAX_ORDER
    grams = np.zeros(n, np.uint32)
    for back in range(order, -1, -1):
        start = _MAX_ORDER - back
        grams = (grams << np.uint32(8)) | stream[start : start + n]
    return grams


def _last_bytes(grams: np.ndarray, order: int) -> np.ndarray:
    return grams if order == 3 else grams & np.uint32((1 << 8 * (order + 1)) - 1)


def _interpolate(seen: np.ndarray, wanted: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """p(byte | context) of each gram in `wanted`, from its probability in the order below."""
    grams, counts = np.unique(seen, return_counts=True)
    contexts = grams >> np.uint32(8)
    starts = np.flatnonzero(np.r_[True, contexts[1:] != contexts[:-1]])
    heads = contexts[starts]
    totals = np.add.reduceat(counts, starts)
    kinds = np.diff(np.r_[starts, grams.size])
    count = _look_up(wanted, grams, counts)
    context = wanted >> np.uint32(8)
    total, kind = _look_up(context, heads, totals), _look_up(context, heads, kinds)
    known = total > 0
    return np.where(known, (count + kind * lower) / np.where(known, total + kind, 1), lower)


def _look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value beside each key in a sorted table, 0 where the key is not there."""
    at = np.minimum(np.searchsorted(table, keys), table.size - 1)
    return np.where(table[at] == keys, values[at], 0)
