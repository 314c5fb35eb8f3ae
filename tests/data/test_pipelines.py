from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import data
from layercomb.errors import UsageError

RNG = np.random.default_rng(0)
DOCUMENTS = [bytes(RNG.integers(1, 256, n, np.uint8)) for n in RNG.integers(1, 60, 40)]
EXAMPLES = [(np.full(3, i), np.arange(3), np.ones(3, np.float32)) for i in range(98)]

PIPELINES = {
    'packed': lambda **kw: data.packed(DOCUMENTS, 8, 4, **kw),
    'streaming': lambda **kw: data.packed(DOCUMENTS, 8, 4, streaming=True, **kw),
    'bucketed': lambda **kw: data.bucketed(DOCUMENTS, (8, 16, 64), (8, 4, 2), **kw),
    'batches': lambda **kw: data.batches(EXAMPLES, 4, **kw),
}
every_pipeline = pytest.mark.parametrize('make', PIPELINES.values(), ids=PIPELINES)
packings = pytest.mark.parametrize('streaming', [False, True])


def take(iterator, n):
    return list(islice(iterator, n))


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and (x == y).all()
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def targets_of(batches):
    """All targets with weight 1, in order."""
    return [t for batch in batches for t in batch[1][batch[2] == 1].tolist()]


def text_of(documents):
    return b'\0' + b''.join(document + b'\0' for document in documents)


# What a batch is


