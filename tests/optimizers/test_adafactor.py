"""Adafactor: each layer of a stack moves as it would if it stood alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import optimizers, tl, transforms

N = 2
MATRIX = tl.Dense()


def random_like(tree, seed):
    """Numbers of another size in each layer, so that mixing layers would show."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    sizes = [10.0 ** rng.uniform(-3, 1, x.shape[:1] + (1,) * (x.ndim - 1)) for x in leaves]
    made = [
        jnp.asarray(rng.standard_normal(x.shape) * size, jnp.float32)
        for x, size in zip(leaves, sizes, strict=True)
    ]
    return structure.unflatten(made)


def run(optimizer, weights, grads):
    """What each of some steps adds to the weights, and the state after the last."""
    with jax.numpy_dtype_promotion('standard'):
        state, update, moves = jax.jit(optimizer.init)(weights), jax.jit(optimizer.update), []
        for grad in grads:
            moved, state = update(grad, state, weights)
            weights = optax.apply_updates(weights, moved)
            moves.append(moved)
    return moves, state


def test_a_stack_moves_as_its_layers_would_alone():
    net = tl.Repeat(tl.Serial(tl.LayerNorm(), tl.SelfAttention(2)), N)
    weights, _ = net.init(lc.signature_of(lc.shape_dtype((1, 4, 8))), jax.random.key(0))
    optimizer = optimizers.adafactor(0.1, min_size=2, momentum=0.9, weight_decay=0.01)
    weights = random_like(weights, 1)
    grads = [random_like(weights, seed) for seed in (2, 3)]
    unstacked, _ = transforms.unstack(net, weights)
    one_by_one = [transforms.unstack(net, x)[1] for x in (weights, *grads)]
    stacked, _ = run(optimizers.bound(optimizer, net), weights, grads)
    alone, _ = run(optimizers.bound(optimizer, unstacked), one_by_one[0], one_by_one[1:])
    for ours, theirs in zip(stacked, alone, strict=True):
        ours = transforms.unstack(net, ours)[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_a_tensor_moves_as_optax_moves_it():
    """Each layer's matrix and vector, one by one; and what optax does to the stack is another."""
    weights = {'dense': {'kernel': jnp.zeros((3, 4, 5)), 'bias': jnp.zeros((3, 5))}}
    weights, grads = random_like(weights, 0), random_like(weights, 1)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=2)
    net = tl.Repeat(tl.Serial(tl.Dense()), 3)
    moved, _ = run(optimizers.adafactor(0.1, min_size=2, net=net), weights, [grads, grads])
    for path in ('dense/kernel', 'dense/bias'):
        weight, grad = lc.trees.get(weights, path), lc.trees.get(grads, path)
        for i in range(3):
            expected, _ = run(theirs, weight[i], [grad[i], grad[i]])
            for ours, other in zip(moved, expected, strict=True):
                np.testing.assert_allclose(lc.trees.get(ours, path)[i], other, rtol=1e-5)
    mixed, _ = run(theirs, weights, [grads])
    assert np.abs(mixed[0]['dense']['kernel'] / moved[0]['dense']['kernel'] - 1).max() > 0.5


def slow(grad, weight, row, column, step, rate):
    """One step of the paper's equations on one matrix, in float64."""
    beta = 1 - step ** (-0.8)
    square = grad**2 + 1e-30
    row = beta * row + (1 - beta) * square.mean(1)
    column = beta * column + (1 - beta) * square.mean(0)
    u = grad / np.sqrt(np.outer(row, column) / row.mean())
    u = u / max(1, np.sqrt((u**2).mean()))
    return -rate * max(1e-3, np.sqrt((weight**2).mean())) * u, row, column


