from __future__ import annotations

import numpy as np
import pytest

from layercomb import data


@pytest.mark.parametrize('index', range(20))
def test_duplication_is_the_task_of_the_paper(index):
    inputs, targets, weights = data.duplication(length=16, vocab_size=5)[index]
    word = inputs[1:8].tolist()
    assert inputs.tolist() == [0, *word, 0, *word]
    assert all(1 <= symbol < 5 for symbol in word)
    for t in range(16):
        following = inputs[t + 1] if t + 1 < 16 else 0
        assert targets[t] == following
        assert weights[t] == (1 if 8 <= t + 1 < 16 else 0)
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


def test_the_second_half_can_be_told_from_the_first():
    inputs, targets, weights = data.duplication(length=64)[3]
    for t in np.flatnonzero(weights):
        assert targets[t] == inputs[t + 1 - 32]


def test_copy_has_all_lengths_and_weighs_the_copy():
    lengths = set()
    for inputs, targets, weights in [data.copy(max_length=6, vocab_size=9)[i] for i in range(99)]:
        n = inputs.tolist().index(1)
        word = inputs[:n].tolist()
        assert all(2 <= symbol < 9 for symbol in word)
        sequence = [*word, 1, *word] + [0] * (12 + 1 - (2 * n + 1))
        assert inputs.tolist() == sequence[:-1] and targets.tolist() == sequence[1:]
        assert weights.tolist() == [float(n <= t < 2 * n) for t in range(12)]
        lengths.add(n)
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_an_example_depends_on_seed_and_index_alone():
    for make in (data.duplication, data.copy):
        assert make(seed=1) == make(seed=1)
        a, b = make(seed=1)[7], make(seed=1, n_examples=8)[7]
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
        assert (make(seed=2)[7][0] != a[0]).any() and (make(seed=1)[6][0] != a[0]).any()


def test_they_end():
    source = data.duplication(length=4, n_examples=3)
    assert len(source) == 3 and len(list(source)) == 3
    assert (source[-1][0] == source[2][0]).all()


@pytest.mark.parametrize(
    ('make', 'arguments', 'error', 'message'),
    [
        (
            data.duplication,
            {'length': 7},
            ValueError,
            'length must be even, for two .*, got 7',
        ),
        (
            data.duplication,
            {'length': 2},
            ValueError,
            'duplication: length must be at least 4, got 2',
        ),
        (data.duplication, {'length': '8'}, TypeError, "length must be an int, got '8'"),
        (data.duplication, {'vocab_size': 1}, ValueError, 'vocab_size must be at least 2, got 1'),
        (data.duplication, {'n_examples': 0}, ValueError, 'n_examples must be at least 1, got 0'),
        (
            data.duplication,
            {'seed': -1},
            ValueError,
            'seed must be at least 0 and at most 4294967295, got -1',
        ),
        (
            data.copy,
            {'min_length': 65},
            ValueError,
            'copy: min_length must be at least 1 and at most 64, got 65',
        ),
        (data.copy, {'vocab_size': 2.5}, TypeError, r'vocab_size must be an int, got 2\.5'),
    ],
)
def test_wrong_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)
