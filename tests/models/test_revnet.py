"""RevNet: shapes, the gradient of plain autodiff, statistics once a step, memory, and errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import losses, models, tl, trees
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import take_decisions

IMAGES = (lc.shape_dtype((4, 8, 8, 3)),)


def small(**changes):
    return models.RevNet(**{'n_classes': 3, 'widths': (4, 8), 'n_blocks': (2, 1), **changes})


def images():
    return jax.random.uniform(jax.random.key(7), (4, 8, 8, 3))


def gradients(net):
    """Loss, state and gradient in TRAIN (reversible) and in RECORD (plain autodiff)."""
    weights, state = net.init(IMAGES, jax.random.key(1))
    labels = jnp.array([0, 2, 1, 0])
    scored = losses.attach(net, tl.CrossEntropyLoss())

    def loss(weights, mode):
        batch = (images(), labels, jnp.ones(4))
        (values, _), new = scored.apply(weights, state, batch, rng=jax.random.key(3), mode=mode)
        return values.mean(), take_decisions(new)[0]

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    return [grad(weights, mode) for mode in (Mode.TRAIN, Mode.RECORD)]


def test_shapes_and_equality():
    net = small(dropout=0.1)
    assert net.output_signature(IMAGES) == (lc.shape_dtype((4, 3)),)
    assert net.output_signature((lc.shape_dtype((1, 7, 9, 1)),)) == (lc.shape_dtype((1, 3)),)
    assert net == small(dropout=0.1) and hash(net) == hash(small(dropout=0.1))
    assert eval(repr(net), vars(tl)) == net
    assert models.RevNet(widths=[4, 8], n_blocks=2) == models.RevNet(widths=(4, 8), n_blocks=[2, 2])


def test_the_default_has_as_many_weights_as_the_paper_says():
    weights, _ = jax.eval_shape(lambda: models.RevNet().init(IMAGES, jax.random.key(0)))
    blocks = 3 * 2 * 2 * 9 * (16**2 + 32**2 + 56**2)
    between = 9 * (3 * 32 + 32 * 64 + 64 * 112)
    norms = 2 * (3 * 2 * 2 * (16 + 32 + 56) + 32 + 64 + 112)
    assert trees.count(weights) == blocks + between + norms + 112 * 10 + 10


def test_the_gradient_is_that_of_plain_autodiff():
    ours, plain = gradients(small(dropout=0.2))

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)

    jax.tree.map(compare, ours, plain)


def test_statistics_are_updated_once_a_step():
    """The first norms see the stem's output, whose statistics can be computed by hand."""
    net = small()
    weights, state = net.init(IMAGES, jax.random.key(1))
    grad = jax.grad(lambda w: _outputs(net, w, state), has_aux=True)
    new = jax.jit(lambda w: grad(w)[1])(weights)
    (stem,), _ = net.layers[0].apply(weights['stem'], {}, (images(),))
    x = stem[..., 2:]  # the second stream, which F reads
    key = 'reversible_half_residual'
    found = jax.tree.map(lambda s: s[0], new['stage_1'][key]['batch_norm'])
    np.testing.assert_allclose(found['mean'], 0.01 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found['var'], 0.99 + 0.01 * x.var((0, 1, 2)), rtol=1e-4)


def _outputs(net, weights, state):
    (logits,), new = net.apply(weights, state, (images(),), mode=Mode.TRAIN)
    return (logits**2).sum(), new


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(optimized):
    def temporaries(n):
        net = models.RevNet(widths=(16,), n_blocks=n)
        signature = (lc.shape_dtype((8, 16, 16, 3)),)
        weights, state = jax.eval_shape(lambda: net.init(signature, jax.random.key(0)))

        def loss(weights, state, x):
            return net.apply(weights, state, (x,), mode=Mode.TRAIN)[0][0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(weights, state, *signature).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(12) < 1.02 * temporaries(3)


@pytest.mark.slow
def test_it_evaluates_with_running_statistics():
    net = small(dropout=0.5)
    weights, state = net.init(IMAGES, jax.random.key(1))
    (all_four,), same = net.apply(weights, state, (images(),))
    (one,), _ = net.apply(weights, state, (images()[:1],))
    np.testing.assert_allclose(one, all_four[:1], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'widths': (4, 7)}, ValueError, r'widths=\(4, 7\): 7 cannot be halved .*: use 8$'),
        ({'widths': (0,)}, ValueError, r'widths=\(0,\): each must be at least 2$'),
        ({'widths': ()}, ValueError, r'widths=\(\): give integers, e\.g\. \(32, 64\)$'),
        ({'widths': 'abc'}, TypeError, "widths must be a sequence of int, got 'abc'"),
        ({'n_blocks': (1,)}, ValueError, r'n_blocks=\(1,\) for the 2 stages .*: give one number'),
        ({'n_blocks': 0}, ValueError, r'n_blocks=\(0, 0\): each must be at least 1$'),
        ({'n_blocks': '3'}, TypeError, "must be an int or a sequence of int, got '3'"),
        ({'dropout': 1.5}, ValueError, 'Dropout: rate must be at least 0 and below 1'),
        ({'activation': 'rleu'}, ValueError, "no activation 'rleu': there are"),
    ],
)
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)


def test_text_is_refused_where_images_are_read():
    with pytest.raises(ValueError, match=r'Conv2D takes \(batch, height, width, channels\)'):
        small().output_signature((lc.shape_dtype((2, 8)),))
