import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import UsageError, tl
from layercomb.supervised import decoding
from layercomb.supervised.decoding import scoring

V = 11


def make(attention=None):
    net = lc.models.ReformerLM(
        V, 16, 32, 2, 2, max_len=96, attention=attention or tl.LSHSelfAttention(2, chunk_len=8)
    )
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 3)


@pytest.mark.parametrize('n_given', [1, 3])
def test_scores_are_log_probabilities(n_given):
    model, texts = make(), [[1, 2, 3, 4, 5, 6, 10], [7, 0, 1, 9], [3] * 90]
    scores = decoding.score(model, texts, n_given=n_given)
    assert scores.tokens.shape == (3, 90)
    for text, tokens, total in zip(texts, *scores, strict=True):
        log_p = np.asarray(jax.nn.log_softmax(model(jnp.array([text]))[0]))
        expected = [log_p[i - 1, text[i]] if i >= n_given else 0 for i in range(len(text))]
        np.testing.assert_allclose(tokens[: len(text)], expected, rtol=1e-4, atol=1e-5)
        assert not tokens[len(text) :].any()
        np.testing.assert_allclose(total, sum(expected), rtol=1e-4)


def test_logits_of_a_whole_text_never_exist(monkeypatch):
    model, tokens = make(), jnp.zeros((1, 90), jnp.int32)
    monkeypatch.setattr(scoring, '_TOGETHER', 8)
    values = tokens, tokens, jnp.ones((1, 90))
    program = jax.make_jaxpr(lambda *x: scoring._losses(model.layer, *x))
    assert f'90,{V}]' not in str(program(model.weights, model.state, values))


def test_errors():
    model = make()
    with pytest.raises(UsageError, match='a text has 2 tokens, of which 2 are given'):
        decoding.score(model, [[1, 2], [1, 2, 3]], n_given=2)
    with pytest.raises(UsageError, match=r"has 120 tokens, and the model's max_len is 96"):
        decoding.score(model, [[1] * 120])
    with pytest.raises(UsageError, match='token id 11 is outside the vocabulary'):
        decoding.score(model, [[1, 11]])
    with pytest.raises(ValueError, match='score: n_given must be at least 1, got 0'):
        decoding.score(model, [[1, 2]], n_given=0)
    with pytest.raises(UsageError, match='causal=False sees later positions'):
        decoding.score(make(tl.SelfAttention(2, causal=False)), [[1, 2]])
    with pytest.raises(UsageError, match='a text holds ids that no vocabulary has'):
        decoding.score(model, [[1, 2**32 + 5]])
