"""Embeddings of texts, and the likelihood of a text, beside plain formulas."""

import math

import numpy as np
import pytest

from layercomb import Model, models, shape_dtype
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.supervised import decoding


@pytest.fixture(scope='module')
def encoder():
    net = models.BERT(256, 16, 24, n_layers=2, n_heads=2, max_len=40, head='mean')
    ids, mask = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    return Model(net).init((ids, mask))


@pytest.fixture(scope='module')
def writer():
    net = models.TransformerLM(256, 16, 24, n_layers=1, n_heads=2, max_len=24)
    return Model(net).init(shape_dtype((1, 8), 'int32'))


def test_texts_do_not_depend_on_those_beside_them(encoder):
    texts = ['a long text, and longer', 'b', 'short', 'of middle length']
    together = decoding.embed(encoder, ByteTokenizer(), texts, batch_size=3)
    alone = [decoding.embed(encoder, ByteTokenizer(), [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    whole = encoder(ByteTokenizer().encode(texts[0])[None], np.ones((1, len(texts[0])), bool))
    np.testing.assert_allclose(together[0], whole[0], atol=1e-6)
    assert decoding.embed(encoder, ByteTokenizer(), []).size == 0


def test_long_texts_are_cut(encoder):
    one, other = decoding.embed(encoder, ByteTokenizer(), ['x' * 40, 'x' * 60])
    np.testing.assert_allclose(one, other, atol=1e-6)
    cut = decoding.embed(encoder, ByteTokenizer(), ['abcdef'], max_tokens=3)
    np.testing.assert_allclose(cut, decoding.embed(encoder, ByteTokenizer(), ['abc']), atol=1e-6)


def test_what_gives_no_embedding_is_refused(writer, encoder):
    with pytest.raises(UsageError, match='a model of ids and a mask, and this one has 1 inputs'):
        decoding.embed(writer, ByteTokenizer(), ['a'])
    with pytest.raises(UsageError, match='at least one token'):
        decoding.embed(encoder, ByteTokenizer(), ['a', ''])
    hidden = models.BERT(256, 16, 24, n_layers=1, n_heads=2, max_len=40, head='hidden')
    ids, mask = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    with pytest.raises(UsageError, match='gives a vector for each text, and this one gives 3'):
        decoding.embed(Model(hidden).init((ids, mask)), ByteTokenizer(), ['a'])


def test_likelihood_is_that_of_windows(writer):
    text = 'the harbour master counted the ships'
    measured = decoding.likelihood(writer, text, ByteTokenizer(), window=10)
    ids = ByteTokenizer().encode(text)
    total = 0.0
    for i in range(0, len(ids) - 1, 10):
        piece = ids[i : i + 11]
        logits = np.asarray(writer(piece[None, :-1]))[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += log_p[np.arange(len(piece) - 1), piece[1:]].sum()
    n = len(ids) - 1
    assert measured['tokens'] == n
    assert measured['nats_per_token'] == pytest.approx(-total / n, rel=1e-4)
    assert measured['perplexity'] == pytest.approx(math.exp(-total / n), rel=1e-4)
    assert measured['bits_per_byte'] == pytest.approx(-total / math.log(2) / len(text), rel=1e-4)
    # By default a window is as long as the model reaches.
    longest = decoding.likelihood(writer, text, ByteTokenizer(), window=24)
    assert decoding.likelihood(writer, text, ByteTokenizer()) == longest


def test_likelihood_refuses_what_cannot_be_scored(writer):
    with pytest.raises(UsageError, match='the text has 1 tokens: give one of at least two'):
        decoding.likelihood(writer, 'a', ByteTokenizer())
    with pytest.raises(UsageError, match="the window of 40 exceeds the model's 24"):
        decoding.likelihood(writer, 'a' * 90, ByteTokenizer(), window=40)
    with pytest.raises(ValueError, match='window'):
        decoding.likelihood(writer, 'abc', ByteTokenizer(), window=0)
