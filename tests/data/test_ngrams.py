from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import data


def by_dictionaries(train, valid, order):
    """The definition, a byte at a time."""

    def stream(source):
        return bytes(3) + b''.join(document + b'\0' for document in source)

    def contexts(text):
        return ((text[i - 3 : i], text[i]) for i in range(3, len(text)))

    seen = [defaultdict(Counter) for _ in range(order + 1)]
    for context, byte in contexts(stream(train)):
        for n in range(order + 1):
            seen[n][context[3 - n :]][byte] += 1

    def probability(context, byte, n):
        if n < 0:
            return 1 / 256
        after = seen[n].get(context[3 - n :])
        lower = probability(context, byte, n - 1)
        if after is None:
            return lower
        return (after[byte] + len(after) * lower) / (after.total() + len(after))

    bits = [
        -math.log2(probability(context, byte, order)) for context, byte in contexts(stream(valid))
    ]
    return sum(bits) / len(bits)


documents = st.lists(st.binary(min_size=1, max_size=30) | st.text('ab', min_size=1).map(str.encode))


@settings(max_examples=50, deadline=None)
@given(documents.filter(bool), documents.filter(bool))
def test_it_equals_the_definition(train, valid):
    fast = data.witten_bell_bits_per_byte(train, valid, orders=(0, 1, 2, 3))
    for order, bits in fast.items():
        assert bits == pytest.approx(by_dictionaries(train, valid, order), rel=1e-9)


def test_longer_contexts_help_on_real_text():
    train, valid = data.python_stdlib('train')[:60], data.python_stdlib('valid')[:6]
    bits = data.witten_bell_bits_per_byte(train, valid)
    assert list(bits) == [1, 2, 3]
    assert 4.5 > bits[1] > bits[2] > bits[3] > 1.5


@pytest.mark.parametrize('orders', [(), (4,), (-1,), ('a',)])
def test_wrong_orders(orders):
    with pytest.raises(ValueError, match='give numbers of context bytes from 0 to 3'):
        data.witten_bell_bits_per_byte(['a'], ['a'], orders=orders)


def test_nothing_to_count():
    with pytest.raises(ValueError, match='train holds no byte: there is nothing to count'):
        data.witten_bell_bits_per_byte(['', ''], ['a'])
