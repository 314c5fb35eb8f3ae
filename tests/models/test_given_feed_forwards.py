"""Models with a feed-forward that is given: where it stands, training, decoding, and refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import losses, models, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.supervised import Loop, TrainTask
from layercomb.supervised.decoding import generate

B, L, V, D, F, H, MAX = 2, 12, 11, 8, 16, 2, 24
FF = tl.MixtureFF(32, 8, 2, balance=0.1)
SPARSE = {'ff_block_size': 4, 'qkv_modules': 4, 'head_modules': 2}
ATTENTION = tl.SelfAttention(H)
BUILDERS = {
    'TransformerLM': lambda **more: models.TransformerLM(V, D, F, 2, H, MAX, **more),
    'ReformerLM': lambda **more: models.ReformerLM(V, D, F, 2, H, MAX, attention=ATTENTION, **more),
    'TerraformerLM': lambda **more: models.TerraformerLM(V, D, F, 2, H, MAX, **SPARSE, **more),
    'Terraformer': lambda **more: models.Terraformer(V, D, F, 1, 1, H, MAX, **SPARSE, **more),
}
LMS = [name for name in BUILDERS if name.endswith('LM')]


def built(name, **more):
    return BUILDERS[name](ff=FF, **more)


def tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, V, shape or (B, L)), jnp.int32)


@functools.lru_cache
def model_of(net):
    inputs = (tokens(),) * net.n_in
    weights, state = jax.jit(lambda: net.init(lc.signature_of(inputs), jax.random.key(1)))()
    # Where embeddings are next to nothing, norms magnify rounding.
    weights = trees.map_with_path(lambda p, w: 50 * w if 'table' in p else w, weights)
    return lc.Model(net, weights, state)


@functools.partial(jax.jit, static_argnums=0, static_argnames='mode')
def apply(net, weights, state, inputs, mode=Mode.EVAL):
    return net.apply(weights, state, inputs, mode=mode)


@pytest.mark.parametrize('name', BUILDERS)
def test_it_stands_in_every_block_and_nothing_else_changes(name):
    for more in ({}, {'ff_chunk_len': 4}):
        net, plain = built(name, **more), BUILDERS[name](**more)
        found = [each for _, each in lc.walk(net) if isinstance(each, tl.MixtureFF)]
        assert found and set(found) == {FF}
        assert not any(isinstance(each, tl.SparseFF) for _, each in lc.walk(net))
        inside = [each for _, each in lc.walk(plain) if isinstance(each, tl.SelfAttention)]
        assert inside == [e for _, e in lc.walk(net) if isinstance(e, tl.SelfAttention)]
        assert eval(repr(built('TransformerLM')), vars(tl)) == built('TransformerLM')
    assert BUILDERS[name](ff=None) == BUILDERS[name]()


@pytest.mark.parametrize('name', LMS)
def test_decodes_what_it_evaluates(name):
    model, x = model_of(built(name)), tokens()
    (whole,), _ = apply(model.layer, model.weights, model.state, (x,))
    state = lc.init_state(model.layer, lc.shape_dtype((B, MAX), 'int32'), Mode.PREDICT)
    made = []
    for a, b in ((0, 9), (9, 10), (10, 11), (11, L)):  # tiles, then gathered rows
        (y,), state = apply(model.layer, model.weights, state, (x[:, a:b],), mode=Mode.PREDICT)
        made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), whole, rtol=1e-4, atol=1e-4)
    later = x.at[:, 7:].set((x[:, 7:] + 1) % V)
    (other,), _ = apply(model.layer, model.weights, model.state, (later,))
    np.testing.assert_allclose(other[:, :7], whole[:, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', LMS)
def test_generates_the_likeliest_of_what_it_evaluates(name):
    model = model_of(built(name))
    made = generate(model, [[1, 2, 3], [4, 5, 6]], 5, temperature=0)
    given = jnp.concatenate([jnp.asarray([[1, 2, 3], [4, 5, 6]]), made], 1)
    (logits,), _ = apply(model.layer, model.weights, model.state, (given,))
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), made)
    alone = [generate(model, [each], 5, temperature=0) for each in ([1, 2, 3], [4])]
    mixed = generate(model, [[1, 2, 3], [4]], 5, temperature=0)
    np.testing.assert_array_equal(mixed, np.concatenate(alone))


@pytest.mark.parametrize('name', ['ReformerLM', 'TerraformerLM', 'Terraformer'])
def test_the_reversible_gradient_is_that_of_plain_autodiff(name):
    net = built(name)
    model, inputs = model_of(net), (tokens(),) * net.n_in

    def loss(weights, mode):
        (y,), state = net.apply(weights, model.state, inputs, rng=jax.random.key(0), mode=mode)
        return jnp.sin(y).sum() + losses.total(state)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    # RECORD runs it as it stands, without the reversible gradient.
    got, wanted = (grad(model.weights, mode) for mode in (Mode.TRAIN, Mode.RECORD))
    for path, x in trees.flatten(wanted).items():
        scale = max(1.0, float(jnp.abs(x).max()))
        np.testing.assert_allclose(trees.get(got, path), x, rtol=0, atol=1e-4 * scale, err_msg=path)


@pytest.mark.parametrize('name', BUILDERS)
def test_trains(name):
    net = built(name)
    x = np.asarray(tokens(8, L))
    batch = (*(x,) * net.n_in, x, np.ones(x.shape, np.float32))
    task = TrainTask([batch] * 31, tl.CrossEntropyLoss(), optax.adam(0.03))
    loop = Loop(net, task, output_dir=None, progress=False)
    first = loop.run(1)['train/loss']
    before = trees.flatten(jax.tree.map(np.array, loop.weights))
    assert loop.run(30)['train/loss'] < 0.8 * first
    moved = {path for path, w in trees.flatten(loop.weights).items() if (before[path] != w).any()}
    assert {path for path in before if 'mixture_ff' in path} <= moved
    assert any(path.endswith('mixture_ff/router/bias') for path in moved)


@pytest.mark.parametrize('name', LMS)
@pytest.mark.parametrize('bits', [None, 8])
def test_unstacked_it_computes_the_same(name, bits):
    model, x = model_of(built(name)), (tokens(),)
    net, weights = model.layer, model.weights
    if bits:
        net, weights = transforms.quantize(net, weights, bits, smallest=1)
    (wanted,), _ = apply(net, weights, {}, x)
    net, weights = transforms.unstack(net, weights)
    (y,), _ = apply(net, weights, {}, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-3)


def test_adapters_train_beside_narrow_experts():
    model, x = model_of(built('TransformerLM')), tokens()
    net, weights = transforms.quantize(model.layer, model.weights, 8, smallest=1)
    net, weights = transforms.lora(net, weights, 2)
    flat = trees.flatten(weights)
    adapters = {path: w for path, w in flat.items() if transforms.is_lora(path)}
    assert adapters and not any('mixture_ff' in path for path in adapters)

    @jax.jit
    def grad(adapters):
        def loss(adapters):
            own = trees.unflatten({**flat, **adapters})
            (y,), _ = net.apply(own, model.state, (x,), rng=jax.random.key(0), mode=Mode.TRAIN)
            return jnp.sin(y).sum()

        return jax.grad(loss)(adapters)

    got = grad(adapters)
    assert all(np.isfinite(g).all() for g in got.values())
    assert all(g.any() for path, g in got.items() if path.endswith('_b'))


def test_two_replacements_are_refused():
    for build in (models.TerraformerLM, models.Terraformer):
        with pytest.raises(ValueError, match='d_sru=4 and ff both replace the feed-forward: give'):
            build(V, D, F, d_sru=4, ff=FF)
