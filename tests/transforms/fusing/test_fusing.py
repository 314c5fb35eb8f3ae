"""Decoding steps as one native call: they are what the layers themselves compute."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_steps import calls, check_places, near, steps, unstacked

import layercomb as lc
import layercomb_kernels
from layercomb import Mode, models, tl, transforms
from layercomb.supervised import decoding
from layercomb.transforms.fusing.program import Program

pytestmark = pytest.mark.skipif(
    not layercomb_kernels.available(), reason='there are no native kernels here'
)
ROOM = 24
MODELS = {
    'gpt2': models.GPT2(100, 64, n_layers=2, n_heads=4, max_len=ROOM),
    'llama': models.Llama(
        100, 64, 96, n_layers=2, n_heads=4, n_kv_heads=2, max_len=ROOM, qk_norm=True
    ),
    'window': models.Llama(100, 64, 96, n_layers=2, n_heads=4, window=5, max_len=ROOM),
    'odd': models.GPT2(100, 36, d_ff=52, n_layers=1, n_heads=3, max_len=ROOM),
    'gemma': models.Gemma3(
        100, 64, 96, n_layers=2, n_heads=4, n_kv_heads=1, max_len=ROOM, d_head=32, window=(5, None)
    ),
    'chunked': models.Llama(100, 32, 48, n_layers=1, n_heads=2, max_len=ROOM, ff_chunk_len=8),
}


@functools.cache
def made(name, bits, batch):
    return unstacked(MODELS[name], bits, batch, ROOM)


@pytest.mark.parametrize(
    'name, bits, batch, length',
    [
        *(('gpt2', bits, 1, 1) for bits in (None, 16, 8, 4)),
        ('llama', None, 3, 1),
        ('llama', 4, 2, 4),
        ('window', 8, 2, 4),
        ('odd', None, 2, 3),
        ('odd', 8, 1, 1),
        ('gemma', 16, 3, 1),
        ('chunked', 8, 1, 2),
    ],
)
def test_steps_are_those_of_the_layers(name, bits, batch, length):
    net, weights, state = made(name, bits, batch)
    fused = transforms.fuse(net)
    assert calls(fused, weights, state, batch, length) >= 1
    both = (steps(each, weights, state, length, batch, ROOM // length) for each in (fused, net))
    for (y, s), (wanted, t) in zip(*both, strict=True):
        error = 2e-5 if bits in (None, 16) else 1e-3
        near(y, wanted, error)
        for a, b in zip(jax.tree.leaves(s), jax.tree.leaves(t), strict=True):
            near(a.astype(jnp.float32), b.astype(jnp.float32), error)


def test_all_blocks_are_one_call():
    net, weights, state = made('llama', 8, 1)
    assert calls(transforms.fuse(net), weights, state, 1, 1) == 1


@pytest.mark.parametrize('kind', ['relu', 'relu2', 'gelu', 'silu', 'tanh', 'sigmoid', 'elu'])
def test_activations_are_those_of_the_layers(kind):
    net = tl.Serial(tl.Dense(37), tl.activation(kind), tl.Dense(5))
    x = jax.random.normal(jax.random.key(2), (2, 3, 19)) * 4
    weights = net.init(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(0))[0]
    fused = transforms.fuse(net)
    (y,), _ = fused.apply(weights, {}, (x,), mode=Mode.PREDICT)
    near(y, net.apply(weights, {}, (x,))[0][0], 1e-5)
    (y,), _ = fused.apply(weights, {}, (x.at[1, 2].set(jnp.nan),), mode=Mode.PREDICT)
    assert jnp.isnan(y[1, 2]).all() and jnp.isfinite(y[0]).all()


@pytest.mark.parametrize('change', ['mode', 'rows', 'adapter', 'off', 'ranks'])
def test_what_has_no_native_way_is_applied_by_the_layers(change):
    net = tl.Serial(tl.LayerNorm(), tl.Dense(16))
    x = jnp.ones((1, 40 if change == 'rows' else 4, 16))
    weights = net.init(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(0))[0]
    if change == 'adapter':
        net, weights = transforms.lora(net, weights, 2)
    fused = transforms.fuse(net)
    x = x[0] if change == 'ranks' else x
    mode = Mode.EVAL if change == 'mode' else Mode.PREDICT

    def run(weights, x):
        return fused.apply(weights, {}, (x,), mode=mode)[0][0]

    if change == 'off':
        with layercomb_kernels.off():
            text = jax.jit(run).lower(weights, x).as_text()
    else:
        text = jax.jit(run).lower(weights, x).as_text()
    assert '@layercomb_run_program' not in text
    y, wanted = run(weights, x), net.apply(weights, {}, (x,))[0][0]
    near(y.astype(jnp.float32), wanted.astype(jnp.float32), 1e-6)


class Twice(tl.Dense):
    """A subclass that computes something else."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (2 * y,), state


class Cubed(tl.Relu):
    function = staticmethod(lambda x: x**3)


