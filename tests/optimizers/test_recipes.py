import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import optimizers, tl, trees
from layercomb.optimizers.tensors import by_unit


def test_warmup_cosine_goes_up_and_down():
    rate = optimizers.warmup_cosine(1.0, steps=100, warmup_steps=10, final_fraction=0.1)
    assert float(rate(0)) == 0
    np.testing.assert_allclose([rate(5), rate(10), rate(100)], [0.5, 1.0, 0.1], rtol=1e-6)
    assert float(optimizers.warmup_cosine(1.0, steps=10)(0)) == 1.0


def test_adamw_is_optax_without_decay_of_biases():
    weights = {'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
    grads = jax.tree.map(lambda x: 0.5 * x, weights)
    with jax.numpy_dtype_promotion('standard'):
        ours = optimizers.adamw(0.1, weight_decay=0.3)
        theirs = optax.adamw(0.1, 0.9, 0.98, 1e-9, weight_decay=0.3, mask=lc.trees.decay_mask)
        a, _ = ours.update(grads, ours.init(weights), weights)
        b, _ = theirs.update(grads, theirs.init(weights), weights)
    jax.tree.map(np.testing.assert_allclose, a, b)
    assert abs(a['dense']['kernel'][0, 0]) > abs(a['dense']['bias'][0])


def test_muon_makes_each_matrix_of_a_stack_orthogonal():
    block = tl.Serial(tl.Residual(tl.SelfAttention(2)), tl.Residual(tl.Dense()))
    net = tl.Serial(tl.Embedding(5, 8), tl.Repeat(block, 3), tl.Dense(5, name='head'))
    signature = lc.signature_of(lc.shape_dtype((1, 4), 'int32'))
    weights, _ = net.init(signature, jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), weights)
    optimizer = optimizers.muon(1.0, adam_fraction=0.5, net=net)
    with jax.numpy_dtype_promotion('standard'):
        moved, _ = optimizer.update(grads, optimizer.init(weights), weights)
    attention = moved['serial']['residual']['self_attention']
    found = [
        attention['query']['kernel'].reshape(3, 8, 8),
        attention['output']['kernel'].reshape(3, 8, 8),
        moved['serial']['residual_1']['dense']['kernel'],
    ]
    for stack in found:
        values = np.linalg.svd(np.asarray(stack), compute_uv=False)
        assert values.min() > 0.4 and values.max() < 1.6  # what five Newton–Schulz steps leave
    for path in ('embedding/table', 'head/kernel', 'serial/residual_1/dense/bias'):
        step = np.abs(lc.trees.get(moved, path))
        # Adam's first step is the same everywhere: its rate, times what Nesterov looks ahead.
        assert np.ptp(step) < 1e-3 and 0.5 < step.mean() < 1.0


@pytest.mark.parametrize('around', [lambda layer: layer, lambda layer: tl.Repeat(layer, 2)])
def test_muon_moves_units_alike_however_few_positions_choose_them(around):
    net = tl.Serial(around(tl.SparseFF(64, 8, use_bias=False)), tl.Dense(3))
    weights, _ = net.init(lc.signature_of(jnp.zeros((1, 4, 8))), jax.random.key(0))
    optimizer = optimizers.muon(1.0, net=net)
    move = jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    often = np.geomspace(1e-3, 1, 64)[:, None]
    units = ('sparse_ff/in/kernel_transposed', 'sparse_ff/out/kernel')

    def gradient(path, w):
        return jnp.asarray(rng.normal(size=w.shape) * (often if path in units else 1), w.dtype)

    state = optimizer.init(weights)
    with jax.numpy_dtype_promotion('standard'):
        for _ in range(10):
            grads = trees.map_with_path(gradient, weights)
            steps, state = move(grads, state, weights)
    flat = trees.flatten(steps)
    for path in units:
        norms = np.linalg.norm(flat[path], axis=-1)
        assert norms.max() / norms.min() < 100  # of 1,000
        assert norms[..., 32:].max() / norms[..., 32:].min() < 8  # of 30
    assert np.linalg.svd(flat['dense/kernel'], compute_uv=False).max() < 1.6


def test_units_are_not_decayed():
    net = tl.SparseFF(64, 8)
    weights, _ = net.init(lc.signature_of(jnp.zeros((1, 4, 8))), jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    optimizer = optimizers.muon(0.1, weight_decay=0.5, net=net)
    with jax.numpy_dtype_promotion('standard'):
        steps, _ = optimizer.update(zeros, optimizer.init(weights), weights)
    assert not steps['in']['kernel_transposed'].any() and not steps['out']['kernel'].any()
    kernel = weights['controller']['in']['kernel']
    np.testing.assert_allclose(steps['controller']['in']['kernel'], -0.05 * kernel, rtol=1e-5)


def test_steps_by_unit_are_the_equation():
    rng, optimizer = np.random.default_rng(0), by_unit(0.75)
    state, v = optimizer.init({'w': jnp.zeros((2, 3, 4))}), np.zeros((2, 3))
    for _ in range(3):
        step = rng.normal(size=(2, 3, 4)) * np.array([[1], [0.1], [0]])
        got, state = optimizer.update({'w': jnp.asarray(step, jnp.float32)}, state)
        v = 0.75 * v + 0.25 * np.square(step).mean(-1)
        mean = v.mean(-1, keepdims=True)
        np.testing.assert_allclose(
            got['w'], step * np.sqrt(mean / (v + mean / 100))[..., None], rtol=1e-5
        )
    still, _ = optimizer.update(
        {'w': jnp.zeros((2, 3, 4))}, optimizer.init({'w': jnp.zeros((2, 3, 4))})
    )
    assert not still['w'].any()


@pytest.mark.parametrize('make', [optimizers.adamw, optimizers.muon])
def test_mistakes(make):
    with pytest.raises(TypeError, match="learning_rate must be a number or a function, got 'abc'"):
        make(learning_rate='abc')
    with pytest.raises(ValueError, match='b2 must be at least 0 and at most 1, got 2'):
        make(b2=2)
    with pytest.raises(TypeError, match=r'warmup_cosine: steps must be an int, got 0\.5'):
        optimizers.warmup_cosine(1.0, steps=0.5)
    with pytest.raises(ValueError, match='warmup_steps=9 must be below steps=5'):
        optimizers.warmup_cosine(1.0, steps=5, warmup_steps=9)
