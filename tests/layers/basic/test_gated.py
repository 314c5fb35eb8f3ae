"""`GatedDense` against its equation, wide and narrow."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from layercomb import tl, transforms, trees
from layercomb.shapes import shape_dtype, signature_of


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(layer, x):
    return layer.init(signature_of((x,)), jax.random.key(0))


def run(layer, x, weights):
    return layer.apply(weights, {}, (x,))[0][0]


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('use_bias', [False, True])
def test_gated_dense(use_bias):
    x, gate, up = values(2, 3, 4), values(4, 5, seed=1), values(4, 5, seed=2)
    biases = {'gate_bias': values(5, seed=3), 'up_bias': values(5, seed=4)} if use_bias else {}
    g, u = x @ gate + biases.get('gate_bias', 0), x @ up + biases.get('up_bias', 0)
    weights = {'gate': gate, 'up': up, **biases}
    layer = tl.GatedDense(5, use_bias=use_bias)
    assert_close(run(layer, x, weights), g / (1 + np.exp(-g)) * u)
    relu = tl.GatedDense(5, 'relu', use_bias)
    assert_close(run(relu, x, weights), np.maximum(g, 0) * u)
    made, _ = init(layer, x)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, weights)
    assert not np.allclose(made['gate'], made['up'])
    decayed = trees.decay_mask(made)
    assert {name for name, yes in decayed.items() if yes} == {'gate', 'up'}


@pytest.mark.parametrize('bits', [8, 4, 16])
def test_gated_dense_takes_narrow_weights(bits):
    x, weights = values(3, 64), {'gate': values(64, 32, seed=1), 'up': values(64, 32, seed=2)}
    layer, narrow = transforms.quantize(tl.GatedDense(32), weights, bits, smallest=1)
    assert narrow['gate'].dtype != np.float32 and narrow['up'].shape[0] == 32
    wanted = run(tl.GatedDense(32), x, weights)
    y = run(layer, x, narrow)
    assert np.abs(y - wanted).mean() < {8: 0.02, 4: 0.2, 16: 0.01}[bits] * np.abs(wanted).mean()


def test_gated_dense_says_what_it_takes():
    with pytest.raises(ValueError, match=r"no activation 'swish': there are .*silu"):
        tl.GatedDense(4, 'swish')
    with pytest.raises(TypeError, match=r'GatedDense takes .* got int32\[2,3\]: embed integers'):
        tl.GatedDense(4).output_signature(shape_dtype((2, 3), 'int32'))
    weights, _ = init(tl.GatedDense(2), values(1, 4))
    with pytest.raises(ValueError, match='input is 3 wide and the weights were made for 4'):
        run(tl.GatedDense(2), values(1, 3), weights)


def test_its_gradient_keeps_an_array_for_each_projection():
    weights, x = {'gate': values(4, 5), 'up': values(4, 5, seed=1)}, values(2, 3, 4)

    def plain(weights, x):
        return jax.nn.silu(x @ weights['gate']) * (x @ weights['up'])

    def ours(weights, x):
        return run(tl.GatedDense(5), x, weights)

    (y, pull), (wanted, pull_plain) = (jax.vjp(f, weights, x) for f in (ours, plain))
    jax.tree.map(assert_close, (y, *pull(y)), (wanted, *pull_plain(wanted)))
    kept = [x.shape for x in jax.tree.leaves(pull)]
    assert kept.count((2, 3, 5)) == 2
