from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import UsageError, data


def contexts(source):
    text = bytes(3) + b''.join(document + b'\0' for document in source)
    return ((text[i - 3 : i], text[i]) for i in range(3, len(text)))


def by_dictionaries(train, asked, order):
    """The definition, a byte at a time, where `asked` are pairs of a context and a byte."""
    seen = [defaultdict(Counter) for _ in range(order + 1)]
    for context, byte in contexts(train):
        for n in range(order + 1):
            seen[n][context[3 - n :]][byte] += 1

    def probability(context, byte, n):
        if n < 0:
            return 1 / 256
        after = seen[n].get(context[len(context) - n :])
        lower = probability(context, byte, n - 1)
        if after is None:
            return lower
        return (after[byte] + len(after) * lower) / (after.total() + len(after))

    bits = [-math.log2(probability(c, byte, min(order, len(c)))) for c, byte in asked]
    return sum(bits) / len(bits)


documents = st.lists(st.binary(min_size=1, max_size=30) | st.text('ab', min_size=1).map(str.encode))


@settings(max_examples=50, deadline=None)
@given(documents.filter(bool), documents.filter(bool))
def test_it_equals_the_definition(train, valid):
    fast = data.witten_bell_bits_per_byte(train, valid, orders=(0, 1, 2, 3))
    for order, bits in fast.items():
        assert bits == pytest.approx(by_dictionaries(train, contexts(valid), order), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(documents.filter(bool), documents.filter(bool), st.integers(1, 6))
def test_on_batches_a_context_is_what_the_row_holds(train, valid, length):
    batches = list(data.packed(valid, length, 3, num_epochs=1))
    asked = [
        (bytes(x[max(0, i - 2) : i + 1]), int(y[i]))
        for batch in batches
        for x, y, w in zip(*(a.astype(np.uint8) for a in batch), strict=True)
        for i in np.flatnonzero(w)
    ]
    fast = data.witten_bell_bits_on_batches(train, batches, orders=(0, 1, 2, 3))
    for order, bits in fast.items():
        assert bits == pytest.approx(by_dictionaries(train, asked, order), rel=1e-9)


def test_batches_that_are_not_of_bytes():
    x = np.full((1, 4), 256)
    for batch in [(x, x, x), (x * 0.0, x, x), (x, x)]:
        with pytest.raises(UsageError, match=r'byte models need batches .* of bytes, as a ByteTok'):
            data.witten_bell_bits_on_batches(['a'], [batch])
    for batches in [[], [(x * 0, x * 0, x * 0)]]:
        with pytest.raises(UsageError, match='no target in the batches counts'):
            data.witten_bell_bits_on_batches(['a'], batches)


def test_longer_contexts_help_on_real_text():
    train, valid = data.python_stdlib('train')[:60], data.python_stdlib('valid')[:6]
    bits = data.witten_bell_bits_per_byte(train, valid)
    assert list(bits) == [1, 2, 3]
    assert 4.5 > bits[1] > bits[2] > bits[3] > 1.5


@pytest.mark.parametrize(
    ('orders', 'error', 'message'),
    [
        ((), ValueError, 'orders is empty: give numbers of context bytes'),
        ((4,), ValueError, r'orders must be at least 0 and at most 3, got \(4,\)'),
        ((-1,), ValueError, 'orders must be at least 0 and at most 3'),
        (('a',), TypeError, r"orders must be a sequence of int, got \('a',\)"),
    ],
)
def test_wrong_orders(orders, error, message):
    with pytest.raises(error, match=message):
        data.witten_bell_bits_per_byte(['a'], ['a'], orders=orders)


def test_nothing_to_count():
    with pytest.raises(ValueError, match='train holds no byte: there is nothing to count'):
        data.witten_bell_bits_per_byte(['', ''], ['a'])
