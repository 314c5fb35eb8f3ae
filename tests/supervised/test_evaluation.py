"""What `evaluate` refuses to give a number for. What it measures is tested with the loop."""

import jax
import numpy as np
import pytest
from tiny_run import LOSS, PlainData

from layercomb import UsageError, data, shape_dtype, tl
from layercomb.supervised import EvalTask, evaluate

NET = tl.Serial(tl.Embedding(16, 8), tl.Dense(16))


@pytest.fixture(scope='module')
def measure():
    """The metrics of fresh weights on a list of batches."""
    weights, state = NET.init((shape_dtype((4, 6), 'int32'),), jax.random.key(0))
    return lambda data: evaluate(NET, weights, state, EvalTask(data, LOSS))


def test_tokens_of_every_batch_are_checked(measure):
    (x, y, w), (x2, y2, w2) = PlainData(2)
    assert np.isfinite(measure([(x, y, w), (x2, y2, w2)])['valid/loss'])
    with pytest.raises(UsageError, match=r"EvalTask 'valid', batch 2: token id 16 is outside the"):
        measure([(x, y, w), (x2 + (x2 == 15), y2, w2)])


@pytest.mark.parametrize('weight', [np.inf, np.nan])
def test_a_sum_that_is_not_finite_names_the_metric(measure, weight):
    (x, y, w), (x2, y2, w2) = PlainData(2)
    with pytest.raises(UsageError, match=r'^valid/loss: the sum over the data is (nan|inf) .*look'):
        measure([(x, y, w), (x2, y2, np.full_like(w2, weight))])


def test_infinities_of_both_signs(measure):
    (x, y, w), (x2, y2, w2) = PlainData(2)
    with pytest.raises(UsageError, match=r'^valid/loss: the sum over the data is nan'):
        measure([(x, y, w * 0 + np.inf), (x2, y2, w2 * 0 - np.inf)])


def test_no_weight_at_all(measure):
    x, y, w = next(iter(PlainData()))
    with pytest.raises(UsageError, match=r'^valid/loss: all loss weights are 0.*: check the data'):
        measure([(x, y, 0 * w)])


def test_a_later_batch_that_the_model_refuses():
    net = tl.Serial(tl.Embedding(16, 8), tl.LearnedPositions(6), tl.Dense(16))
    weights, state = net.init((shape_dtype((4, 6), 'int32'),), jax.random.key(0))
    short = next(iter(PlainData()))
    long = tuple(np.concatenate([x, x], 1) for x in short)
    said = (
        r"EvalTask 'valid', batch 2 has shape \(4, 12\), the first one \(4, 6\), and does not fit "
        r'the model: .*12 .*6'
    )
    with pytest.raises(UsageError, match=said):
        evaluate(net, weights, state, [EvalTask([short, long], LOSS)])
    with pytest.raises(ValueError, match='12'):
        evaluate(net, weights, state, [EvalTask([long], LOSS)])


def test_an_element_of_the_data_that_is_like_no_other(measure):
    documents = data.bucketed(['\1\2'] * 6 + [5], [4], [2], shuffle=False, num_epochs=1)
    with pytest.raises(UsageError, match=r"^EvalTask 'valid', batch 4: a document is a str .*: 5$"):
        measure(documents)
