"""`narrow_caches`: models that decode with keys and values in 16 or 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
import layercomb_kernels
from layercomb import Mode, models, tl, transforms
from layercomb.layers.core.walk import walk
from layercomb.layers.decoding.narrow import Rounded
from layercomb.supervised import decoding

V, ROOM = 50, 32
MODELS = {
    'gpt2': models.GPT2(V, 32, n_layers=2, n_heads=4, max_len=ROOM),
    'llama': models.Llama(V, 48, 64, n_layers=2, n_heads=6, n_kv_heads=2, max_len=ROOM),
    'window': models.Llama(V, 32, 48, n_layers=1, n_heads=2, window=5, max_len=ROOM),
}


@functools.cache
def model(name='llama'):
    made = lc.Model(MODELS[name]).init(lc.shape_dtype((1, 8), 'int32'))
    # Weights of a model that knows something: its logits are apart.
    weights = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), made.weights
    )
    return lc.Model(made.layer, weights, made.state)


def narrow(made, bits):
    return lc.Model(transforms.narrow_caches(made.layer, bits), made.weights, made.state)


def steps(net, weights, state, lengths, tokens):
    apply = jax.jit(lambda w, s, x: net.apply(w, s, (x,), mode=Mode.PREDICT))
    made, t = [], 0
    for length in lengths:
        (y,), state = apply(weights, state, tokens[:, t : t + length])
        made.append(y)
        t += length
    return jnp.concatenate(made, 1), state


def fresh(net, batch):
    return lc.init_state(net, jax.ShapeDtypeStruct((batch, ROOM), jnp.int32), Mode.PREDICT)


def test_every_cache_is_narrow_and_nothing_else_changes():
    net = MODELS['llama']
    eight = transforms.narrow_caches(net, 8)
    cores = [x for _, x in walk(eight) if isinstance(x, tl.DotProductAttention)]
    assert cores and all(core.cache_bits == 8 for core in cores)
    assert transforms.narrow_caches(eight, 16) == transforms.narrow_caches(net)
    tokens = jnp.arange(12).reshape(2, 6)
    weights = model().weights
    for a, b in zip(
        net.apply(weights, {}, (tokens,)), eight.apply(weights, {}, (tokens,)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('bits, error', [(16, 0.02), (8, 0.05)])
@pytest.mark.parametrize('name', MODELS)
def test_logits_are_near_those_of_float32(name, bits, error):
    made, tokens = model(name), jax.random.randint(jax.random.key(2), (2, ROOM), 0, V)
    both = [
        steps(net, made.weights, fresh(net, 2), (20, *[1] * 12), tokens)[0]
        for net in (made.layer, narrow(made, bits).layer)
    ]
    scale = float(jnp.abs(both[0]).max())
    assert 1e-6 < float(jnp.abs(both[0] - both[1]).max()) / scale < error


@pytest.mark.parametrize('bits', [16, 8])
@pytest.mark.parametrize('name', MODELS)
def test_the_likeliest_tokens_are_the_same_where_they_are_clear(name, bits):
    made, tokens = model(name), jax.random.randint(jax.random.key(3), (4, ROOM), 0, V)
    wanted, logits = (
        steps(net, made.weights, fresh(net, 4), (12, *[1] * 20), tokens)[0]
        for net in (made.layer, narrow(made, bits).layer)
    )
    first, second = jax.lax.top_k(wanted, 2)[0].transpose(2, 0, 1)
    clear = first - second > 2 * jnp.abs(wanted - logits).max()
    assert clear.mean() > 0.3
    assert (wanted.argmax(-1) == logits.argmax(-1))[clear].all()


@pytest.mark.parametrize('bits', [16, 8])
def test_greedy_tokens_are_the_same(bits):
    prompts, options = [[3, 1, 4, 1, 5], [9, 2, 6]], {'n_tokens': 20, 'temperature': 0}
    wanted = decoding.generate(model(), prompts, **options)
    made = decoding.generate(narrow(model(), bits), prompts, **options)
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.skipif(not layercomb_kernels.available(), reason='there are no native kernels here')
@pytest.mark.parametrize('bits', [None, 16, 8])
@pytest.mark.parametrize('name', MODELS)
def test_fused_steps_are_those_of_the_layers(name, bits):
    made = model(name) if bits is None else narrow(model(name), bits)
    net, weights = transforms.unstack(made.layer, made.weights)
    tokens = jax.random.randint(jax.random.key(2), (3, ROOM), 0, V)
    state = tl.seek(fresh(net, 3), jnp.array([0, 2, 1]))
    run = functools.partial(steps, weights=weights, tokens=tokens, lengths=(1, 4, 1, 1, 1))
    fused = transforms.fuse(net)
    text = jax.jit(lambda w, s, x: fused.apply(w, s, (x,), mode=Mode.PREDICT))
    assert '@layercomb_run_program' in text.lower(weights, state, tokens[:, :1]).as_text()
    (y, s), (wanted, t) = (run(each, state=state) for each in (fused, net))
    error = 2e-5 if bits is None else 2e-4  # of two that are as near, either is right
    np.testing.assert_allclose(y, wanted, atol=error * float(jnp.abs(wanted).max()))
    for a, b in zip(jax.tree.leaves(s), jax.tree.leaves(t), strict=True):
        apart = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
        assert (apart <= (1 if a.dtype == jnp.int8 else 0.01)).all()
        assert (apart > 1e-4).mean() < 0.01


@pytest.mark.skipif(not layercomb_kernels.available(), reason='there are no native kernels here')
@pytest.mark.parametrize('bits', [16, 8])
def test_what_overflows_writes_nothing(bits):
    net, weights = transforms.unstack(narrow(model(), bits).layer, model().weights)
    state = tl.seek(fresh(net, 2), jnp.array([ROOM - 1, 3]))
    apply = jax.jit(lambda s, x: transforms.fuse(net).apply(weights, s, (x,), mode=Mode.PREDICT))
    (y,), after = apply(state, jnp.ones((2, 2), jnp.int32))
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()
    caches = [x for x in jax.tree.leaves(after) if x.ndim == 3]
    assert len(caches) == (8 if bits == 8 else 4)  # keys and values of 2 layers, and scales
    for x in caches:
        x = x.reshape(2, -1, *x.shape[1:]).astype(jnp.float32)
        assert not x[0].any() and x[1, :, 3:5].any()


@pytest.mark.parametrize('bits', [16, 8])
def test_what_is_not_finite_is_seen(bits):
    net, weights = transforms.unstack(narrow(model(), bits).layer, model().weights)
    weights = jax.tree.map(lambda x: x * jnp.nan, weights)
    y, _ = steps(transforms.fuse(net), weights, fresh(net, 1), (1,), jnp.ones((1, 1), jnp.int32))
    assert jnp.isnan(y).all()


def test_beams_and_drafts_keep_their_rows():
    made = narrow(model(), 8)
    found = decoding.beam_search(made, [[3, 1, 4]], 10, n_beams=3)
    wanted = decoding.beam_search(model(), [[3, 1, 4]], 10, n_beams=3)
    np.testing.assert_array_equal(found.tokens[0, 0], wanted.tokens[0, 0])
    options = {'n_tokens': 20, 'temperature': 0}
    alone = decoding.generate(made, [[3, 1, 4, 1, 5]], **options)
    drafted = decoding.generate(made, [[3, 1, 4, 1, 5]], speculate=decoding.Lookup(3), **options)
    np.testing.assert_array_equal(drafted, alone)


def test_caches_take_less():
    takes = {
        bits: decoding.decoding_bytes(model() if bits is None else narrow(model(), bits), ROOM)
        for bits in (None, 16, 8)
    }
    rows = 2 * 2 * 2 * ROOM  # layers, keys and values, heads and positions
    moved = {bits: n['caches'] - takes[None]['caches'] for bits, n in takes.items()}
    assert moved[16] == -2 * 8 * rows and moved[8] == (4 - 3 * 8) * rows


def test_layers_that_decode_without_such_caches_stay():
    net = tl.Serial(tl.SelfAttention(2), tl.HashedSelfAttention(2), tl.CrossAttention(2))
    made = transforms.narrow_caches(net, 8)
    assert made.layers[0].core.cache_bits == 8 and made.layers[1:] == net.layers[1:]
    state = lc.init_state(
        transforms.narrow_caches(
            tl.Serial(tl.SelfAttention(2), tl.LSHSelfAttention(2, max_len=8)), 8
        ),
        jax.ShapeDtypeStruct((1, 8, 8), jnp.float32),
    )
    kinds = [isinstance(x, Rounded) for x in jax.tree.leaves(state, is_leaf=_is_rounded)]
    assert sum(kinds) == 2


def _is_rounded(x):
    return isinstance(x, Rounded)


@pytest.mark.parametrize('net', [tl.Dense(3), tl.CrossAttention(2), tl.HashedSelfAttention(2)])
def test_nothing_to_narrow_is_refused(net):
    with pytest.raises(ValueError, match=r'has no cache that can be narrow: .* tl.SelfAttention'):
        transforms.narrow_caches(net, 8)


def test_other_bits_are_refused():
    with pytest.raises(TypeError, match='narrow_caches: bits must be 16 or 8, got 4'):
        transforms.narrow_caches(tl.SelfAttention(2), 4)
