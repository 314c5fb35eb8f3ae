"""Decoding steps of mixtures as native calls: what the layers compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_steps import calls, check_places, near, steps, unstacked

import layercomb as lc
import layercomb_kernels
from layercomb import Mode, models, tl, transforms
from layercomb.supervised import decoding
from layercomb.transforms.fusing.sparse_program import Routing, SparseProgram

pytestmark = pytest.mark.skipif(
    not layercomb_kernels.available(), reason='there are no native kernels here'
)
D, ROOM = 32, 16
LAYERS = {
    'gated': tl.MixtureFF(256, 16, 3, 1),
    'gated and biased': tl.MixtureFF(96, 12, 2, 2, use_bias=True, activation='gelu'),
    'softmax': tl.MixtureFF(144, 9, 2, 0, routing='softmax', gated=False, activation='relu2'),
    'softmax of many': tl.MixtureFF(300, 300, 5, 3, routing='softmax', normalize=True),
    'normalized': tl.MixtureFF(68, 17, 4, 1, normalize=True, balance_bias=False, activation='tanh'),
    'one of them all': tl.MixtureFF(64, 16, 1, 0, gated=False, use_bias=True),
    'all': tl.MixtureFF(64, 8, 7, 1),
    'scaled': tl.MixtureFF(64, 8, 2, 1, scale=2.5),
}


@functools.cache
def made(name, bits):
    """A mixture behind a norm, and its weights."""
    net = tl.Serial(tl.RMSNorm(), LAYERS[name])
    weights, _ = net.init((jax.ShapeDtypeStruct((1, 1, D), jnp.float32),), jax.random.key(0))
    draw = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.2 * draw.normal(size=x.shape), weights)
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), moved)
    return transforms.quantize(net, weights, bits, 16, smallest=1) if bits else (net, weights)


def values(*shape, seed=2):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def run(net, weights, x):
    """The outputs, and how many native calls there are."""
    step = jax.jit(lambda w, x: net.apply(w, {}, (x,), mode=Mode.PREDICT)[0][0])
    text = step.lower(weights, x).as_text()
    return step(weights, x), text.count('custom_call @layercomb_run_program')


@pytest.mark.parametrize('bits', [None, 16, 8, 4])
@pytest.mark.parametrize('name', LAYERS)
def test_is_the_layer(name, bits):
    net, weights = made(name, bits)
    fused, mixture = transforms.fuse(net), LAYERS[name]
    assert isinstance(fused, transforms.Fused)
    most = (mixture.n_experts - mixture.n_shared) // mixture.n_chosen
    for n in {1, min(most, 5)}:
        for seed in range(4):
            x = values(1, n, D, seed=seed)
            (y, n_calls), (wanted, _) = (run(each, weights, x) for each in (fused, net))
            assert n_calls == 1
            near(y, wanted, 2e-5 if bits in (None, 16) else 1e-3)


def test_rows_of_a_batch_choose_each_for_itself():
    net, weights = made('gated', None)
    x = values(5, 1, D)
    y, n_calls = run(transforms.fuse(net), weights, x)
    assert n_calls == 1
    for i in range(5):
        near(y[i], run(net, weights, x[i : i + 1])[0][0], 2e-5)


def test_more_rows_than_the_experts_take_are_left_to_the_layer():
    net, weights = made('gated', 8)
    for n, wanted in ((5, 1), (6, 0)):  # 3 n of 15
        x = values(1, n, D)
        y, n_calls = run(transforms.fuse(net), weights, x)
        assert n_calls == wanted
        near(y, run(net, weights, x)[0], 1e-3)


@pytest.mark.parametrize('name', ['gated', 'softmax', 'softmax of many'])
def test_of_equal_scores_the_lower_expert_is_chosen(name):
    net, weights = made(name, None)
    router = weights['mixture_ff']['router']
    some = router['bias'].at[:].set(0).at[jnp.array([4, 2, 7])].set(0.5)
    for bias in (jnp.zeros_like(some), some):
        its = {**weights['mixture_ff'], 'router': {**router, 'kernel': router['kernel'] * 0}}
        its['router']['bias'] = bias
        still = {**weights, 'mixture_ff': its}
        x = values(1, 2, D)
        near(run(transforms.fuse(net), still, x)[0], run(net, still, x)[0], 2e-5)


@pytest.mark.parametrize('name', ['gated', 'softmax', 'normalized'])
def test_what_is_not_a_number_stays_so(name):
    net, weights = made(name, None)
    x = values(2, 2, D)[:, :1]
    (y, n_calls), (wanted, _) = (
        run(each, weights, x.at[1].set(jnp.nan)) for each in (transforms.fuse(net), net)
    )
    assert n_calls == 1
    near(y[0], wanted[0], 2e-5)
    assert jnp.isnan(y[1]).all() and jnp.isnan(wanted[1]).all()


@pytest.mark.parametrize('name', ['gated', 'one of them all'])
def test_an_expert_whose_score_is_nan_comes_first(name):
    net, weights = made(name, None)
    bias = weights['mixture_ff']['router']['bias'].at[9].set(jnp.nan)
    weights = lc.trees.put(lc.trees.drop(weights, 'mixture_ff/router/bias'),
                           'mixture_ff/router/bias', bias)  # fmt: skip
    x = values(1, 2, D)
    (y, _), (wanted, _) = (run(each, weights, x) for each in (transforms.fuse(net), net))
    assert jnp.isfinite(wanted).all()  # biases take part in the choice alone
    near(y, wanted, 2e-5)


@pytest.mark.parametrize(
    'path, shape',
    [
        ('mixture_ff/router/kernel', (D, 14)),
        ('mixture_ff/router/bias', (14,)),
        ('mixture_ff/in/bias', (12, 9)),
        ('mixture_ff/out/kernel', (12, 8, 16)),
        ('mixture_ff/up/kernel_transposed', (12, 8, 16)),
    ],
)
def test_weights_of_another_shape_are_refused_as_the_layer_refuses_them(path, shape):
    net, weights = made('gated and biased', None)
    weights = lc.trees.put(lc.trees.drop(weights, path), path, jnp.ones(shape))
    outcomes = []
    for each in (transforms.fuse(net), net):
        try:
            outcomes.append(run(each, weights, values(1, 1, D))[0].shape)
        except Exception as e:
            outcomes.append(type(e))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize('bits', [None, 8])
@pytest.mark.parametrize('terraformer', [False, True])
def test_steps_of_a_model_are_those_of_its_layers(terraformer, bits):
    ff = tl.MixtureFF(128, 16, 3)
    if terraformer:
        net = models.TerraformerLM(100, 64, 128, 2, 4, ROOM, qkv_modules=4, head_modules=4, ff=ff)
    else:
        net = models.TransformerLM(100, 64, 128, 2, 4, ROOM, norm=tl.RMSNorm(), ff=ff)
    net, weights, state = unstacked(net, bits, 1, ROOM)
    fused = transforms.fuse(net)
    assert calls(fused, weights, state, 1, 1) == 1 + terraformer  # all blocks, and the head
    both = (steps(each, weights, state, 1, 1, ROOM) for each in (fused, net))
    for (y, s), (wanted, t) in zip(*both, strict=True):
        near(y, wanted, 2e-5 if bits is None else 1e-3)
        assert jax.tree.structure(s) == jax.tree.structure(t)


def test_the_same_tokens_are_generated_and_streamed():
    net = models.TransformerLM(100, 64, 128, 2, 4, ROOM, ff=tl.MixtureFF(128, 16, 3))
    net, weights, _ = unstacked(net, 8, 1, ROOM)
    model = lc.Model(net, weights, {})
    tokens = decoding.generate(model, [[1, 2, 3]], 8, temperature=1.0, rng=jax.random.key(3))
    streamed = decoding.stream(model, [[1, 2, 3]], 8, temperature=1.0, rng=jax.random.key(3))
    np.testing.assert_array_equal(np.stack(list(streamed), 1), tokens)


@pytest.mark.parametrize('gated', [False, True])
def test_values_have_places_of_their_own(gated):
    program = SparseProgram((2, 3, D))
    (x,), ones = program.inputs, jnp.ones(D)
    routing = Routing(16, 3, 1, gated, True, 1.0, 'relu')
    for _ in range(3):
        kernels = (jnp.ones((16, 4, D)),) * (2 + gated)
        y = program.mixture(x, kernels, (jnp.ones((D, 15)), None), (None, None), routing)
        x = program.normalize(program.combine('add', x, y), ones, ones, 1e-6)
    assert check_places(program, (x,)) > 15
