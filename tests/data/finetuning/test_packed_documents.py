"""Packed rows: what is in them, in which order, and that they can be resumed exactly."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import data
from layercomb.data.finetuning import packing
from layercomb.errors import UsageError

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30)


def documents_of(sizes):
    """Documents of distinct tokens; every third token is weighted, and the last."""
    made, start = [], 1
    for size in sizes:
        ids = np.arange(start, start + size, dtype=np.int32)
        weights = np.array([float(i % 3 == 2 or i == size - 1) for i in range(size)], np.float32)
        made.append((ids, weights))
        start += size
    return made


MANY = documents_of(np.random.default_rng(0).integers(2, 30, 300).tolist())


def same(a, b):
    return len(a) == len(b) and all(
        (x == y).all() and x.dtype == y.dtype
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def unpacked(batches):
    """The documents of batches, in order: pairs of tokens and the weights of all but the first."""
    found = []
    for batch in batches:
        for inputs, segments, targets, weights in zip(*batch, strict=True):
            assert (np.diff(segments) >= 0).all() and segments[0] == 1
            for number in np.unique(segments):
                at = segments == number
                if number == segments[-1] and not weights[at].any():  # padding
                    assert not inputs[at].any() and not targets[at].any()
                    continue
                # Targets are the inputs that follow in the same document.
                assert (targets[at][:-1] == inputs[at][1:]).all()
                ids = np.append(inputs[at], targets[at][-1])
                found.append((ids.tolist(), weights[at].tolist()))
    return found


# What a row is


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(8, 20), st.integers(1, 3), st.booleans())
def test_every_document_comes_once_and_whole(sizes, length, batch_size, shuffle):
    documents = documents_of(sizes)
    wanted = sorted((i.tolist(), w[1:].tolist()) for i, w in documents if w[1:].any())
    dataset = data.packed_documents(documents, length, batch_size, shuffle=shuffle, num_epochs=1)
    if not wanted:
        with pytest.raises(UsageError, match=r'none of the \d+ documents has a token to learn'):
            list(dataset)
        return
    batches = list(dataset)
    assert sorted(unpacked(batches)) == wanted
    for batch in batches:
        assert [x.shape for x in batch] == [(batch_size, length)] * 4
        assert [x.dtype for x in batch] == [np.int32] * 3 + [np.float32]
    # Rows that hold nothing fill up the last batch alone.
    filled = [bool(row.any()) for batch in batches for row in batch[3]]
    n_rows = sum(filled)
    assert all(filled[:n_rows]) and len(batches) == -(-n_rows // batch_size)


def test_what_follows_the_last_weight_takes_no_place():
    ids, weights = np.arange(1, 6, dtype=np.int32), np.array([1, 0, 1, 0, 0], np.float32)
    (batch,) = data.packed_documents([(ids, weights)] * 2, 5, 1, shuffle=False, num_epochs=1)
    assert [x[0].tolist() for x in batch] == [
        [1, 2, 1, 2, 0], [1, 1, 2, 2, 3], [2, 3, 2, 3, 0], [0, 1, 0, 1, 0]
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_a_row_is_the_oldest_and_the_longest_that_fit(sizes):
    pool, left = packing.Pool(12), dict(enumerate(sizes))
    for number, size in left.items():
        pool.add(number, size)
    while left:
        wanted, room = [min(left)], 12 - left.pop(min(left))
        while fitting := [(-size, number) for number, size in left.items() if size <= room]:
            size, number = min(fitting)
            wanted.append(number)
            room += size
            del left[number]
        assert pool.take() == wanted
        assert pool.waiting == sorted(left)


def test_rows_are_nearly_full():
    positions = sum(packing.n_positions(w) for _, w in MANY)
    batches = list(data.packed_documents(MANY, 64, 1, num_epochs=1))
    assert len(batches) <= 1.02 * positions / 64 + 1
    sizes = [packing.n_positions(w) for _, w in MANY]
    in_order = data.packed_documents(MANY, 64, 1, shuffle=False, num_epochs=1)
    assert packing.n_rows(sizes, 64) == len(list(in_order))


def test_many_short_documents_fill_a_long_row():
    assert packing.n_rows([3] * 4000, 3000) == 4
    documents = documents_of([4] * 2000)
    first, *_ = data.packed_documents(documents, 3000, 1, num_epochs=1)
    assert first[3].any() and first[1][0, -1] == 1000


# Order, epochs, hosts


def test_batches_depend_on_the_arguments_alone():
    def first(**more):
        return list(islice(data.packed_documents(MANY, 32, 4, **more), 5))

    assert same(first(), first()) and same(first(seed=3), first(seed=3))
    assert not same(first(), first(seed=1)) and not same(first(), first(shuffle=False))


def test_epochs():
    once = unpacked(data.packed_documents(MANY, 32, 4, num_epochs=1))
    twice = unpacked(data.packed_documents(MANY, 32, 4, num_epochs=2))
    assert sorted(once * 2) == sorted(twice)


@pytest.mark.parametrize('num_epochs', [None, 1])
def test_hosts_share_the_rows_of_larger_batches(num_epochs):
    def batches(batch_size, shard):
        made = data.packed_documents(MANY, 32, batch_size, num_epochs=num_epochs, shard=shard)
        return list(islice(made, 20))

    alone, first, second = batches(4, (0, 1)), batches(2, (0, 2)), batches(2, (1, 2))
    for whole, a, b in zip(alone, first, second, strict=True):
        for x, y, z in zip(whole, a, b, strict=True):
            assert (x[0::2] == y).all() and (x[1::2] == z).all()


# Resuming


@pytest.mark.parametrize('num_epochs', [None, 1])
@pytest.mark.parametrize('after', [0, 1, 7])
def test_resuming_is_exact(num_epochs, after, monkeypatch):
    monkeypatch.setattr(packing, 'WINDOW', 50)
    dataset = data.packed_documents(MANY, 48, 4, num_epochs=num_epochs)
    iterator = iter(dataset)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(islice(iterator, 12))
    again = iter(dataset)
    next(again)
    again.set_state(state)
    assert same(list(islice(again, 12)), rest) and rest
    # With batches of another size, the same rows follow.
    other = iter(data.packed_documents(MANY, 48, 2, num_epochs=num_epochs))
    other.set_state(state)
    assert (next(other)[0] == rest[0][0][:2]).all()


def test_data_has_an_identity():
    one, other = (data.packed_documents(MANY[:n], 32, 4).identity() for n in (300, 299))
    assert one == data.packed_documents(MANY, 32, 8).identity() and one != other
    assert one['length'] == 32 and one['n'] == 300


# What is refused


def test_a_document_that_is_too_long():
    documents = documents_of([3, 9, 4])
    with pytest.raises(
        UsageError, match=r'^document 1 needs 8 positions, and a row has 7: give max'
    ):
        list(data.packed_documents(documents, 7, 2, num_epochs=1))
    rows = [{'text': 'a'}, {'text': 'abcdefgh'}]
    made = data.instructions(rows, data.ByteTokenizer())
    with pytest.raises(UsageError, match=r'^source\[1\] needs 8 positions, .*give max_len=8 where'):
        list(data.packed_documents(made, 7, 2))
    list(
        data.packed_documents(data.instructions(rows, data.ByteTokenizer(), 8), 7, 2, num_epochs=1)
    )


def test_endless_documents_without_a_weight():
    documents = [(np.arange(4), np.zeros(4, np.float32))] * 3
    with pytest.raises(UsageError, match='none of the 3 documents has a token to learn: give'):
        next(iter(data.packed_documents(documents, 8, 2, shuffle=False)))
    one = [*documents, (np.arange(4), np.ones(4, np.float32))]
    assert next(iter(data.packed_documents(one, 8, 2, shuffle=False)))[3].sum() == 4 * 3


@pytest.mark.parametrize(
    'bad',
    ['text', (np.arange(3),), (np.arange(3), np.ones(2, np.float32)), ([1, 2], [1.0, 1.0]),
     (np.ones(3, np.float32), np.ones(3, np.float32))],
)  # fmt: skip
def test_what_is_no_document(bad):
    with pytest.raises(TypeError, match=r'packed_documents takes documents \(ids, weights\)'):
        next(iter(data.packed_documents([bad], 8, 2)))


def test_arguments():
    with pytest.raises(ValueError, match='packed_documents: documents is empty'):
        data.packed_documents([], 8, 2)
    with pytest.raises(ValueError, match=r'packed_documents: shard must be \(index, count\)'):
        data.packed_documents(MANY, 8, 2, shard=(2, 2))
    with pytest.raises(ValueError, match='packed_documents: length must be at least 1, got 0'):
        data.packed_documents(MANY, 0, 2)
