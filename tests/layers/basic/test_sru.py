"""The simple recurrent unit against a loop, in decoding, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.core.layer import init_state
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype

B, L, D = 2, 7, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(n_units=None):
    layer = tl.SRU(n_units)
    weights, _ = layer.init((shape_dtype((B, L, D)),), jax.random.key(0))
    return layer, {**weights, 'bias': weights['bias'] + normal(*weights['bias'].shape)}


def loop(weights, x, n):
    """The equations, one position after the other."""
    c, out = jnp.zeros((len(x), n)), []
    for t in range(x.shape[1]):
        z, f, r, *other = jnp.split(
            x[:, t] @ weights['kernel'] + weights['bias'], len(weights['bias']) // n, -1
        )
        f, r = jax.nn.sigmoid(f), jax.nn.sigmoid(r)
        c = f * c + (1 - f) * z
        out.append(r * jnp.tanh(c) + (1 - r) * (other[0] if other else x[:, t]))
    return jnp.stack(out, 1)


@pytest.mark.parametrize('n', [pytest.param(D, marks=pytest.mark.slow), 3])
def test_is_its_equations_and_their_gradient(n):
    layer, weights = made(n)
    x = normal(B, L, D)

    def total(f):
        return lambda w, x: jnp.sum(jnp.sin(f(w, x)))

    ours = total(lambda w, x: layer.apply(w, {}, (x,))[0][0])
    slow = total(lambda w, x: loop(w, x, n))
    got = jax.value_and_grad(ours, (0, 1))(weights, x)
    wanted = jax.value_and_grad(slow, (0, 1))(weights, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.slow  # as all layers do in test_conformance.py
def test_decodes_what_it_evaluates_and_is_causal():
    layer, weights = made(3)
    x = normal(B, L, D)
    (whole,), _ = layer.apply(weights, {}, (x,))
    state, parts = init_state(layer, shape_dtype(x.shape)), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 7)):
        (y,), state = layer.apply(weights, state, (x[:, start:stop],), mode=Mode.PREDICT)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
    (moved,), _ = layer.apply(weights, {}, (x.at[:, 4:].add(1.0),))
    np.testing.assert_allclose(moved[:, :4], whole[:, :4], atol=1e-6)


@pytest.mark.slow
def test_rows_go_back_to_where_their_prompts_end():
    layer, weights = made()
    x = normal(B, L, D)
    state = init_state(layer, shape_dtype(x.shape))
    _, state = layer.apply(weights, state, (x[:, :5],), mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([5, 2]))
    new = jnp.stack([x[0, 5:6], x[1, 2:3]])
    (y,), _ = layer.apply(weights, state, (new,), mode=Mode.PREDICT)
    (whole,), _ = layer.apply(weights, {}, (x,))
    np.testing.assert_allclose(y[:, 0], jnp.stack([whole[0, 5], whole[1, 2]]), rtol=1e-5)


def test_refuses_to_run_past_its_state():
    layer, weights = made()
    state = init_state(layer, shape_dtype((B, L, D)))
    with pytest.raises(ValueError, match='the cache holds 7 positions, 0 are taken and 8 more'):
        layer.apply(weights, state, (normal(B, 8, D),), mode=Mode.PREDICT)
    with pytest.raises(ValueError, match=r'SRU takes \(batch, length, features\)'):
        layer.init((shape_dtype((B, D)),), jax.random.key(0))