def test_the_equations():
    rng = np.random.default_rng(0)
    weight, row, column = rng.standard_normal((4, 3)), np.zeros(4), np.zeros(3)
    grads = rng.standard_normal((4, 4, 3)) * np.array([1, 5, 0.1, 2])[:, None, None]
    given = [{'kernel': jnp.asarray(x, jnp.float32)} for x in grads]
    optimizer = optimizers.adafactor(0.3, min_size=2, net=MATRIX)
    moved, _ = run(optimizer, {'kernel': jnp.asarray(weight, jnp.float32)}, given)
    for step, grad in enumerate(grads, 1):
        move, row, column = slow(grad, weight, row, column, step, 0.3)
        np.testing.assert_allclose(moved[step - 1]['kernel'], move, rtol=1e-4)
        weight = weight + move


def test_heads_are_columns_of_one_matrix():
    net = tl.Repeat(tl.Serial(tl.SelfAttention(2), tl.SparseFF(16, 4)), N)
    weights, _ = net.init(lc.signature_of(lc.shape_dtype((1, 4, 8))), jax.random.key(0))
    state = optimizers.adafactor(min_size=2, net=net).init(weights)
    sizes = {
        path: sum(
            x.size
            for x in jax.tree.leaves(lc.trees.get(state.inner_state[0], path))
            if x.dtype == jnp.float32
        )
        for path in (
            'self_attention/query/kernel',
            'self_attention/query/bias',
            'self_attention/output/kernel',
            'sparse_ff/in/kernel_transposed',
        )
    }
    # Rows, columns and a number that stands for the whole; of the bias the whole and two numbers.
    wanted = [N * (8 + 8 + 1), N * 2 * (4 + 2), N * (8 + 8 + 1), N * (16 + 8 + 1)]
    assert list(sizes.values()) == wanted


def test_decay_is_times_the_learning_rate_and_spares_biases():
    weights = {'kernel': jnp.full((2, 2), 2.0), 'bias': jnp.full(2, 2.0)}
    grads = jax.tree.map(jnp.zeros_like, weights)
    (moved,), _ = run(optimizers.adafactor(0.1, weight_decay=0.5, net=MATRIX), weights, [grads])
    np.testing.assert_allclose(moved['kernel'], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(moved['bias'], 0)


def test_the_learning_rate_is_kept_where_reports_look_and_follows_a_schedule():
    weights = {'kernel': jnp.ones((2, 2))}
    rate = optimizers.warmup_cosine(0.5, 8, 4)
    optimizer = optimizers.adafactor(rate, relative=False, net=MATRIX)
    moved, state = run(optimizer, weights, [weights] * 3)
    assert float(state.hyperparams['learning_rate']) == 0.25
    np.testing.assert_allclose([x['kernel'][0, 0] for x in moved], [0, -0.125, -0.25], rtol=1e-5)


def test_frozen_weights_are_left_out():
    weights, _ = lc.trees.partition({'a': {'kernel': jnp.ones((2, 2))}, 'b': jnp.arange(3)})
    net = tl.Serial(tl.Dense(name='a'), tl.Embedding(3, 1, name='b'))
    (moved,), _ = run(optimizers.adafactor(net=net), weights, [weights])
    assert moved['b'] is None and moved['a']['kernel'].shape == (2, 2)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (
            {'learning_rate': 'abc'},
            TypeError,
            "must be a number or a function, got 'abc'",
        ),
        ({'decay_rate': 2}, ValueError, 'decay_rate must be at least 0 and at most 1, got 2'),
        ({'clipping_threshold': 0.5}, ValueError, 'clipping_threshold must be at least 1'),
        ({'momentum': '0.9'}, TypeError, 'momentum must be a number'),
        ({'weight_decay': -1}, ValueError, 'weight_decay must be at least 0, got -1'),
        ({'min_size': 2.5}, TypeError, r'min_size must be an int, got 2\.5'),
        ({'relative': 1}, TypeError, 'relative must be a bool, got 1'),
        ({'net': 'abc'}, TypeError, "adafactor: net must be a Layer or None, got 'abc'"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        optimizers.adafactor(**arguments)