@pytest.mark.parametrize('layer', [Twice(16), Cubed()])
def test_a_subclass_that_computes_something_else_is_left_alone(layer):
    net = tl.Serial(tl.Dense(16), layer, tl.Dense(16))
    x = jax.random.normal(jax.random.key(2), (1, 2, 16))
    weights = net.init(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(0))[0]
    (y,), _ = transforms.fuse(net).apply(weights, {}, (x,), mode=Mode.PREDICT)
    near(y, net.apply(weights, {}, (x,))[0][0], 1e-6)


@pytest.mark.parametrize(
    'path, shape',
    [
        ('dense/bias', (4, 4)),
        ('dense/kernel', (8, 16)),
        ('self_attention/output/kernel', (4, 8, 16)),
    ],
)
def test_weights_of_another_shape_are_refused_as_the_layers_refuse_them(path, shape):
    net = tl.Serial(tl.SelfAttention(8, d_head=4), tl.Dense(16))
    signature = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)
    weights, state = net.init((signature,), jax.random.key(0), Mode.PREDICT)
    weights = lc.trees.put(lc.trees.drop(weights, path), path, jnp.ones(shape))
    with pytest.raises((TypeError, ValueError)):
        transforms.fuse(net).apply(weights, state, (jnp.ones((1, 1, 16)),), mode=Mode.PREDICT)


def test_a_state_of_ones_own_is_not_written_over():
    net, weights, state = made('gpt2', None, 1)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
    for given in (state, jax.tree.map(np.array, kept)):
        transforms.fuse(net).apply(
            weights, given, (jnp.ones((1, 1), jnp.int32),), mode=Mode.PREDICT
        )
        jax.tree.map(np.testing.assert_array_equal, given, kept)


class Still(tl.RotaryPositions):
    def _turned(self, x, sin, cos):
        return x


class Doubled(tl.GatedDense):
    def _kernel_and_bias(self, weights, name):
        return {'kernel': 2 * weights[name]}


@pytest.mark.parametrize('part', [tl.SelfAttention(2, rotary=Still()), Doubled(16)])
def test_what_a_subclass_overrides_inside_counts(part):
    net = tl.Serial(tl.RMSNorm(), part)
    x = jax.random.normal(jax.random.key(2), (1, 3, 16))
    weights, state = net.init(
        (jax.ShapeDtypeStruct(x.shape, x.dtype),), jax.random.key(0), Mode.PREDICT
    )
    (y,), _ = transforms.fuse(net).apply(weights, state, (x,), mode=Mode.PREDICT)
    near(y, net.apply(weights, state, (x,), mode=Mode.PREDICT)[0][0], 1e-5)


def test_fields_say_whether_there_are_biases():
    net = tl.Serial(tl.SelfAttention(2))
    signature = (jax.ShapeDtypeStruct((1, 4, 16), jnp.float32),)
    weights, state = net.init(signature, jax.random.key(0), Mode.PREDICT)
    weights = jax.tree.map(lambda x: x + 1, weights)
    bare = tl.Serial(tl.SelfAttention(2, qkv_bias=False, out_bias=False))
    x = jnp.ones((1, 1, 16))
    (y,), _ = transforms.fuse(bare).apply(weights, state, (x,), mode=Mode.PREDICT)
    near(y, bare.apply(weights, state, (x,), mode=Mode.PREDICT)[0][0], 1e-5)
    without = lc.trees.drop(weights, 'self_attention/query/bias')
    with pytest.raises(KeyError):
        transforms.fuse(net).apply(without, state, (x,), mode=Mode.PREDICT)


def test_heads_come_out_as_heads():
    net = tl.Serial(tl.LayerNorm(), tl.SplitHeads(2))
    x = jax.random.normal(jax.random.key(2), (2, 5, 16))
    weights = net.init(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(0))[0]
    (y,), _ = transforms.fuse(net).apply(weights, {}, (x,), mode=Mode.PREDICT)
    near(y, net.apply(weights, {}, (x,))[0][0], 1e-5)


@pytest.mark.parametrize('taken, nan', [((ROOM - 2, 3), 0), ((-5, 3), 0), ((-40, 3), 0)])
def test_rows_whose_positions_do_not_fit_are_nan_and_write_nothing(taken, nan):
    net, weights, state = made('llama', None, 2)
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tl.seek(state, jnp.array([0, 0])))
    state = tl.seek(state, jnp.array(taken))
    fused = transforms.fuse(net)
    run = jax.jit(lambda w, s, x: fused.apply(w, s, (x,), mode=Mode.PREDICT))
    (y,), new = run(weights, state, jnp.zeros((2, 4), jnp.int32))
    assert jnp.isnan(y[nan]).all() and jnp.isfinite(y[1 - nan]).all()
    core = ('block', '0', 'attention', 'self_attention', 'core')
    old, new = (functools.reduce(lambda tree, key: tree[key], core, s) for s in (state, new))
    np.testing.assert_array_equal(old.by_row(old.k)[nan], new.by_row(new.k)[nan])


