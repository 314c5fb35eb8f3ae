"""SM3: the paper's equations, one tensor at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import optimizers, tl, trees

MATRIX = tl.Dense()


def run(optimizer, weights, grads):
    """What each of some steps adds to the weights, and the state after the last."""
    with jax.numpy_dtype_promotion('standard'):
        state, moves = jax.jit(optimizer.init)(weights), []
        for grad in grads:
            moved, state = jax.jit(optimizer.update)(grad, state, weights)
            weights = optax.apply_updates(weights, moved)
            moves.append(moved)
    return moves, state


def slow(grads, rate, momentum):
    """The moves of one matrix, in float64."""
    rows, columns = np.zeros(grads.shape[1]), np.zeros(grads.shape[2])
    mean, moves = 0.0, []
    for grad in grads:
        v = np.minimum(rows[:, None], columns[None]) + grad**2
        rows, columns = v.max(1), v.max(0)
        mean = momentum * mean + (1 - momentum) * grad / np.sqrt(v)
        moves.append(-rate * mean)
    return moves


@pytest.mark.parametrize('momentum', [0.9, None])
def test_the_equations_for_each_matrix_of_a_stack(momentum):
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1e-4, 30]).reshape(3, 1, 1)
    grads = rng.normal(size=(4, 3, 5, 4)) * sizes * rng.uniform(0.1, 2, (5, 1))
    biases = rng.normal(size=(4, 3, 4))
    given = [
        {'dense': {'kernel': jnp.asarray(k, jnp.float32), 'bias': jnp.asarray(b, jnp.float32)}}
        for k, b in zip(grads, biases, strict=True)
    ]
    optimizer = optimizers.sm3(0.5, momentum, net=tl.Repeat(tl.Serial(MATRIX), 3))
    moved, _ = run(optimizer, jax.tree.map(jnp.zeros_like, given[0]), given)
    for layer in range(3):
        for ours, wanted in zip(moved, slow(grads[:, layer], 0.5, momentum or 0.0), strict=True):
            np.testing.assert_allclose(ours['dense']['kernel'][layer], wanted, rtol=1e-4)
    sums = np.cumsum(biases**2, 0)
    if momentum is None:
        got = np.stack([m['dense']['bias'] for m in moved])
        np.testing.assert_allclose(got, -0.5 * biases / np.sqrt(sums), rtol=1e-4)


def test_what_it_keeps():
    net = tl.Repeat(tl.Serial(tl.SelfAttention(2)), 3)
    weights, _ = net.init(lc.signature_of(lc.shape_dtype((1, 4, 8))), jax.random.key(0))
    state = optimizers.sm3(momentum=None, net=net).init(weights).inner_state[0]
    kernels = trees.get(state, 'self_attention/query/kernel')
    assert [x.shape for x in jax.tree.leaves(kernels)] == [(3, 8), (3, 8)]
    plain = optimizers.sm3(net=net).init(weights)
    assert trees.n_bytes(plain) > trees.n_bytes(weights) > 2 * trees.n_bytes(state)


def test_single_numbers_and_gradients_of_0():
    class Gain(lc.Layer):
        weight_axes = {'gain': '->'}

    weights = {'gain': jnp.ones(())}
    grads = [{'gain': jnp.float32(g)} for g in (0, 2, 2)]
    moved, _ = run(optimizers.sm3(1.0, None, net=Gain()), weights, grads)
    np.testing.assert_allclose([m['gain'] for m in moved], [0, -1, -(0.5**0.5)], rtol=1e-6)


def test_decay_is_times_the_learning_rate_and_spares_biases():
    weights = {'kernel': jnp.full((2, 2), 2.0), 'bias': jnp.full(2, 2.0)}
    grads = jax.tree.map(jnp.zeros_like, weights)
    (moved,), state = run(optimizers.sm3(0.1, weight_decay=0.5, net=MATRIX), weights, [grads])
    np.testing.assert_allclose(moved['kernel'], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(moved['bias'], 0)
    assert float(state.hyperparams['learning_rate']) == pytest.approx(0.1)


def test_mistakes():
    with pytest.raises(
        TypeError, match="sm3: learning_rate must be a number or a function, got 'a'"
    ):
        optimizers.sm3('a')
    with pytest.raises(ValueError, match='momentum must be at least 0 and at most 1, got 2'):
        optimizers.sm3(momentum=2)
    with pytest.raises(ValueError, match=r'optimizers\.sm3 has to know the model'):
        optimizers.sm3().init({'kernel': jnp.ones((2, 2))})
    with pytest.raises(TypeError, match='what changes is injected here'):
        optimizers.sm3(jnp.float32(0.1))
