"""`recall` and `needles`: what is asked was said before, far away, and nowhere else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from layercomb import data

TEXT = ['def f(x):\n    return x + 1\n' * 200]


@pytest.mark.parametrize('index', [0, 7])
def test_every_pair_comes_twice_and_its_value_is_asked_once(index):
    inputs, targets, weights = data.recall(n_pairs=16, n_keys=40, n_values=8, seed=3)[index]
    assert inputs.shape == targets.shape == weights.shape == (64,)
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
    pairs, again = inputs[:32].reshape(-1, 2), inputs[32:].reshape(-1, 2)
    assert sorted(map(tuple, pairs)) == sorted(map(tuple, again))
    assert len(set(pairs[:, 0])) == 16
    assert pairs[:, 0].min() >= 1 and pairs[:, 0].max() <= 40
    assert pairs[:, 1].min() >= 41 and pairs[:, 1].max() <= 48
    np.testing.assert_array_equal(np.flatnonzero(weights), 32 + 2 * np.arange(16))
    np.testing.assert_array_equal(targets[weights > 0], again[:, 1])
    np.testing.assert_array_equal(targets[:-1], inputs[1:])


def test_examples_depend_on_seed_and_number_alone():
    a, b = data.recall(seed=1), data.recall(seed=1)
    np.testing.assert_array_equal(a[5][0], b[5][0])
    assert (a[5][0] != a[6][0]).any() and (a[5][0] != data.recall(seed=2)[5][0]).any()


@pytest.mark.parametrize('index', range(3))
def test_codes_are_hidden_in_text_and_asked_for_at_the_end(index):
    inputs, targets, weights = data.needles(TEXT, 1024, n_needles=5, n_asked=2)[index]
    assert inputs.shape == (1024,)
    text = bytes([*inputs.tolist(), targets[-1]]).decode()
    said = re.findall(r'\nThe code of (\w+) is (\d{4})\.\n', text)
    assert len(said) == 7 and len(set(said)) == 5  # two of them a second time
    assert text.endswith(f'The code of {said[-1][0]} is {said[-1][1]}.\n')
    assert set(said[-2:]) < set(said[:5])
    answers = bytes(targets[weights > 0].tolist()).decode()
    assert answers == said[-2][1] + said[-1][1]
    assert 'return x' in text


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: data.recall(n_pairs=9, n_keys=8), '9 pairs need as many keys'),
        (lambda: data.recall(n_pairs=0), 'n_pairs'),
        (lambda: data.needles(TEXT, 256, n_needles=2, n_asked=3), 'n_asked=3 is more'),
        (lambda: data.needles(TEXT, 128, n_needles=9), 'leave -.* of 128 tokens'),
        (
            lambda: data.needles(['short'], 1024),
            'take a greater length, fewer needles, or more text',
        ),
        (lambda: data.needles(TEXT, 64), 'length'),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