@packings
@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.binary(max_size=12), min_size=1, max_size=6).filter(any),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_packed_is_the_text_in_windows(streaming, documents, length, batch_size):
    text = text_of(documents)
    batches = list(
        data.packed(documents, length, batch_size, shuffle=False, num_epochs=1, streaming=streaming)
    )
    n_windows = -(-(len(text) - 1) // length)
    assert len(batches) == -(-n_windows // batch_size)
    for b, (inputs, targets, weights) in enumerate(batches):
        for row in range(batch_size):
            start = (b * batch_size + row) * length
            for t in range(length):
                real = start + t + 1 < len(text)
                assert weights[row, t] == real
                assert inputs[row, t] == (text[start + t] if real else 0)
                assert targets[row, t] == (text[start + t + 1] if real else 0)
        assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


@packings
def test_every_token_is_a_target_once_an_epoch(streaming):
    for epochs in (1, 2):
        batches = list(data.packed(DOCUMENTS, 8, 4, num_epochs=epochs, streaming=streaming))
        wanted = sorted(epochs * list(text_of(DOCUMENTS)[1:]))
        assert sorted(targets_of(batches)) == wanted
        assert {batch[0].shape for batch in batches} == {(4, 8)}


def test_epochs_are_shuffled_differently():
    source = [(np.int32(i), np.int32(i), np.float32(1)) for i in range(20)]
    rows = [int(x) for batch in take(iter(data.batches(source, 5)), 12) for x in batch[0]]
    epochs = [rows[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_last_batch_is_filled_with_rows_of_no_weight():
    batches = list(data.batches(EXAMPLES, 4, shuffle=False, num_epochs=1))
    assert [batch[0].shape for batch in batches] == [(4, 3)] * 25
    assert batches[24][2].tolist() == [[1] * 3] * 2 + [[0] * 3] * 2
    assert batches[24][0][:, 0].tolist() == [96, 97, 0, 0]


def test_scalars_and_images_are_batched_too():
    source = [(np.zeros((2, 2), np.float32), np.int32(i), np.float32(1)) for i in range(3)]
    (inputs, targets, weights), *_ = data.batches(source, 5, shuffle=False, num_epochs=1)
    assert inputs.shape == (5, 2, 2)
    assert targets.tolist() == [0, 1, 2, 0, 0] and weights.tolist() == [1, 1, 1, 0, 0]


def test_another_tokenizer():
    class Words:
        vocab_size, eos_id = 70_000, 69_999

        def encode(self, text):
            return np.array([len(word) for word in text.split()], np.int32)

        def decode(self, ids):
            return ' '.join('x' * i for i in ids)

    ((inputs, targets, _),) = data.packed(
        ['a bb', 'ccc'], 5, 1, Words(), shuffle=False, num_epochs=1
    )
    assert inputs.tolist() == [[69_999, 1, 2, 69_999, 3]]
    assert targets.tolist() == [[1, 2, 69_999, 3, 69_999]]


# Buckets


def test_bucketed_gives_every_document_once():
    boundaries, sizes = (8, 16, 64), (8, 4, 2)
    batches = list(PIPELINES['bucketed'](num_epochs=1))
    rows = []
    for inputs, targets, weights in batches:
        bucket = boundaries.index(inputs.shape[1])
        assert inputs.shape == targets.shape == weights.shape == (sizes[bucket], boundaries[bucket])
        for row in range(sizes[bucket]):
            n = int(weights[row].sum())
            if n == 0:
                assert not inputs[row].any() and not targets[row].any()
                continue
            assert weights[row].tolist() == [1] * n + [0] * (boundaries[bucket] - n)
            assert bucket == 0 or n > boundaries[bucket - 1]
            assert inputs[row, 0] == targets[row, n - 1] == 0
            assert inputs[row, 1:n].tolist() == targets[row, : n - 1].tolist()
            rows.append(bytes(targets[row, : n - 1].astype(np.uint8)))
    assert sorted(rows) == sorted(DOCUMENTS)


def test_the_buckets_that_remain_leave_padded():
    batches = list(data.bucketed([b'a' * 7, b'b' * 3, b'c'], (4, 8), (3, 2), num_epochs=1))
    assert [batch[0].shape for batch in batches] == [(3, 4), (2, 8)]
    assert [batch[2].sum(axis=1).tolist() for batch in batches[1:]] == [[8, 0]]


def test_longer_documents_are_cut():
    ((inputs, targets, weights),) = data.bucketed([b'abcdef'], (2, 4), (1, 1), num_epochs=1)
    assert inputs.tolist() == [[0, 97, 98, 99]] and targets.tolist() == [[97, 98, 99, 100]]
    assert weights.tolist() == [[1] * 4]


def test_tuples_go_by_their_longest_array():
    source = [(np.arange(1, 6), np.arange(1, 3), np.arange(2, 4), np.ones(2, np.float32))]
    (batch,) = data.bucketed(source, (4, 6), (1, 1), num_epochs=1)
    assert [x.shape for x in batch] == [(1, 6)] * 4
    assert batch[0].tolist() == [[1, 2, 3, 4, 5, 0]] and batch[3].tolist() == [[1, 1, 0, 0, 0, 0]]


# Order and resuming


@every_pipeline
def test_it_depends_on_the_seed_alone(make):
    assert same(take(iter(make(seed=3)), 30), take(iter(make(seed=3)), 30))
    assert not same(take(iter(make(seed=3)), 3), take(iter(make(seed=4)), 3))


@every_pipeline
@pytest.mark.parametrize('epochs', [None, 1])
def test_it_resumes_exactly(make, epochs):
    n = 40 if epochs is None else sum(1 for _ in make(num_epochs=epochs))
    iterator = iter(make(num_epochs=epochs))
    states, batches = [], []
    for _ in range(n):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for stopped in {0, 1, 2, n // 2, n - 1}:
        fresh = iter(make(num_epochs=epochs))
        fresh.set_state(json.loads(states[stopped]))
        assert same(take(fresh, n - stopped), batches[stopped:])


@every_pipeline
def test_an_iterator_can_be_set_back(make):
    iterator = iter(make())
    take(iterator, 3)
    state = iterator.get_state()
    ahead = take(iterator, 5)
    iterator.set_state(state)
    assert same(take(iterator, 5), ahead)


@every_pipeline
def test_the_end_is_remembered(make):
    iterator = iter(make(num_epochs=1))
    take(iterator, 1000)
    fresh = iter(make(num_epochs=1))
    fresh.set_state(json.loads(json.dumps(iterator.get_state())))
    assert take(fresh, 1) == []


@packings
def test_a_long_document_is_resumed_in_its_middle(streaming):
    def make():
        return data.packed([bytes(range(1, 256))], 10, 1, streaming=streaming)

    iterator = iter(make())
    take(iterator, 7)
    fresh = iter(make())
    fresh.set_state(json.loads(json.dumps(iterator.get_state())))
    assert same(take(iterator, 60), take(fresh, 60))


SCRIPT = """
from layercomb import data
documents = [bytes([i]) * i for i in range(1, 40)]
alive = [iter(dataset) for dataset in (
    data.packed(documents, 8, 4),
    data.packed(documents, 8, 4, streaming=True),
    data.bucketed(documents, (8, 64), (8, 2)),
)]
print(sum(len(next(iterator)) for iterator in alive for _ in range(9)))
"""


def test_a_process_ends_quietly():
    """A thread that reads ahead must not be killed in the middle of Grain's C++."""
    run = subprocess.run(
        [sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.returncode) == ('81\n', 0), run.stderr


# Hosts


def of_rows(name, rows, **arguments):
    if name == 'packed':
        return data.packed(DOCUMENTS, 8, rows, **arguments)
    if name == 'batches':
        return data.batches(EXAMPLES, rows, **arguments)
    return data.bucketed(DOCUMENTS, (16, 64), (2 * rows, rows), **arguments)


@pytest.mark.parametrize('name', ['packed', 'batches', 'bucketed'])
@pytest.mark.parametrize('epochs', [None, 1])
def test_hosts_share_the_batches_of_one(name, epochs):
    whole = take(iter(of_rows(name, 6, num_epochs=epochs)), 25)
    shares = [take(iter(of_rows(name, 2, num_epochs=epochs, shard=(i, 3))), 25) for i in range(3)]
    assert [len(share) for share in shares] == [len(whole)] * 3
    for step, batch in enumerate(whole):
        for i, share in enumerate(shares):
            assert same([share[step]], [tuple(x[i::3] for x in batch)])


def test_streaming_hosts_give_every_token_once_and_equally_many_batches():
    shares = [list(PIPELINES['streaming'](num_epochs=1, shard=(i, 3))) for i in range(3)]
    assert len({len(share) for share in shares}) == 1
    together = [batch for share in shares for batch in share]
    assert sorted(targets_of(together)) == sorted(text_of(DOCUMENTS)[1:])


def test_streaming_hosts_read_other_documents():
    documents = [bytes([i]) * 7 for i in range(1, 41)]
    shares = [
        take(iter(data.packed(documents, 8, 2, streaming=True, shard=(i, 2))), 10) for i in range(2)
    ]
    seen = [{t for t in targets_of(share) if t} for share in shares]
    assert seen[0] | seen[1] == set(range(1, 41)) and not seen[0] & seen[1]


# Mistakes


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'batch_size': 'a'}, TypeError, "packed: batch_size must be an int, got 'a'"),
        ({'batch_size': 0}, ValueError, 'packed: batch_size must be at least 1, got 0'),
        ({'batch_size': True}, TypeError, 'batch_size must be an int, got True'),
        ({'length': 8.0}, TypeError, r'length must be an int, got 8\.0'),
        ({'seed': -1}, ValueError, 'seed must be at least 0 and at most 4294967295, got -1'),
        ({'shuffle': 'yes'}, TypeError, "packed: shuffle must be a bool, got 'yes'"),
        ({'streaming': 1}, TypeError, 'streaming must be a bool, got 1'),
        ({'num_epochs': 0}, ValueError, 'num_epochs must be at least 1, got 0'),
        (
            {'shard': (2, 2)},
            ValueError,
            r'shard must be \(index, count\) with 0 <= index < count, got \(2, 2\)',
        ),
        ({'shard': 3}, TypeError, 'packed: shard must be a tuple of 2 int or None, got 3'),
        (
            {'tokenizer': 'bytes'},
            TypeError,
            "packed: tokenizer must have encode, eos_id and vocab_size, got 'bytes'",
        ),
        (
            {'source': 'abc'},
            TypeError,
            "packed: source must be a sequence of documents or examples, got 'abc'",
        ),
        (
            {'source': None},
            TypeError,
            'source must be a sequence of documents or examples, got None',
        ),
        ({'source': []}, ValueError, 'packed: source is empty: give at least one document'),
        ({'source': ['', '']}, UsageError, 'the 2 documents are empty: give a source that holds'),
        ({'source': ['', ''], 'streaming': True}, UsageError, 'the 2 documents are empty: give a'),
        ({'source': EXAMPLES}, TypeError, 'a document is a str or bytes, not tuple'),
    ],
)
def test_wrong_arguments_of_packed(arguments, error, message):
    with pytest.raises(error, match=message):
        data.packed(**{'source': ['abc'], 'length': 8, 'batch_size': 2} | arguments)


@pytest.mark.parametrize(
    ('boundaries', 'batch_sizes', 'error', 'message'),
    [
        ((8, 4), (1, 1), ValueError, r'boundaries must be increasing lengths, got \(8, 4\)'),
        ((4, 8), (1,), ValueError, '2 boundaries and 1 batch_sizes: give one batch size for each'),
        (8, (1,), TypeError, 'bucketed: boundaries must be a sequence of int, got 8'),
        ((8,), ('a',), TypeError, r"batch_sizes must be a sequence of int, got \('a',\)"),
    ],
)
def test_wrong_buckets(boundaries, batch_sizes, error, message):
    with pytest.raises(error, match=message):
        data.bucketed(['abc'], boundaries, batch_sizes)


def test_batches_of_documents():
    with pytest.raises(TypeError, match=r'the source holds bytes: use data\.packed or'):
        data.batches(DOCUMENTS, 4)


def test_batches_of_two_shapes():
    examples = [tuple(np.zeros(n, np.int32) for _ in range(3)) for n in (3, 4)]
    message = (
        r'of one shape, and the source holds \[\(3,\), \(3,\), \(3,\)\] and \[\(4,\), .*bucketed'
    )
    with pytest.raises(ValueError, match=message):
        next(iter(data.batches(examples, 2, shuffle=False)))


def test_a_vocabulary_that_overflows():
    class Wide(data.ByteTokenizer):
        vocab_size = 100

    message = r'Wide gave the id 200, but its vocab_size is 100: ids must be in 0 … 99'
    with pytest.raises(ValueError, match=message):
        data.packed([bytes([200])], 4, 1, Wide())
    with pytest.raises(ValueError, match=message):
        next(iter(data.packed([bytes([200])], 4, 1, Wide(), streaming=True)))


@every_pipeline
def test_grain_is_an_extra(make, monkeypatch):
    monkeypatch.setitem(sys.modules, 'grain', None)
    with pytest.raises(UsageError, match=r'grain is not installed: .*layercomb\[train\]'):
        make()
