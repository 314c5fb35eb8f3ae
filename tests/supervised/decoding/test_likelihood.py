"""The likelihood of a text, against a sum over windows."""

import math

import jax
import numpy as np
import pytest

from layercomb import Model, models, shape_dtype
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.supervised.decoding.likelihood import likelihood

TEXT = 'ships, and the harbour master — counted 17 of them'


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(256, 8, 8, n_layers=1, n_heads=2, max_len=32)
    return Model(net).init(shape_dtype((1, 8), 'int32'))


class Surrounded(ByteTokenizer):
    """Bytes, with a token before and after a text."""

    def encode(self, text):
        return np.concatenate([[1], super().encode(text), [2]])


@pytest.mark.parametrize('window', [7, 32])
def test_every_token_but_the_first_is_scored_once(model, window):
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    total = 0.0
    for first in range(0, len(ids) - 1, window):
        piece = ids[first : first + window + 1]
        scores = jax.nn.log_softmax(model(piece[None, :-1])[0])
        total += float(sum(scores[i, token] for i, token in enumerate(piece[1:])))
    found = likelihood(model, TEXT, ByteTokenizer(), window=window)
    assert found['tokens'] == len(ids) - 1
    np.testing.assert_allclose(found['nats_per_token'], -total / (len(ids) - 1), rtol=1e-4)
    np.testing.assert_allclose(found['perplexity'], math.exp(found['nats_per_token']), rtol=1e-6)
    np.testing.assert_allclose(found['bits_per_byte'], -total / math.log(2) / len(ids), rtol=1e-4)


def test_mistakes(model):
    for tokenizer in (ByteTokenizer(), Surrounded()):
        with pytest.raises(UsageError, match='tokens: give one of at least two'):
            likelihood(model, '', tokenizer)
    with pytest.raises(UsageError, match="the window of 33 exceeds the model's 32: give a smaller"):
        likelihood(model, TEXT, ByteTokenizer(), window=33)
    with pytest.raises(ValueError, match='window must be at least 1'):
        likelihood(model, TEXT, ByteTokenizer(), window=0)
