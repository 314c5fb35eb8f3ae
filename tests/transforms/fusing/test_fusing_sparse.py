"""Decoding steps of sparse and reversible models as native calls: what the layers compute."""

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
from layercomb.transforms.fusing.program import _OPS, Value
from layercomb.transforms.fusing.sparse_program import SparseProgram

pytestmark = pytest.mark.skipif(
    not layercomb_kernels.available(), reason='there are no native kernels here'
)
ROOM = 16
SPARSE = {'ff_block_size': 16, 'qkv_modules': 4, 'head_modules': 4}
MODELS = {
    'sparse': SPARSE,
    'odd': {'ff_block_size': 8, 'qkv_modules': 16, 'head_modules': 3, 'kernel_size': (2, 4)},
    'dense': {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None},
    'hashed': {**SPARSE, 'attention': tl.HashedSelfAttention(4)},
    'chunked': {**SPARSE, 'ff_chunk_len': 4, 'dropout': 0.1},
}


@functools.cache
def made(name, bits, batch):
    return unstacked(
        models.TerraformerLM(100, 64, 128, 2, 4, ROOM, **MODELS[name]), bits, batch, ROOM
    )


@pytest.mark.parametrize(
    'name, bits, batch, length, n_calls',
    [
        *(('sparse', bits, 1, 1, 2) for bits in (None, 16, 8, 4)),
        ('sparse', 4, 2, 2, 2),
        ('sparse', 8, 3, 5, 2),
        ('odd', None, 2, 3, 2),
        ('odd', 8, 1, 1, 2),
        ('dense', 8, 2, 1, 2),
        ('hashed', 8, 1, 1, 3),  # feed-forwards and the head
        ('chunked', 8, 1, 2, 2),
    ],
)
def test_steps_are_those_of_the_layers(name, bits, batch, length, n_calls):
    net, weights, state = made(name, bits, batch)
    fused = transforms.fuse(net)
    assert calls(fused, weights, state, batch, length) == n_calls
    both = (steps(each, weights, state, length, batch, ROOM // length) for each in (fused, net))
    for (y, s), (wanted, t) in zip(*both, strict=True):
        error = 2e-5 if bits in (None, 16) else 1e-3
        near(y, wanted, error)
        assert jax.tree.structure(s) == jax.tree.structure(t)
        for a, b in zip(jax.tree.leaves(s), jax.tree.leaves(t), strict=True):
            near(a, b, error)


def test_more_rows_than_a_block_are_left_to_the_layers():
    net, weights, state = made('odd', 8, 3)
    fused = transforms.fuse(net)
    assert calls(fused, weights, state, 3, 3) == 1  # the head alone
    (y, _), (wanted, _) = (next(steps(each, weights, state, 3, 3, 1)) for each in (fused, net))
    near(y, wanted, 1e-3)


def test_rows_that_do_not_fit_are_nan_and_keep_nothing():
    net, weights, state = made('sparse', None, 2)
    state = tl.seek(state, jnp.array([ROOM - 2, 3]))
    run = jax.jit(lambda w, s, x: transforms.fuse(net).apply(w, s, (x,), mode=Mode.PREDICT))
    (y,), new = run(weights, state, jnp.zeros((2, 4), jnp.int32))
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()
    pasts = [
        [x.past for x in jax.tree.leaves(s, is_leaf=_is_past) if _is_past(x)] for s in (state, new)
    ]
    assert len(pasts[0]) == 2
    for old, now in zip(*pasts, strict=True):
        np.testing.assert_array_equal(old[0], now[0])
        assert (old[1] != now[1]).any()


def _is_past(x):
    return hasattr(x, 'past')


def test_known_overflow_is_refused_in_words():
    net, weights, state = made('sparse', None, 1)
    state = tl.seek(state, jnp.array([ROOM]))
    with pytest.raises(ValueError, match=r'max_len|the cache holds'):
        transforms.fuse(net).apply(
            weights, state, (jnp.zeros((1, 1), jnp.int32),), mode=Mode.PREDICT
        )


def test_what_is_not_a_number_stays_so():
    net = tl.Serial(tl.LayerNorm(), tl.SparseFF(64, 8))
    x = jax.random.normal(jax.random.key(2), (2, 2, 16))
    weights = net.init((jax.ShapeDtypeStruct(x.shape, x.dtype),), jax.random.key(0))[0]
    (y,), _ = transforms.fuse(net).apply(weights, {}, (x.at[1, 1].set(jnp.nan),), mode=Mode.PREDICT)
    near(y[0], net.apply(weights, {}, (x,), mode=Mode.PREDICT)[0][0][0], 1e-5)
    assert jnp.isnan(y[1, 1]).all() and jnp.isfinite(y[1, 0]).all()


@pytest.mark.parametrize(
    'net, width',
    [
        (tl.Serial(tl.Concatenate(), tl.Dense(8)), (16, 8)),
        (tl.Serial(tl.Swap(), tl.Dense(8)), (16, 16)),
        (tl.Serial(tl.Dense(8), tl.Dup(), tl.Add()), (16,)),
        (tl.ReversibleSerial(tl.ReversibleHalfResidual(tl.Dense(16))), (16, 16)),
        (tl.Parallel(tl.Dense(8), None), (16, 12)),
        (tl.SparseFF(64, 16, use_bias=False, activation='gelu'), (16,)),
    ],
)
def test_several_streams_go_in_and_come_out(net, width):
    net = net if net.sublayers else tl.Serial(tl.RMSNorm(), net)
    inputs = tuple(jax.random.normal(jax.random.key(n), (2, 3, n)) for n in width)
    signature = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    weights = net.init(signature, jax.random.key(0))[0]
    fused = transforms.fuse(net)
    assert isinstance(fused, transforms.Fused)
    made, _ = fused.apply(weights, {}, inputs, mode=Mode.PREDICT)
    wanted, _ = net.apply(weights, {}, inputs, mode=Mode.PREDICT)
    assert len(made) == len(wanted) == net.n_out
    for a, b in zip(made, wanted, strict=True):
        near(a, b, 1e-5)


def test_the_same_tokens_are_generated_and_streamed():
    net, weights, _ = made('sparse', 8, 1)
    model = lc.Model(net, weights, {})
    prompts = [[1, 2, 3], [4]]
    tokens = decoding.generate(model, prompts, 8, temperature=1.0, rng=jax.random.key(3))
    streamed = decoding.stream(model, prompts, 8, temperature=1.0, rng=jax.random.key(3))
    np.testing.assert_array_equal(np.stack(list(streamed), 1), tokens)


@pytest.mark.parametrize(
    'path, shape',
    [
        ('sparse_ff/in/bias', (8, 8)),
        ('sparse_ff/out/kernel', (64, 8)),
        ('sparse_ff/controller/out/kernel', (16, 32)),
        ('multiplicative_dense/modules', (4, 8)),
        ('multiplicative_dense/bias', (4, 4)),
        ('local_conv/kernel', (3, 3, 2, 4)),
        ('local_conv/bias', (2, 4)),
    ],
)
def test_weights_of_another_shape_are_refused_as_the_layers_refuse_them(path, shape):
    net = tl.Serial(tl.SparseFF(64, 8), tl.MultiplicativeDense(4), tl.LocalConv(4))
    signature = (jax.ShapeDtypeStruct((1, 4, 16), jnp.float32),)
    weights, state = net.init(signature, jax.random.key(0), Mode.PREDICT)
    weights = lc.trees.put(lc.trees.drop(weights, path), path, jnp.ones(shape))
    outcomes = []
    for each in (transforms.fuse(net), net):
        try:
            made, _ = each.apply(weights, state, (jnp.ones((1, 1, 16)),), mode=Mode.PREDICT)
            outcomes.append(made[0].shape)
        except Exception as e:
            outcomes.append(type(e))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize('n_features', [8, 300])  # few are computed apart
def test_values_of_sparse_instructions_have_places_of_their_own(n_features):
    program = SparseProgram((2, 3, 32), (2, 3, 32))
    both = program.join(program.inputs, 64)
    ones = jnp.ones(64)
    x = program.combine('add', both, program.normalize(both, ones, ones, 1e-6))
    for _ in range(3):
        y = program.factored_product(x, jnp.ones((4, 64)), jnp.ones((n_features, 64)), None)
        y = program.product(program.activate(y, 'relu'), jnp.ones((y.width, 64)), None, (2, 3, 64))
        kernels = (jnp.ones((32, 64)),) * 2
        controller = jnp.ones((64, 8)), jnp.ones((8, 32))
        chosen = program.chosen(y, kernels, controller, (None, None), 8, 'relu')
        x = program.normalize(program.combine('add', x, chosen), ones, ones, 1e-6)
    assert check_places(program, (x,)) > 15
    scaling = [each for each in program._instructions if each.words[0] == _OPS.index('factors')]
    assert len(scaling) == 3  # they write what is scaled, before the product reads it
    assert all(any(isinstance(token, Value) for token in each.writes) for each in scaling)
