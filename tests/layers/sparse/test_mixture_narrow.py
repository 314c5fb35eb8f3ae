"""`MixtureFF` with narrow weights: outputs, gradients, and how much is wide at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels
from layercomb import Mode, tl, transforms, trees
from layercomb.layers.quantized.matrix import Narrow
from layercomb.layers.sparse.by_expert import by_expert
from layercomb.shapes import shape_dtype

D = 32
LAYERS = {
    'gated': tl.MixtureFF(128, 8, 2),
    'biased': tl.MixtureFF(128, 8, 3, 0, gated=False, use_bias=True, normalize=True),
    'two shared': tl.MixtureFF(128, 16, 2, 2, routing='softmax', activation='gelu'),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def made(name, bits):
    """A wide layer and weights that are those of the narrow layer and weights behind them."""
    layer = LAYERS[name]
    weights, _ = jax.jit(lambda key: layer.init((shape_dtype((1, D)),), key))(jax.random.key(0))
    draw = np.random.default_rng(3)
    shifted = {
        path: x + 0.2 * draw.normal(size=x.shape) for path, x in trees.flatten(weights).items()
    }
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), trees.unflatten(shifted))
    narrow, its = transforms.quantize(layer, weights, bits, 16, smallest=1)
    wide = jax.tree.map(
        lambda w: w.wide() if isinstance(w, Narrow) else w,
        narrow.seen(its),
        is_leaf=lambda w: isinstance(w, Narrow),
    )
    return layer, wide, narrow, its


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(layer, weights, x, mode=Mode.EVAL):
    (y,), _ = layer.apply(weights, {}, (x,), mode=mode)
    return y


def near(got, wanted, tolerance):
    assert jnp.linalg.norm(got - wanted) <= tolerance * jnp.linalg.norm(wanted)


@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('n', [2, 60])  # gathered rows, and tiles
def test_computes_what_its_weights_say(name, bits, n):
    layer, wide, narrow, its = made(name, bits)
    assert trees.get(its, 'router/kernel').dtype == jnp.float32
    assert sum(path.endswith('_scales') for path in trees.flatten(its)) == (
        0 if bits == 16 else 2 + layer.gated
    )
    x = normal(1, n, D)
    for mode in (Mode.EVAL, Mode.PREDICT):
        wanted = apply(layer, wide, x, mode)
        near(apply(narrow, its, x, mode), wanted, 3e-4)
        with layercomb_kernels.off():
            near(jax.jit(lambda x, mode=mode: apply(narrow, its, x, mode))(x), wanted, 1e-5)


@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('name', LAYERS)
def test_inputs_and_wide_weights_have_the_gradients_of_the_wide_layer(name, bits):
    layer, wide, narrow, its = made(name, bits)
    x, ct = normal(1, 30, D), normal(1, 30, D, seed=1)

    def loss(x, router, layer, weights):
        weights = {**weights, 'router': router}
        (y,), state = layer.apply(weights, {}, (x,), mode=Mode.TRAIN)
        return (y * ct).sum() + state['aux_loss'].value

    grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got = grad(x, its['router'], narrow, its)
    wanted = grad(x, wide['router'], layer, wide)
    jax.tree.map(functools.partial(near, tolerance=1e-4), got, wanted)


def test_a_narrow_weight_does_not_train():
    *_, narrow, its = made('gated', 16)
    with pytest.raises(ValueError, match='quantized weights do not train'):
        jax.grad(lambda w: apply(narrow, w, normal(1, 30, D)).sum())(its)


@pytest.mark.skipif(not layercomb_kernels.available(), reason='there are no native kernels here')
@pytest.mark.parametrize('mode', [Mode.TRAIN, Mode.PREDICT])
@pytest.mark.parametrize('bits', [None, 16, 8, 4])
def test_one_expert_is_wide_at_a_time(bits, mode, optimized):
    layer, x = tl.MixtureFF(64 * 64, 64), shape_dtype((1, 128, 128))
    init = functools.partial(layer.init, (x,))
    weights, _ = jax.eval_shape(init, jax.random.key(0))
    if bits:
        narrow = functools.partial(transforms.quantize, layer, bits=bits)
        layer = narrow(jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), weights))[0]
        weights = jax.eval_shape(lambda w: narrow(w)[1], weights)

    def run(weights, x):
        return layer.apply(weights, {}, (x,), mode=mode)[0][0].sum()

    for each in (run, jax.grad(run, 1)):
        memory = jax.jit(each).lower(weights, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * 64 * 64 * 128  # one of the three, wide


@pytest.mark.parametrize('bits', [16, 8])
def test_narrow_experts_compute_in_bfloat16(bits):
    layer, wide, narrow, its = made('gated', bits)
    with jax.numpy_dtype_promotion('strict'):
        for mode, n in ((Mode.EVAL, 30), (Mode.PREDICT, 2), (Mode.TRAIN, 30)):
            x = normal(1, n, D)
            (y,), _ = transforms.cast(narrow).apply(its, {}, (x.astype(jnp.bfloat16),), mode=mode)
            assert y.dtype == jnp.bfloat16
            near(y.astype(jnp.float32), apply(layer, wide, x), 3e-2)


@pytest.mark.parametrize('bits', [16, 8])
def test_experts_may_be_narrow_under_vmap(bits):
    _, wide, narrow, its = made('gated', bits)
    x = normal(3, 20, D)
    got = jax.jit(jax.vmap(lambda x: apply(narrow, its, x)))(x)
    near(got, apply(LAYERS['gated'], wide, x), 3e-4)


def test_tiles_take_narrow_and_wide_weights_together():
    values = normal(4, 8, D).astype(jnp.bfloat16)
    own = {'narrow': Narrow(values, None, 'oi', 16), 'wide': normal(4, 8, D, seed=1)}
    at = jnp.arange(40).reshape(20, 2) % 4

    def expert(own, x, gates):
        return gates * ((x @ own['narrow'].wide().T) @ own['wide'])

    def loss(wide, x, gates):
        return jnp.sin(by_expert(expert, {**own, 'wide': wide}, x, at, gates)).sum()

    def slow(wide, x, gates):
        h = jnp.einsum('td,tkmd->tkm', x, values.astype(jnp.float32)[at])
        return jnp.sin(jnp.einsum('tkm,tkmd,tk->td', h, wide[at], gates)).sum()

    args = own['wide'], normal(20, D), normal(20, 2, seed=2)
    got, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(*args) for f in (loss, slow))
    jax.tree.map(functools.partial(near, tolerance=1e-4), got, wanted)


def test_is_rounded_by_itself_beside_layers_that_are_calibrated():
    layer, wide, *_ = made('gated', 8)
    net = tl.Serial(layer, tl.Dense(D))
    x = normal(2, 30, D)
    weights = {'mixture_ff': wide, 'dense': {'kernel': normal(D, D), 'bias': jnp.zeros(D)}}
    quantize = functools.partial(transforms.quantize, net, weights, 4, 16, smallest=1)
    (quantized, plain), (_, fitted) = quantize(), quantize(calibrate=[x])
    jax.tree.map(np.testing.assert_array_equal, plain['mixture_ff'], fitted['mixture_ff'])
    errors = [
        jnp.linalg.norm(apply(quantized, w, x) - apply(net, weights, x)) for w in (plain, fitted)
    ]
    assert errors[1] < errors[0]