@pytest.mark.parametrize('rows', [(1,), ()])
def test_positions_of_another_shape_are_left_to_the_layers(rows):
    net, weights, state = made('llama', None, 2)
    bad = jax.tree.map(
        lambda x: tl.Position(jnp.zeros(rows, jnp.int32)) if isinstance(x, tl.Position) else x,
        state,
        is_leaf=lambda x: isinstance(x, tl.Position),
    )
    outcomes = []
    for each in (transforms.fuse(net), net):
        try:
            run = jax.jit(lambda w, s, x, each=each: each.apply(w, s, (x,), mode=Mode.PREDICT))
            outcomes.append(run(weights, bad, jnp.zeros((2, 1), jnp.int32))[0][0].shape)
        except (TypeError, ValueError, IndexError) as e:
            outcomes.append(type(e))
    assert outcomes[0] == outcomes[1]


def test_a_step_is_mapped_and_has_no_derivative():
    net = tl.Serial(tl.LayerNorm(), tl.Dense(16))
    x = jax.random.normal(jax.random.key(2), (3, 1, 2, 16))
    weights = net.init(jax.ShapeDtypeStruct(x.shape[1:], x.dtype), jax.random.key(0))[0]
    fused = transforms.fuse(net)

    def run(x):
        return fused.apply(weights, {}, (x,), mode=Mode.PREDICT)[0][0]

    near(jax.vmap(run)(x), jax.vmap(lambda x: net.apply(weights, {}, (x,))[0][0])(x), 1e-5)
    with pytest.raises(ValueError, match='has no derivative: take that of the model'):
        jax.grad(lambda x: run(x).sum())(x[0])


def test_masks_are_left_to_the_layers():
    net = tl.Residual(tl.SelfAttention(2, masked=True))
    assert not isinstance(transforms.fuse(net), transforms.Fused)


def test_what_overflows_the_cache_is_nan_in_its_row_alone():
    net, weights, state = made('llama', None, 2)
    state = tl.seek(state, jnp.array([ROOM, 3]))
    (y,), _ = jax.jit(lambda w, s, x: transforms.fuse(net).apply(w, s, (x,), mode=Mode.PREDICT))(
        weights, state, jnp.zeros((2, 1), jnp.int32)
    )
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()


def test_known_overflow_is_refused_in_words():
    net, weights, state = made('llama', None, 1)
    state = tl.seek(state, jnp.array([ROOM]))
    with pytest.raises(ValueError, match=r'max_len|the cache holds'):
        transforms.fuse(net).apply(
            weights, state, (jnp.zeros((1, 1), jnp.int32),), mode=Mode.PREDICT
        )


def test_the_same_tokens_are_generated_and_streamed():
    net, weights, _ = made('gpt2', 8, 1)
    model = lc.Model(net, weights, {})
    prompts = [[1, 2, 3], [4]]
    tokens = decoding.generate(model, prompts, 12, temperature=1.0, rng=jax.random.key(3))
    streamed = decoding.stream(model, prompts, 12, temperature=1.0, rng=jax.random.key(3))
    np.testing.assert_array_equal(np.stack(list(streamed), 1), tokens)
    with layercomb_kernels.off():
        plain = decoding.generate(model, prompts, 12, temperature=0)
    fast = decoding.generate(model, prompts, 12, temperature=0)
    assert (np.asarray(plain) == np.asarray(fast)).mean() > 0.8  # rounding may turn a tie


def test_runs_are_the_same_bit_by_bit():
    net, weights, state = made('gpt2', None, 3)
    fused = transforms.fuse(net)
    first, *others = (list(steps(fused, weights, state, 1, 3, 6)) for _ in range(4))
    for other in others:
        for (a, _), (b, _) in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_fusing_again_changes_nothing_and_paths_stay():
    net, weights, _ = made('gpt2', None, 1)
    fused = transforms.fuse(net)
    assert transforms.fuse(fused) == fused
    signature = jax.ShapeDtypeStruct((1, ROOM), jnp.int32)
    fresh = jax.eval_shape(lambda: fused.init((signature,), jax.random.key(0))[0])
    assert jax.tree.structure(fresh) == jax.tree.structure(weights)


def test_values_that_are_needed_have_places_of_their_own():
    program = Program((1, 1, 20))
    (x,) = program.inputs
    values = [program.activate(x, 'relu')]
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (values[i] for i in rng.integers(max(0, len(values) - 6), len(values), 2))
        if rng.random() < 0.4:
            values.append(program.product(a, jnp.zeros((20, 20)), None, (1, 1, 20)))
        else:
            values.append(program.combine('add', a, b))
    assert check_places(program, values[-1:]) > 30


@pytest.mark.parametrize('given, wanted', [('2', 'True'), ('none', 'LAYERCOMB_THREADS=')])
def test_threads_are_limited_by_the_environment(given, wanted):
    done = subprocess.run(
        [sys.executable, '-c', 'import layercomb_kernels as k; print(k.available())'],
        env={**os.environ, 'LAYERCOMB_THREADS': given},
        capture_output=True,
        text=True,
    )
    assert wanted in done.stdout + done.stderr
