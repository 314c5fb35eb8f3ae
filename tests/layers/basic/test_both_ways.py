"""`Bidirectional` and `Reverse`: order of positions, padding, packed rows, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, transforms
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype
from layercomb.supervised import decoding

X = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)


def run(layer, *inputs, weights=None):
    return np.asarray(layer.apply(weights or {}, {}, tuple(map(jnp.asarray, inputs)))[0][0])


def reversed_slowly(x, mask, ids):
    """Each document's real positions in the other order, by lists."""
    y = np.array(x)
    for row, (real, its) in enumerate(zip(mask, ids, strict=True)):
        for document in set(its):
            places = np.flatnonzero(real & (its == document))
            y[row, places] = x[row, places[::-1]]
    return y


@pytest.mark.parametrize('seed', range(4))
def test_reverse_is_what_lists_give_and_twice_it_is_nothing(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((2, 6)) < 0.6
    ids = np.sort(rng.integers(0, 3, (2, 6)), 1).astype(np.int32)
    whole, plain = np.ones_like(mask), np.zeros_like(ids)
    masked, packed = tl.Reverse(masked=True), transforms.segmented(tl.Reverse())
    both = transforms.segmented(masked)
    np.testing.assert_array_equal(run(tl.Reverse(), X), X[:, ::-1])
    np.testing.assert_array_equal(run(masked, X, mask), reversed_slowly(X, mask, plain))
    np.testing.assert_array_equal(run(packed, X, ids), reversed_slowly(X, whole, ids))
    np.testing.assert_array_equal(run(both, X, mask, ids), reversed_slowly(X, mask, ids))
    np.testing.assert_array_equal(run(both, run(both, X, mask, ids), mask, ids), X)


def test_padding_at_the_end_reaches_no_real_position():
    net = tl.Bidirectional(tl.Serial(tl.SRU(4), tl.LSTM(3)), masked=True)
    mask = np.arange(6)[None] < np.array([[6], [4]])
    weights, _ = net.init(lc.signature_of((X, mask)), jax.random.key(0))
    y = run(net, X, mask, weights=weights)
    alone = run(net, X[1:, :4], mask[1:, :4], weights=weights)
    np.testing.assert_allclose(y[1:, :4], alone, atol=1e-6)
    other = X.copy()
    other[1, 4:] = 9.0
    np.testing.assert_array_equal(run(net, other, mask, weights=weights)[mask], y[mask])


def test_joins_a_run_forwards_and_one_backwards():
    net = tl.Bidirectional(tl.LSTM(3), tl.GRU(3), join=tl.Add())
    weights, _ = net.init(lc.signature_of(X), jax.random.key(0))
    assert set(weights) == {'forward', 'backward'}
    ahead = run(tl.LSTM(3), X, weights=weights['forward'])
    back = run(tl.GRU(3), X[:, ::-1], weights=weights['backward'])[:, ::-1]
    np.testing.assert_allclose(run(net, X, weights=weights), ahead + back, atol=1e-6)


@pytest.mark.parametrize(
    'text',
    [
        'Bidirectional(LSTM(3))',
        'Bidirectional(LSTM(3), GRU(4))',
        'Bidirectional(LSTM(3), masked=True)',
        'Bidirectional(LSTM(3), join=Add())',
    ],
)
def test_is_printed_as_it_is_written(text):
    assert repr(eval(text, vars(tl))) == text


def test_an_encoder_runs_once_and_decoding_step_by_step_is_refused():
    net = tl.Bidirectional(tl.LSTM(3))
    weights, _ = net.init(lc.signature_of(X), jax.random.key(0))
    once = tl.Once(net)
    state = lc.init_state(once, shape_dtype(X.shape))
    (y,), _ = once.apply(weights, state, (X,), mode=Mode.PREDICT)
    np.testing.assert_allclose(y, run(net, X, weights=weights), atol=1e-6)
    with pytest.raises(ValueError, match='Reverse begins with the last position, which decoding'):
        lc.init_state(net, shape_dtype(X.shape))
    model = lc.Model(tl.Serial(tl.Embedding(11, 4), net, tl.Dense(11)))
    model.init(np.zeros((1, 4), np.int32))
    with pytest.raises(lc.UsageError, match='Bidirectional with causal=False sees later positions'):
        decoding.generate(model, [[1, 2]], 2)


def test_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match='forward= must take 1 and give 1, and Add takes 2 and giv'):
        tl.Bidirectional(tl.Add())
    with pytest.raises(TypeError, match='join= must take 2 and give 1, and Dense takes 1'):
        tl.Bidirectional(tl.LSTM(3), join=tl.Dense())
    with pytest.raises(TypeError, match='reverse= must take 2 and give 1, and Reverse takes 1'):
        tl.Bidirectional(tl.LSTM(3)).replace(masked=True)
    with pytest.raises(ValueError, match=r'Reverse takes \(batch, length, …\), got the shape \(3,'):
        run(tl.Reverse(), np.zeros(3))
    with pytest.raises(ValueError, match=r'mask must be bool\(2, 6\), got float32'):
        run(tl.Reverse(masked=True), X, np.ones((2, 6), np.float32))
