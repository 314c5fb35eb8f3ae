"""Beam search against looking at every continuation there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import UsageError, tl
from layercomb.supervised import decoding
from layercomb.supervised.decoding import beams

V, EOS = 4, 3


def make(**more):
    net = lc.models.TransformerLM(V, 8, 16, n_layers=1, n_heads=2, max_len=32, **more)
    net = tl.Serial(net, tl.Fn('Sharpened', sharpened, position_wise=True))
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 5)


def sharpened(logits):
    return 3 * logits


def every(model, prompt, n_tokens, length_penalty, eos=EOS):
    """All hypotheses of a prompt and their scores, the best first."""
    ways = np.array(list(itertools.product(range(V), repeat=n_tokens)))
    texts = np.concatenate([np.tile(prompt, (len(ways), 1)), ways], 1)
    logits = np.asarray(model(jnp.asarray(texts)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for row, way in enumerate(ways):
        length = way.tolist().index(eos) + 1 if eos in way else n_tokens
        total = sum(log_p[row, len(prompt) + i - 1, way[i]] for i in range(length))
        kept = tuple(way[:length]) + (eos,) * (n_tokens - length)
        found[kept] = total / length**length_penalty
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize('length_penalty', [0.0, 1.0, 2.5, -0.5])
def test_a_wide_beam_finds_what_an_exhaustive_search_finds(length_penalty):
    model, prompts, n = make(), [[1, 2, 0], [2]], 4
    found = decoding.beam_search(
        model, prompts, n, n_beams=64, n_best=6, length_penalty=length_penalty, eos_id=EOS
    )
    for prompt, tokens, scores in zip(prompts, *found, strict=True):
        expected = every(model, prompt, n, length_penalty)[:6]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-5)
        assert tokens.tolist() == [list(map(int, way)) for way, _ in expected]


def test_without_an_end_all_hypotheses_are_of_full_length():
    model = make()
    found = decoding.beam_search(model, [[1, 2]], 3, n_beams=16, n_best=3)
    expected = every(model, [1, 2], 3, 1.0, eos=V)[:3]
    assert found.tokens[0].tolist() == [list(map(int, way)) for way, _ in expected]


def test_one_beam_is_greedy_and_more_are_no_worse():
    model, prompts = make(), [[1, 2, 3, 1], [0]]
    greedy = decoding.generate(model, prompts, 8, temperature=0)
    one = decoding.beam_search(model, prompts, 8, n_beams=1)
    np.testing.assert_array_equal(one.tokens[:, 0], greedy)
    many = decoding.beam_search(model, prompts, 8, n_beams=4, n_best=2)
    assert (many.scores[:, 0] >= one.scores[:, 0] - 1e-6).all()
    assert (many.scores[:, 0] >= many.scores[:, 1]).all()


def test_a_row_does_not_depend_on_its_batch():
    model = make(attention=tl.LSHSelfAttention(2, n_hashes=2, chunk_len=4))
    both = decoding.beam_search(model, [[1, 2, 3], [0]], 6, n_beams=3, n_best=2, eos_id=EOS)
    alone = decoding.beam_search(model, [[0]], 6, n_beams=3, n_best=2, eos_id=EOS)
    np.testing.assert_array_equal(both.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(both.scores[1], alone.scores[0], rtol=1e-5)


def test_a_hypothesis_has_the_score_that_the_model_gives_it():
    model = make(attention=tl.LSHSelfAttention(2, n_hashes=2, chunk_len=4))
    found = decoding.beam_search(model, [[1, 2, 0]], 6, n_beams=3, n_best=3, length_penalty=0.0)
    texts = np.concatenate([np.tile([1, 2, 0], (3, 1)), found.tokens[0]], 1)
    scores = decoding.score(model, texts, n_given=3)
    np.testing.assert_allclose(scores.totals, found.scores[0], rtol=1e-4)


def test_only_hypotheses_that_exist_are_returned():
    found = decoding.beam_search(make(), [[1], [2]], 1, n_beams=64, n_best=9, eos_id=EOS)
    assert found.tokens.shape == (2, V, 1) and np.isfinite(found.scores).all()
    assert [sorted(row) for row in found.tokens[:, :, 0].tolist()] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize('beam', [[0, 0, 0], [2, 1, 0], [1, 1, 2], [2, 2, 0], [0, 1, 2]])
def test_beams_stay_where_they_are_if_anything_goes_on_from_them(beam):
    order = np.asarray(beams._stay(jnp.array(beam)))
    assert sorted(order) == [0, 1, 2]
    chosen = jnp.array(beam)[order]
    assert all(chosen[i] == i for i in beam)
    state = {'a': jnp.arange(12).reshape(6, 2), 'b': jnp.arange(2)}  # two lines a row
    copied = beams._copied(state, {'a': True, 'b': False}, chosen[None])
    np.testing.assert_array_equal(copied['a'], state['a'].reshape(3, 2, 2)[chosen].reshape(6, 2))
    np.testing.assert_array_equal(copied['b'], state['b'])


def test_other_numbers_are_no_other_program():
    model, sizes = make(), []
    for n, penalty, eos in ((2, 1.0, None), (3, np.float32(0.5), EOS), (np.int64(5), 2, None)):
        decoding.beam_search(model, [[1]], n, n_beams=2, length_penalty=penalty, eos_id=eos)
        sizes.append(beams._run._cache_size())
    assert sizes[0] == sizes[2]


def test_errors():
    model = make()
    for wrong in (np.nan, np.inf, 11):
        with pytest.raises(ValueError, match='length_penalty must be at least -10 and at most 10'):
            decoding.beam_search(model, [[1]], 2, length_penalty=wrong)
    with pytest.raises(ValueError, match='beam_search: n_beams must be at least 1, got 0'):
        decoding.beam_search(model, [[1]], 2, n_beams=0)
    with pytest.raises(ValueError, match='n_best must be 1 to n_beams=2, got 3'):
        decoding.beam_search(model, [[1]], 2, n_beams=2, n_best=3)
    with pytest.raises(UsageError, match='max_len is 32'):
        decoding.beam_search(model, [[1]], 60)
