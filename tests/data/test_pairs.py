"""Pairs of texts as examples, and the copy task made of pairs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import jax
import numpy as np
import pytest

import layercomb as lc
from layercomb import data, losses, models, tl

TEXTS = [('', ''), (b'abc', 'né'), ('longer than that', 'and so is this'), ('abcde', 'abcdef')]
DTYPES = [np.int32, np.int32, bool, np.int32, np.float32]


def slow(source, target, m, n):
    """An example, token by token, for bytes."""
    source, target = ([*x] if isinstance(x, bytes) else [*x.encode()] for x in (source, target))
    said = [0, *target, 0]
    there = min(len(said) - 1, n)
    return [
        [source[i] if i < len(source) else 0 for i in range(m)],
        [said[i] if i < there else 0 for i in range(n)],
        [i < len(source) or i == 0 for i in range(m)],
        [said[i + 1] if i < there else 0 for i in range(n)],
        [float(i < there) for i in range(n)],
    ]


@pytest.mark.parametrize(('m', 'n'), [(1, 1), (5, 3), (6, 7), (40, 40)])
def test_an_example(m, n):
    for pair, made in zip(TEXTS, data.pairs(TEXTS, m, n), strict=True):
        assert [x.tolist() for x in made] == slow(*pair, m, n)
        assert [x.dtype for x in made] == DTYPES


def test_without_a_mask():
    made, masked = data.pairs(TEXTS, 5, 3, masked=False)[1], data.pairs(TEXTS, 5, 3)[1]
    assert len(made) == 4
    for a, b in zip(made, (*masked[:2], *masked[3:]), strict=True):
        np.testing.assert_array_equal(a, b)


@dataclass(frozen=True)
class Letters:
    """Another tokenizer, whose separator is no zero."""

    vocab_size: int = 28
    eos_id: int = 27

    def encode(self, text):
        return np.array([ord(x) - 96 for x in text], np.int32)


def test_another_tokenizer_has_its_own_separator():
    source, inputs, _, targets, weights = data.pairs([('ab', 'c')], 3, 3, Letters())[0]
    assert (source.tolist(), inputs.tolist(), targets.tolist()) == (
        [1, 2, 0],
        [27, 3, 0],
        [3, 27, 0],
    )
    assert weights.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match='Letters gave the id 29, but its vocab_size is 28'):
        data.pairs([('}', 'c')], 3, 3, Letters())[0]


def test_pairs_are_made_when_asked_for_pickled_and_batched():
    source = data.pairs([('ab', 'c'), 'no pair'], 3, 2)
    assert len(source) == 2
    again = pickle.loads(pickle.dumps(source))
    assert all((a == b).all() for a, b in zip(again[0], source[0], strict=True))
    with pytest.raises(TypeError, match=r"pairs of documents, and the source holds 'no pair': use"):
        source[1]
    batches = list(data.batches(data.pairs(TEXTS[:3], 3, 2), 2, shuffle=False, num_epochs=1))
    assert [x.shape for x in batches[0]] == [(2, 3), (2, 2), (2, 3), (2, 2), (2, 2)]
    assert [x.dtype for x in batches[0]] == DTYPES
    assert batches[1][4][1].sum() == 0  # the last batch is filled


def test_copying_is_pairs_of_equal_words():
    lengths = set()
    for made in [data.copy_pairs(6, 9, min_length=2)[i] for i in range(60)]:
        word = made[0][made[2]]
        assert word.min() >= 1 and word.max() < 9
        text = bytes(word.astype(np.uint8))
        for ours, expected in zip(made, data.pairs([(text, text)], 6, 6)[0], strict=True):
            np.testing.assert_array_equal(ours, expected)
            assert ours.dtype == expected.dtype
        lengths.add(len(word))
    assert lengths == {2, 3, 4, 5, 6}
    assert len(data.copy_pairs(n_examples=7)) == 7
    assert (data.copy_pairs(seed=1)[3][0][:9] != data.copy_pairs(seed=2)[3][0][:9]).any()


def test_they_are_what_the_reformer_takes_with_its_loss():
    batch = next(iter(data.batches(data.copy_pairs(4, 9), 2)))
    net = models.Reformer(9, 8, 8, 1, 1, n_heads=2, max_len=4, chunk_len=4, masked=True)
    scored = losses.attach(net, tl.CrossEntropyLoss())
    assert scored.n_in == len(batch) == 5

    def run(key, *batch):
        weights, state = scored.init(lc.signature_of(batch), key)
        return scored.apply(weights, state, batch)[0]

    values, weights = jax.eval_shape(run, jax.random.key(0), *batch)
    assert values.shape == weights.shape == (2, 4)


@pytest.mark.parametrize(
    ('make', 'arguments', 'error', 'message'),
    [
        (data.pairs, (TEXTS, 0, 3), ValueError, 'pairs: source_length must be at least 1, got 0'),
        (data.pairs, (TEXTS, 3, '3'), TypeError, "pairs: target_length must be an int, got '3'"),
        (data.pairs, (TEXTS, 3, 3, 'bytes'), TypeError, 'pairs: tokenizer must have encode'),
        (data.pairs, ([], 3, 3), ValueError, 'pairs: source is empty: give at least one'),
        (
            data.pairs,
            ('text', 3, 3),
            TypeError,
            "pairs: source must be a sequence of documents .*, got 'text'",
        ),
        (data.copy_pairs, (4, 1), ValueError, 'copy_pairs: vocab_size must be at least 2, got 1'),
        (
            data.copy_pairs,
            (4, 9, 5),
            ValueError,
            'min_length must be at least 1 and at most 4, got 5',
        ),
    ],
)
def test_wrong_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(*arguments)
    with pytest.raises(TypeError, match='masked must be a bool, got 1'):
        data.pairs(TEXTS, 3, 3, masked=1)
