"""`LSTM` and `GRU` against a loop and against PyTorch, in decoding, in packed rows."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, transforms
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype

B, L, D, N = 2, 7, 3, 4
TORCH = np.load(pathlib.Path(__file__).parents[2] / 'data' / 'recurrent' / 'torch.npz')
LAYERS = {'LSTM': tl.LSTM, 'GRU': tl.GRU}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(name):
    """A layer, and weights none of which is 0."""
    layer = LAYERS[name](N)
    weights, _ = layer.init((shape_dtype((B, L, D)),), jax.random.key(0))
    return layer, jax.tree.map(lambda w: w + normal(*w.shape, seed=w.ndim) / 3, weights)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_loop(weights, x):
    """The equations, one position after the other."""
    h = c = np.zeros((len(x), N))
    out = []
    for t in range(x.shape[1]):
        parts = x[:, t] @ weights['kernel'] + weights['bias'] + h @ weights['recurrent_kernel']
        i, f, g, o = np.split(parts, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out, 1)


def gru_loop(weights, x):
    h, out = np.zeros((len(x), N)), []
    for t in range(x.shape[1]):
        r, z, n = np.split(x[:, t] @ weights['kernel'] + weights['bias'], 3, -1)
        by_r, by_z, by_n = np.split(h @ weights['recurrent_kernel'], 3, -1)
        r, z = sigmoid(r + by_r), sigmoid(z + by_z)
        n = np.tanh(n + r * (by_n + weights['recurrent_bias']))
        h = (1 - z) * n + z * h
        out.append(h)
    return np.stack(out, 1)


LOOPS = {'LSTM': lstm_loop, 'GRU': gru_loop}


def of_torch(place, suffix='', d=''):
    """Our weights, or with ``d='d_'`` their gradients, of what PyTorch has of one direction."""
    kernel, recurrent, b_in, b_hidden = (
        TORCH[f'{place}/{d}{name}_l0{suffix}']
        for name in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh')
    )
    found = {'kernel': kernel.T, 'recurrent_kernel': recurrent.T}
    if place.startswith('LSTM'):
        return {**found, 'bias': b_in if d else b_in + b_hidden}
    summed = np.pad(b_hidden[: 2 * N], (0, N))
    return {**found, 'bias': b_in if d else b_in + summed, 'recurrent_bias': b_hidden[2 * N :]}


def answered(layer, weights, place, *more):
    """The outputs, and the gradients of weights and x, of what PyTorch was given."""

    def run(weights, x):
        (y,), _ = layer.apply(weights, {}, (x, *more), mode=Mode.TRAIN)
        return jnp.sum(y * TORCH[f'{place}/dy'] * real(y, *more)), y

    return jax.grad(run, (0, 1), has_aux=True)(weights, jnp.asarray(TORCH[f'{place}/x']))


def real(y, mask=None):
    """1 at each position that is no padding; PyTorch leaves 0 in its place."""
    return jnp.ones(()) if mask is None else mask[..., None].astype(y.dtype)


def assert_near(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.parametrize('name', LAYERS)
def test_is_its_equations(name):
    layer, weights = made(name)
    x = normal(B, L, D)
    (y,), _ = layer.apply(weights, {}, (x,))
    assert_near(y, LOOPS[name](weights, x))


@pytest.mark.parametrize('name', LAYERS)
def test_answers_as_torch_does_and_has_its_gradients(name):
    gradients, y = answered(LAYERS[name](N), of_torch(name), name)
    assert_near(y, TORCH[f'{name}/y'])
    assert_near(gradients, (of_torch(name, d='d_'), TORCH[f'{name}/d_x']))


@pytest.mark.parametrize('name', LAYERS)
def test_answers_as_torch_does_both_ways_with_padding_at_the_end(name):
    place = f'{name} both'
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])
    layer = tl.Bidirectional(LAYERS[name](N), masked=True)

    def both(d=''):
        return {'forward': of_torch(place, d=d), 'backward': of_torch(place, '_reverse', d)}

    gradients, y = answered(layer, both(), place, mask)
    assert_near(y * real(y, mask), TORCH[f'{place}/y'])
    assert_near(gradients, (both('d_'), TORCH[f'{place}/d_x']))


@pytest.mark.parametrize('name', LAYERS)
def test_rows_go_back_to_where_their_prompts_end(name):
    layer, weights = made(name)
    x = normal(B, L, D)
    (whole,), _ = layer.apply(weights, {}, (x,))
    state = lc.init_state(layer, shape_dtype(x.shape))
    _, state = layer.apply(weights, state, (x[:, :5],), mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([5, 2]))
    new = jnp.stack([x[0, 5:7], x[1, 2:4]])
    (y,), _ = layer.apply(weights, state, (new,), mode=Mode.PREDICT)
    assert_near(y, jnp.stack([whole[0, 5:], whole[1, 2:4]]))


def test_the_gate_that_keeps_the_memory_begins_open():
    for layer in (tl.LSTM(N, forget_bias=2.5), tl.GRU(N)):
        weights, _ = layer.init((shape_dtype((B, L, D)),), jax.random.key(0))
        assert (weights['bias'][N : 2 * N] == layer.forget_bias).all()
        assert (weights['bias'] != 0).sum() == N
        square = weights['recurrent_kernel'][:, :N]
        np.testing.assert_allclose(square.T @ square, np.eye(N), atol=1e-5)


@pytest.mark.parametrize('name', LAYERS)
def test_refuses_what_it_cannot_read(name):
    layer, weights = made(name)
    state = lc.init_state(layer, shape_dtype((B, L, D)))
    with pytest.raises(ValueError, match='the cache holds 7 positions, 0 are taken and 8 more'):
        layer.apply(weights, state, (normal(B, 8, D),), mode=Mode.PREDICT)
    with pytest.raises(ValueError, match=rf'{name} takes \(batch, length, features\)'):
        layer.init((shape_dtype((B, D)),), jax.random.key(0))
    with pytest.raises(TypeError, match=f'{name} takes floating-point vectors'):
        layer.init((shape_dtype((B, L, D), 'int32'),), jax.random.key(0))


@pytest.mark.parametrize('name', LAYERS)
def test_the_product_of_inputs_may_be_narrow(name):
    layer, x = tl.Serial(LAYERS[name](64)), normal(B, L, 64)
    weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
    (whole,), _ = layer.apply(weights, {}, (x,))
    narrow, rounded = transforms.quantize(layer, weights, bits=8)
    key = name.lower()
    assert rounded[key]['kernel'].dtype != jnp.float32
    assert rounded[key]['recurrent_kernel'].dtype == jnp.float32
    (y,), _ = narrow.apply(rounded, {}, (x,))
    np.testing.assert_allclose(y, whole, atol=0.02)
