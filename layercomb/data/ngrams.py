"""Byte models that count: what any neural model must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layercomb.data.packing import token_stream
from layercomb.data.tokenizers import ByteTokenizer

_MAX_ORDER = 3  # a context and the byte after it fit in 32 bits


def witten_bell_bits_per_byte(
    train: Sequence[str | bytes],
    valid: Sequence[str | bytes],
    orders: Sequence[int] = (1, 2, 3),
) -> dict[int, float]:
    """Returns the bits per byte of interpolated Witten–Bell models of bytes.

    With c(h, b) the times byte b followed context h, c(h) their sum over b, t(h) the number of
    different bytes seen after h, and h' the context h without its oldest byte:

        p(b | h) = (c(h, b) + t(h) p(b | h')) / (c(h) + t(h))

    and below the empty context all 256 bytes are equally likely. Documents are joined by NUL, and
    the separators are predicted like every other byte: just what `packed` with a `ByteTokenizer`
    asks of a model, so the figures compare.

    Args:
      train: documents to count.
      valid: documents to predict.
      orders: numbers of context bytes, 0 … 3.

    Returns:
      Bits per byte on `valid` for each order.

    Raises:
      ValueError: if an order is not in 0 … 3, or a source holds no byte.

    References:
      Witten and Bell 1991, The zero-frequency problem, IEEE Trans. Inf. Theory 37(4).
      Chen and Goodman 1998, An empirical study of smoothing techniques, section 2.5.

    >>> witten_bell_bits_per_byte(['abab' * 99], ['abababab'], orders=[1])[1] < 1.5
    True
    """
    if not orders or any(type(n) is not int or not 0 <= n <= _MAX_ORDER for n in orders):
        raise ValueError(f'orders={orders!r}: give numbers of context bytes from 0 to {_MAX_ORDER}')
    seen, asked = (_padded_stream(name, s) for name, s in (('train', train), ('valid', valid)))
    wanted, times = np.unique(_grams(asked, _MAX_ORDER), return_counts=True)
    p = np.full(wanted.shape, 1 / 256)
    bits = {}
    for order in range(max(orders) + 1):
        p = _interpolate(_grams(seen, order), _last_bytes(wanted, order), p)
        bits[order] = float(-(times * np.log2(p)).sum() / times.sum())
    return {order: bits[order] for order in orders}


def _padded_stream(name: str, source: Sequence[str | bytes]) -> np.ndarray:
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
