"""Each leaf against a slow, obvious NumPy reference, and what wrong fields are told."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl, transforms
from layercomb.layers.basic.dense import dense
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype, signature_of


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(layer: Layer, *inputs, seed: int = 0, mode: Mode = Mode.TRAIN):
    return layer.init(signature_of(tuple(map(jnp.asarray, inputs))), jax.random.key(seed), mode)


def run(layer: Layer, *inputs, weights=None, state=None, mode: Mode = Mode.EVAL, rng=None):
    inputs = tuple(map(jnp.asarray, inputs))
    outputs, new = layer.apply(weights or {}, state or {}, inputs, mode=mode, rng=rng)
    outputs = outputs[0] if len(outputs) == 1 else outputs
    return outputs if state is None else (outputs, new)


def assert_close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


# Dense.


def test_dense():
    x, w, b = values(2, 3, 4), values(4, 5, seed=1), values(5, seed=2)
    assert_close(run(tl.Dense(5), x, weights={'kernel': w, 'bias': b}), x @ w + b)
    assert_close(run(tl.Dense(5, use_bias=False), x, weights={'kernel': w}), x @ w)
    weights, _ = init(tl.Dense(), x)
    assert weights['kernel'].shape == (4, 4) and not weights['bias'].any()
    limit = math.sqrt(6 / (4 + 4))
    assert np.abs(weights['kernel']).max() <= limit


@pytest.mark.parametrize('width', [2, 6])
def test_dense_has_every_derivative(width):
    def loss(product):
        return lambda kernel, x: jnp.sin(product(x, kernel)).sum()

    kernel = jax.random.normal(jax.random.key(0), (4, width))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    ours, plain = (loss(lambda x, w: dense({'kernel': w}, x)), loss(jnp.dot))
    for derivative in (
        lambda f: jax.grad(f, (0, 1))(kernel, x),
        lambda f: jax.jvp(f, (kernel, x), (kernel, x)),
        lambda f: jax.hessian(f)(kernel, x),
        lambda f: jax.vmap(jax.grad(f), (None, 0))(kernel, x),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            derivative(ours),
            derivative(plain),
        )


@pytest.mark.parametrize('width', [8, 64])
def test_the_gradient_of_a_dense_keeps_its_input_alone(width):
    def residuals(product):
        _, pull = jax.vjp(product, jnp.ones((16, 32)), jnp.ones((32, width)))
        return sorted(x.shape for x in jax.tree.leaves(pull))

    assert residuals(lambda x, w: dense({'kernel': w}, x)) == residuals(jnp.dot)


def test_dense_sums_in_float32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    kernel = jnp.full((4096, 1), 2**-10, jnp.bfloat16)
    y = run(tl.Dense(1, use_bias=False), x, weights={'kernel': kernel})
    assert y.dtype == jnp.bfloat16 and y == 4.0


def test_dense_takes_vectors_of_floats():
    with pytest.raises(TypeError, match=r'Dense takes .* got int32\[2,3\]: embed integers first'):
        tl.Dense(4).output_signature(shape_dtype((2, 3), 'int32'))
    with pytest.raises(TypeError, match=r'got float32\[\]'):
        tl.Dense(4).output_signature(shape_dtype(()))
    weights, _ = init(tl.Dense(2), values(1, 4))
    with pytest.raises(
        ValueError, match='input is 3 wide and the weights were made for 4: give the'
    ):
        run(tl.Dense(2), values(1, 3), weights=weights)


# Embedding.


@pytest.mark.parametrize('dtype', ['int32', 'uint8', 'int8'])
def test_embedding(dtype):
    table = values(130, 3)
    ids = np.array([[0, 5], [127, 1]], dtype)
    got = run(tl.Embedding(130, 3), ids, weights={'table': jnp.asarray(table)})
    assert_close(got, table[ids])


def test_embedding_multiplies_by_its_scale():
    table, ids = values(7, 4), np.array([[0, 5], [6, 1]], np.int32)
    layer, weights = tl.Embedding(7, 4, scale=2.5), {'table': jnp.asarray(table)}
    assert_close(run(layer, ids, weights=weights), 2.5 * table[ids])
    small, narrow = transforms.quantize(layer, weights, smallest=1)
    np.testing.assert_allclose(run(small, ids, weights=narrow), 2.5 * table[ids], atol=0.05)


def test_embedding_of_an_id_outside_raises_where_it_is_known():
    layer = tl.Embedding(4, 3)
    weights, _ = init(layer, np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match='token id 4 is outside the vocabulary of 4: ids run from'):
        run(layer, np.array([1, 4], np.int32), weights=weights)
    with pytest.raises(ValueError, match=r'token id -1 is outside .*: ids run from 0 to 3; check'):
        run(layer, np.array([1, -1], np.int32), weights=weights)
    assert run(layer, np.zeros((0, 2), np.int32), weights=weights).shape == (0, 2, 3)


def test_embedding_of_an_id_outside_is_nan_inside_jit():
    layer = tl.Embedding(4, 3)
    weights, _ = init(layer, np.zeros((1, 2), np.int32))
    y = jax.jit(lambda ids: run(layer, ids, weights=weights))(np.array([3, 4, -1, 0], np.int32))
    assert np.isnan(y).all(-1).tolist() == [False, True, True, False]


def test_embedding_takes_integers():
    with pytest.raises(TypeError, match=r'Embedding takes integers, got float32\[2\]: give token'):
        tl.Embedding(4, 3).output_signature(shape_dtype((2,)))


# Dropout.


def test_dropout_drops_and_scales():
    x = np.ones((50, 40), np.float32)
    y = run(tl.Dropout(0.25), x, mode=Mode.TRAIN, rng=jax.random.key(0))
    assert_close(np.unique(y), [0, 1 / 0.75])
    assert abs((np.asarray(y) == 0).mean() - 0.25) < 0.03
    assert abs(float(y.mean()) - 1) < 0.05


def test_dropout_shares_axes():
    x = np.ones((4, 6, 8), np.float32)
    y = np.asarray(run(tl.Dropout(0.5, (1,)), x, mode=Mode.TRAIN, rng=jax.random.key(0)))
    assert (y == y[:, :1]).all() and len(np.unique(y[:, 0])) == 2
    y = np.asarray(run(tl.Dropout(0.5, (0, -1)), x, mode=Mode.TRAIN, rng=jax.random.key(0)))
    assert (y == y[:1, :, :1]).all()
    with pytest.raises(ValueError, match=r'shared_axes=\(3,\) are axes of the input, which has'):
        init(tl.Dropout(0.5, (3,)), x)


def test_dropout_needs_a_key_in_training_alone():
    x = values(3)
    with pytest.raises(ValueError, match=r'Dropout\(0.5\) draws in training: pass rng='):
        run(tl.Dropout(0.5), x, mode=Mode.TRAIN)
    assert (run(tl.Dropout(0.5), x) == x).all()
    assert (run(tl.Dropout(0.0), x, mode=Mode.TRAIN) == x).all()


# Norms.


def test_layer_norm():
    x, scale, bias = 3 * values(2, 3, 8) + 2, values(8, seed=1), values(8, seed=2)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    wanted = (x - mean) / np.sqrt(var + 1e-6) * scale + bias
    weights = {'scale': scale, 'bias': bias}
    assert_close(run(tl.LayerNorm(), x, weights=weights), wanted)
    bare = run(tl.LayerNorm(use_bias=False), x, weights={'scale': scale})
    assert_close(bare, wanted - bias)


def test_rms_norm():
    x, scale = 3 * values(2, 3, 8) + 2, values(8, seed=1)
    wanted = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale
    assert_close(run(tl.RMSNorm(), x, weights={'scale': scale}), wanted)
    shifted, mode = tl.RMSNorm(offset=1.0), Mode.PREDICT  # in which the native kernel computes it
    assert_close(run(shifted, x, weights={'scale': scale - 1}), wanted)
    assert_close(run(shifted, x, weights={'scale': scale - 1}, mode=mode), wanted)
    weights, _ = init(shifted, x)
    assert not weights['scale'].any()


@pytest.mark.parametrize('centred', [True, False])
def test_norms_have_every_derivative(centred):
    def plain(x, weights):
        x = x - x.mean(-1, keepdims=True) if centred else x
        y = (
            x
            / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
            * weights['scale'][None, None]
        )
        return jnp.sin(y + weights['bias'][None, None] if centred else y).sum()

    def ours(x, weights):
        return jnp.sin(run(tl.LayerNorm() if centred else tl.RMSNorm(), x, weights=weights)).sum()

    args = values(1, 6, 8) + 2, {'scale': values(8, seed=1), 'bias': values(8, seed=2)}
    for derivative in (
        lambda f: jax.grad(f, (0, 1))(*args),
        lambda f: jax.jvp(f, args, args),
        lambda f: jax.jacrev(jax.grad(f))(*args),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            derivative(ours),
            derivative(plain),
        )
    _, pull = jax.vjp(lambda x: ours(x, args[1]), args[0])
    assert sum(x.size for x in jax.tree.leaves(pull)) <= 2 * args[0].size + 2 * 8 + 1


@pytest.mark.parametrize('layer', [tl.LayerNorm(), tl.RMSNorm(), tl.BatchNorm()])
def test_norms_compute_in_float32(layer):
    x = (1000 + values(4, 64)).astype(jnp.bfloat16)
    weights, state = init(layer, x)
    wide = run(layer, x.astype(np.float32), weights=weights, state=state, mode=Mode.TRAIN)[0]
    y = run(layer, x, weights=weights, state=state, mode=Mode.TRAIN)[0]
    assert y.dtype == jnp.bfloat16
    assert (y == wide.astype(jnp.bfloat16)).all()
    with pytest.raises(
        TypeError, match=r'takes floating-point .* got int32\[2,3\]: embed integers'
    ):
        layer.output_signature(shape_dtype((2, 3), 'int32'))


def test_batch_norm():
    layer, x = tl.BatchNorm(momentum=0.9), 3 * values(2, 5, 8) + 2
    weights, state = init(layer, x)
    flat = x.reshape(-1, 8)
    y, state = run(layer, x, weights=weights, state=state, mode=Mode.TRAIN)
    assert_close(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5))
    assert_close(state['mean'], 0.1 * flat.mean(0))
    assert_close(state['var'], 0.9 + 0.1 * flat.var(0))
    y, same = run(layer, x, weights=weights, state=state)
    assert_close(y, (x - state['mean']) / np.sqrt(state['var'] + 1e-5))
    assert same == state


# Convolutions and pools.


def slow_conv(x, kernel, stride, dilation, groups, pads):
    """One output at a time, over any number of axes between the first and the last."""
    n, kernel_size = x.ndim - 2, kernel.shape[:-2]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    reach = [dilation[i] * (kernel_size[i] - 1) for i in range(n)]
    out = [(x.shape[i + 1] - reach[i] - 1) // stride[i] + 1 for i in range(n)]
    per, units = x.shape[-1] // groups, kernel.shape[-1]
    y = np.zeros((x.shape[0], *out, units), np.float32)
    for at in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, kernel_size)):
            where = tuple(stride[i] * at[i] + dilation[i] * tap[i] for i in range(n))
            for u in range(units):
                g = u // (units // groups)
                seen = x[(slice(None), *where, slice(g * per, (g + 1) * per))]
                y[(slice(None), *at, u)] += seen @ kernel[(*tap, slice(None), u)]
    return y


def same_pads(length, width, stride, dilation=1):
    reach = dilation * (width - 1)
    total = max((math.ceil(length / stride) - 1) * stride + reach + 1 - length, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize(
    ('padding', 'stride', 'dilation', 'groups', 'width'),
    [
        ('same', 1, 1, 1, 3),
        ('same', 2, 1, 2, 4),
        ('valid', 1, 2, 1, 3),
        ('causal', 1, 2, 2, 3),
        ('causal', 2, 1, 4, 2),
        ('causal', 1, 1, 1, 1),
    ],
)
def test_conv1d(padding, stride, dilation, groups, width):
    layer = tl.Conv1D(4, width, stride, padding, dilation, groups)
    x = values(2, 9, 4)
    weights, _ = init(layer, x)
    weights['bias'] = jnp.arange(4.0)
    pads = {
        'same': same_pads(9, width, stride, dilation),
        'valid': (0, 0),
        'causal': (dilation * (width - 1), 0),
    }[padding]
    kernel = np.asarray(weights['kernel'])
    wanted = slow_conv(x, kernel, (stride,), (dilation,), groups, [pads]) + np.arange(4)
    assert_close(run(layer, x, weights=weights), wanted)


def test_conv1d_says_what_it_takes():
    with pytest.raises(ValueError, match="padding is 'same', 'valid' or 'causal', got 'full'"):
        tl.Conv1D(4, padding='full')
    with pytest.raises(
        ValueError, match=r'Conv1D takes \(batch, length, channels\), got .*\(2, 3\)'
    ):
        init(tl.Conv1D(4), values(2, 3))
    with pytest.raises(ValueError, match='groups=3 must divide the 4 input channels and n_units=6'):
        init(tl.Conv1D(6, groups=3), values(1, 5, 4))
    with pytest.raises(ValueError, match=r"only with padding='causal' and stride=1, this one has"):
        init(tl.Conv1D(4), values(1, 5, 4), mode=Mode.PREDICT)


def test_conv1d_decodes_rows_that_stand_at_positions_of_their_own():
    layer, x = tl.Conv1D(3, 3, padding='causal', dilation=2), values(2, 8, 4)
    weights, state = init(layer, x, mode=Mode.PREDICT)
    prompt = x[:, :5].copy()
    prompt[0, 2:] = 99.0  # padding
    _, state = run(layer, prompt, weights=weights, state=state, mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([2, 5]))
    wanted = np.asarray(run(layer, x, weights=weights))
    for now in (np.array([2, 5]), np.array([3, 6])):
        piece = x[np.arange(2), now][:, None]
        y, state = run(layer, piece, weights=weights, state=state, mode=Mode.PREDICT)
        assert_close(y[:, 0], wanted[np.arange(2), now])


@pytest.mark.parametrize(
    ('padding', 'strides', 'groups'), [('same', (2, 1), 1), ('valid', (1, 2), 2)]
)
def test_conv2d(padding, strides, groups):
    layer = tl.Conv2D(4, (3, 2), strides, padding, groups)
    x = values(2, 5, 6, 2)
    weights, _ = init(layer, x)
    pads = [(0, 0), (0, 0)]
    if padding == 'same':
        pads = [same_pads(5, 3, strides[0]), same_pads(6, 2, strides[1])]
    wanted = slow_conv(x, np.asarray(weights['kernel']), strides, (1, 1), groups, pads)
    assert_close(run(layer, x, weights=weights), wanted)


def test_pools():
    x = values(2, 5, 4, 3)
    blocks = x[:, :4].reshape(2, 2, 2, 2, 2, 3)
    assert_close(run(tl.MaxPool(), x), blocks.max((2, 4)))
    assert_close(run(tl.AvgPool(), x), blocks.mean((2, 4)))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=np.nan)
    wide = padded.reshape(2, 3, 2, 2, 2, 3)
    assert_close(run(tl.AvgPool(padding='same'), x), np.nanmean(wide, (2, 4)))
    assert_close(run(tl.MaxPool(padding='same'), x), np.nanmax(wide, (2, 4)))
    assert run(tl.MaxPool((3, 3), (1, 1)), x).shape == (2, 3, 2, 3)


@pytest.mark.parametrize('layer', [tl.MaxPool(), tl.AvgPool()])
def test_pools_have_gradients_inside_jit(layer):
    x = values(1, 4, 4, 1)
    grads = jax.jit(jax.grad(lambda x: run(layer, x).sum()))(x)
    if isinstance(layer, tl.AvgPool):
        assert_close(grads, 0.25)
    else:
        blocks = x[0, :, :, 0].reshape(2, 2, 2, 2)
        largest = (blocks == blocks.max((1, 3), keepdims=True)).reshape(1, 4, 4, 1)
        assert_close(grads, largest)


@pytest.mark.parametrize('layer', [tl.Conv2D, tl.MaxPool, tl.AvgPool])
def test_images_say_what_they_are(layer):
    with pytest.raises(ValueError, match=r"padding is 'same' or 'valid', got 'causal'"):
        layer(4, padding='causal') if layer is tl.Conv2D else layer(padding='causal')
    made = layer(4) if layer is tl.Conv2D else layer()
    with pytest.raises(
        ValueError, match=r'takes \(batch, height, width, channels\), got the shape'
    ):
        init(made, values(2, 3, 4))


# Mean and Flatten.


def test_mean():
    x = values(3, 5, 4)
    assert_close(run(tl.Mean(), x), x.mean(1))
    assert_close(run(tl.Mean(axis=-1), x), x.mean(-1))
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    got = run(tl.Mean(masked=True), x, mask)
    assert_close(got[0], x[0, :2].mean(0))
    assert_close(got[1], x[1].mean(0))
    assert (got[2] == 0).all()
    with pytest.raises(ValueError, match=r'a mask \(B, L\) runs along axis 1, got axis=2'):
        tl.Mean(axis=2, masked=True)


def test_flatten():
    x = values(2, 3, 4, 5)
    assert (run(tl.Flatten(), x) == x.reshape(2, 60)).all()
    assert (run(tl.Flatten(2), x) == x.reshape(2, 3, 20)).all()
    with pytest.raises(ValueError, match=r'no axis 1 to join .* shape \(2,\): give x\[..., None\]'):
        run(tl.Flatten(), values(2))


def test_concatenate_and_split():
    a, b = values(2, 4), values(2, 2, seed=1)
    assert (run(tl.Concatenate(), a, b) == np.concatenate([a, b], -1)).all()
    top, below = run(tl.Split(), a)
    assert (top == a[:, :2]).all() and (below == a[:, 2:]).all()
    with pytest.raises(ValueError, match='Split: 3 does not divide the length 4 of axis -1'):
        init(tl.Serial(tl.Split(3)), a)


# Positions.


def test_sinusoidal_positions():
    x = np.zeros((2, 7, 6), np.float32)
    wanted = np.zeros((7, 6))
    for t in range(7):
        for i in range(3):
            angle = t * 10000.0 ** (-2 * i / 6)
            wanted[t, i], wanted[t, 3 + i] = math.sin(angle), math.cos(angle)
    assert_close(run(tl.SinusoidalPositions(), x), np.broadcast_to(wanted, x.shape))
    with pytest.raises(ValueError, match='works on pairs of features, got 5: use an even number'):
        init(tl.SinusoidalPositions(), values(1, 2, 5))


def test_learned_positions():
    layer, x = tl.LearnedPositions(6), values(2, 4, 3)
    weights, _ = init(layer, x)
    assert weights['table'].shape == (6, 3)
    assert_close(run(layer, x, weights=weights), x + weights['table'][:4])
    wanted = 'the sequence is 7 long and max_len=6: shorten it, or make the model with a larger'
    with pytest.raises(ValueError, match=wanted):
        run(layer, values(2, 7, 3), weights=weights)
    with pytest.raises(ValueError, match=wanted):
        init(layer, values(2, 7, 3))
    state = {'position': tl.Position(jnp.array([1, 3], jnp.int32))}
    y, state = run(layer, x[:, :2], weights=weights, state=state, mode=Mode.PREDICT)
    assert_close(y, x[:, :2] + np.stack([weights['table'][1:3], weights['table'][3:5]]))
    assert state['position'].rows.tolist() == [3, 5]


@pytest.mark.parametrize(
    'layer',
    [
        tl.SinusoidalPositions(max_len=4),
        tl.LearnedPositions(4),
        tl.Serial(tl.Dup(), tl.RotaryPositions(max_len=4), tl.Drop()),
    ],
)
def test_positions_stop_at_max_len(layer):
    x = values(2, 1, 2, 4) if isinstance(layer, tl.Serial) else values(2, 2, 4)
    weights, state = init(layer, x, mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([1, 3]))
    with pytest.raises(
        ValueError, match='Positions: the sequence is 5 long and max_len=4: shorten'
    ):
        layer.apply(weights, state, (x,), mode=Mode.PREDICT)
    (y,), _ = jax.jit(functools.partial(layer.apply, mode=Mode.PREDICT))(weights, state, (x,))
    gone = np.isnan(y).any(-1).reshape(2, 2)
    assert gone.tolist() == [[False, False], [False, True]]


def test_rotary_products_depend_on_the_distance_alone():
    q, k = values(8), values(8, seed=1)
    many = np.broadcast_to(q, (1, 1, 9, 8)), np.broadcast_to(k, (1, 1, 9, 8))
    rotated_q, rotated_k = run(tl.RotaryPositions(), *many)
    products = np.asarray(rotated_q[0, 0] @ rotated_k[0, 0].T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        assert_close(diagonal, diagonal[0], 1e-4)
    assert abs(products[0, 0] - products[0, 5]) > 0.1
    assert_close(products[0, 0], q @ k)


def test_rotary_rotates_pairs():
    q = values(1, 1, 3, 4)
    got, _ = run(tl.RotaryPositions(), q, q)
    for t in range(3):
        for i in range(2):
            angle = t * 10000.0 ** (-2 * i / 4)
            a, b = q[0, 0, t, i], q[0, 0, t, i + 2]
            assert_close(got[0, 0, t, i], a * math.cos(angle) - b * math.sin(angle))
            assert_close(got[0, 0, t, i + 2], b * math.cos(angle) + a * math.sin(angle))


@pytest.mark.parametrize('layer', [tl.SinusoidalPositions(), tl.LearnedPositions(8)])
def test_positions_are_not_added_to_integers(layer):
    with pytest.raises(TypeError, match=r'takes floating-point vectors .* embed integers first'):
        layer.output_signature(shape_dtype((2, 4), 'int32'))


# Activations.

erf = np.vectorize(math.erf)
FORMULAS = {
    'relu': lambda x: np.maximum(x, 0),
    'relu2': lambda x: np.maximum(x, 0) ** 2,
    'gelu': lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    'exact_gelu': lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    'silu': lambda x: x / (1 + np.exp(-x)),
    'tanh': np.tanh,
    'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
    'hard_sigmoid': lambda x: np.clip(x + 3, 0, 6) / 6,
    'elu': lambda x: np.where(x > 0, x, np.exp(x) - 1),
    'leaky_relu': lambda x: np.where(x > 0, x, 0.01 * x),
    'softplus': lambda x: np.log1p(np.exp(x)),
    'softmax': lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    'log_softmax': lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True)),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_activations_by_name(name):
    x = 2 * values(3, 5)
    assert_close(run(tl.activation(name), x), FORMULAS[name](x))


@pytest.mark.parametrize('name', ['gelu', 'exact_gelu', 'silu'])
def test_the_gradient_of_an_activation_keeps_one_array(name):
    x, ct = (jnp.asarray(values(3, 5, seed=i)) for i in range(2))
    _y, pull = jax.vjp(lambda x: run(tl.activation(name), x), x)
    assert [x.shape for x in jax.tree.leaves(pull)] == [(3, 5)]
    step = 1e-3
    up, down = (FORMULAS[name](np.asarray(x, np.float64) + d) for d in (step, -step))
    np.testing.assert_allclose(pull(ct)[0], ct * (up - down) / (2 * step), rtol=1e-4, atol=1e-5)


def test_every_activation_has_a_name():
    layers = {tl.activation(name) for name in FORMULAS}
    assert {type(layer) for layer in layers} == set(tl.Activation.__subclasses__())
    assert tl.activation(tl.Relu(name='a')) == tl.Relu(name='a')
    with pytest.raises(ValueError, match="no activation 'gleu': there are elu, exact_gelu, gelu, "):
        tl.activation('gleu')


@pytest.mark.parametrize('layer', [tl.Softmax(), tl.LogSoftmax()])
def test_softmax_computes_in_float32(layer):
    x = (4 * values(2, 100)).astype(jnp.bfloat16)
    y = run(layer, x)
    assert (y == run(layer, x.astype(np.float32)).astype(jnp.bfloat16)).all()


# Fields.


@pytest.mark.parametrize(
    ('make', 'error', 'text'),
    [
        (lambda: tl.Dense('abc'), TypeError, "Dense: n_units must be an int or None, got 'abc'"),
        (lambda: tl.Dense(2.0), TypeError, 'Dense: n_units must be an int or None, got 2.0'),
        (lambda: tl.Dense(True), TypeError, 'Dense: n_units must be an int or None, got True'),
        (lambda: tl.Dense(0), ValueError, 'Dense: n_units must be at least 1, got 0'),
        (lambda: tl.Dense(2, 1), TypeError, 'Dense: use_bias must be a bool, got 1'),
        (
            lambda: tl.Dense(2, kernel_init=tl.Normal),
            TypeError,
            'Dense: kernel_init must be an Initializer, got .*a class: call it, Normal',
        ),
        (lambda: tl.Dropout(1.5), ValueError, 'rate must be at least 0 and below 1, got 1.5'),
        (lambda: tl.Dropout('0.1'), TypeError, "Dropout: rate must be a number, got '0.1'"),
        (lambda: tl.Embedding(0, 4), ValueError, 'vocab_size must be at least 1, got 0'),
        (lambda: tl.Repeat(tl.Dense, 2), TypeError, r'Repeat: layer must be a Layer, .* call it'),
        (lambda: tl.Conv2D(4, (3, 3, 3)), TypeError, 'Conv2D: kernel_size must be a tuple'),
        (lambda: tl.Conv2D(4, (0, 3)), ValueError, r'kernel_size must be at least 1, got \(0, 3'),
        (lambda: tl.MaxPool(strides=(0, 1)), ValueError, r'strides must be at least 1, got \(0, 1'),
        (lambda: tl.LayerNorm(-1.0), ValueError, 'LayerNorm: epsilon must be at least 0, got -1.0'),
        (lambda: tl.RMSNorm(-1e-6), ValueError, 'RMSNorm: epsilon must be at least 0, got -1e-06'),
        (lambda: tl.BatchNorm(1.5), ValueError, 'momentum must be at least 0 and below 1, got 1.5'),
        (lambda: tl.RotaryPositions(-1.0), ValueError, 'period must be at least 1, got -1.0'),
        (lambda: tl.SinusoidalPositions(0.0), ValueError, 'period must be at least 1, got 0.0'),
        (lambda: tl.Dropout(0.1, (1.5,)), TypeError, 'shared_axes must be a tuple of int, got'),
        (lambda: tl.LayerNorm(jnp.ones(())), TypeError, 'LayerNorm: epsilon must be a number'),
        (lambda: tl.Relu(name=3), TypeError, 'Relu: name must be a str or None, got 3'),
        (lambda: tl.LocalAttention(4, -1), ValueError, 'must not be negative, and causal'),
        (lambda: tl.VarianceScaling(fan='both'), ValueError, "fan is 'in', 'out' or 'avg', got"),
        (lambda: tl.VarianceScaling(distribution='x'), ValueError, "or 'uniform', got 'x'"),
    ],
)
def test_wrong_fields_are_told_what_they_should_be(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_lists_become_tuples_and_arrays_are_refused():
    class Shaped(Layer):
        shape: tuple[int, ...]
        table: object = None

    assert Shaped([1, 2]) == Shaped((1, 2))
    assert tl.Select([1, 0]).indices == (1, 0)
    with pytest.raises(
        TypeError, match=r'Shaped: table holds .* not hashable.* arrays belong in its'
    ):
        Shaped((1,), jnp.ones(2))
    with pytest.raises(TypeError, match='Shaped: table holds dict, which is not hashable'):
        Shaped((1,), {})


def test_numpy_numbers_are_numbers():
    assert repr(tl.Dense(np.int64(4))) == 'Dense(4)' and tl.Dense(np.int64(4)) == tl.Dense(4)
    assert tl.Dropout(np.float32(0.5)) == tl.Dropout(0.5)
    assert tl.Dropout(0).rate == 0


# Initializers.


def test_initializers_have_the_variance_they_say():
    shape, key = (400, 100), jax.random.key(0)
    variance = {
        tl.Normal(0.3): 0.09,
        tl.Uniform(0.3): 0.03,
        tl.glorot_uniform(): 2 / 500,
        tl.he_normal(): 2 / 400,
        tl.lecun_normal(): 1 / 400,
        tl.Constant(2.0): 0.0,
    }
    for initializer, wanted in variance.items():
        made = np.asarray(initializer(jax.random.clone(key), shape))
        assert abs(made.var() - wanted) <= 0.05 * wanted
    assert (tl.ones()(key, (3,)) == 1).all() and (tl.zeros()(key, (3,)) == 0).all()


def test_orthogonal_is_orthogonal():
    made = np.asarray(tl.Orthogonal(2.0)(jax.random.key(0), (3, 5)))
    assert_close(made @ made.T, 4 * np.eye(3), 1e-4)
