"""`BidirectionalRepeat`: streams restored to the bit, the equation's gradient, nothing kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, transforms
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.bidirectional import Run
from layercomb.layers.reversible.cotangents import Wanted
from layercomb.layers.reversible.fixed_point import Grid, fits, pack, unpack
from layercomb.layers.reversible.passing import passes_on
from layercomb.layers.state.decisions import take_decisions

B, L, D = 3, 6, 8


def key():
    return jax.random.key(3)  # a new one each time, for no key may be used twice


class Balance(Layer):
    """A layer whose auxiliary loss is the mean square of its input."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'aux_loss': tl.AuxLoss(jnp.zeros(()))}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return inputs, {'aux_loss': tl.AuxLoss((x * x).mean())}


class Choose(Layer):
    """Triples each position's greatest feature, a decision."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        found, state = tl.decide(mode, state, 'at', lambda: jnp.argmax(x, -1).astype(jnp.uint8))
        at = found.astype(jnp.int32)[..., None]
        return (jnp.where(jnp.arange(x.shape[-1]) == at, 3 * x, x),), state


def block(dropout=0.0):
    """Attention head by head and a feed-forward: both are computed otherwise for a gradient."""
    drop = tl.Dropout(dropout) if dropout else None
    return tl.Serial(
        tl.Residual(tl.RMSNorm(), tl.SelfAttention(2, qkv_bias=False), drop, name='attention'),
        tl.Residual(tl.LayerNorm(), tl.GatedDense(2 * D), drop, tl.Dense(D), name='feed_forward'),
        name='block',
    )


def masked_block():
    """A block with a mask, and biases of attention that all blocks share, as context."""
    attention = tl.SelfAttention(2, causal=False, masked=True, relative=True, qkv_bias=False)
    return tl.Serial(
        tl.Select((0, 1, 2, 1, 2)),
        tl.Residual(tl.RMSNorm(), attention, tl.Dropout(0.1), name='mixing'),
        tl.Residual(tl.LayerNorm(), tl.Dense(), name='feeding'),
        name='block',
    )


def deciding_block():
    """A block that decides, draws, and keeps state."""
    return tl.Serial(
        tl.Residual(Balance(), tl.BatchNorm(), Choose(), name='feed_forward'),
        tl.Residual(tl.Chunk(tl.Serial(tl.Dense(), tl.Dropout(0.2)), 4), name='pieces'),
        name='block',
    )


def stream(scale=1.0):
    return scale * jax.random.normal(jax.random.key(0), (B, L, D))


def given(net, *values):
    signature = lc.signature_of(values)
    return jax.jit(lambda: net.init(signature, jax.random.key(1)))()


def trained(net, weights, state, x):
    apply = jax.jit(lambda w, s, x: net.apply(w, s, (x,), rng=key(), mode=Mode.TRAIN)[0][0])
    return apply(weights, state, x)


def plain_block():
    return tl.Residual(tl.RMSNorm(), tl.Dense(), tl.Tanh(), name='block')


def restored(net, weights, state, x):
    """The grid's integers of x, and the streams restored from the last ones."""
    run = Run(net, Mode.RECORD, weights, state, (), key())
    streams, _, side = run.forward(x)
    flags = tuple(True for _ in jax.tree.leaves(weights))
    ct = jnp.cos(net.grid.floats(streams.now))
    back, d_x, _, _ = run.backward(streams, side, ct, None, (Wanted(flags), Wanted(())))
    return net.grid.of(x), back, d_x, streams.fit


@pytest.mark.parametrize('m', range(1, 6))
def test_the_first_stream_is_restored_to_the_bit(m):
    net = tl.BidirectionalRepeat(block(0.1) if m == 4 else plain_block(), 12, m=m, chunk_len=4)
    x = stream().at[0, 0, :2].set(jnp.array([21000.0, -20500.25]))  # as in pretrained models
    weights, state = given(net, x)
    first, back, d_x, fit = jax.jit(lambda w: restored(net, w, state, x))(weights)
    assert (back.now == first).all() and (back.step == 0).all() and fit.all()
    assert jnp.isfinite(d_x).all()


def test_a_stream_not_restored_makes_its_gradient_nan():
    net = tl.BidirectionalRepeat(plain_block(), 4)
    weights, state = given(net, stream())

    @jax.jit
    def run(weights, x):
        run = Run(net, Mode.RECORD, weights, state, (), key())
        streams, _, side = run.forward(x)
        streams = streams._replace(now=streams.now.at[1, 0, 0].add(1))
        flags = tuple(True for _ in jax.tree.leaves(weights))
        return run.backward(streams, side, x, None, (Wanted(flags), Wanted(())))[1]

    assert jnp.isnan(run(weights, stream())).all((1, 2)).tolist() == [False, True, False]


def by_the_equation(net, weights, state, inputs, rng):
    """The blocks one after the other in floats, without a grid; and their auxiliary losses."""
    before, (x, *context), aux = inputs[0], inputs, jnp.float32(0)
    gammas = net.signs(rng, len(x)).astype(jnp.float32) * 2.0**-net.m
    for i in range(net.n):
        (y, *_), new = net.layer.apply(
            net.block_weights(weights, i),
            net.block_state(state, i),
            (x, *context),
            rng=jax.random.fold_in(rng, i),
            mode=Mode.TRAIN,
        )
        gamma = gammas[i].reshape(-1, 1, 1)
        before, x = x, gamma * before + (1 - gamma) * x + (1 + gamma) * (y - x)
        aux += aux_loss(new)
    return x, aux


def aux_loss(state):
    leaves = lc.trees.flatten(state).items()
    return sum((x.sum() for path, x in leaves if 'aux_loss' in path), jnp.float32(0))


def differences(net, *inputs):
    """Loss and gradients, and those of the equation."""
    weights, state = given(net, *inputs)
    floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(weights, values, by_hand):
        values = [values.get(i, x) for i, x in enumerate(inputs)]
        if by_hand:
            y, aux = by_the_equation(net, weights, state, values, key())
        else:
            (y, *_), new = net.apply(weights, state, tuple(values), rng=key(), mode=Mode.TRAIN)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            aux = aux_loss(new)
        return (y * jnp.cos(y)).sum() + 3 * aux

    grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    values = {i: inputs[i] for i in floats}
    return grad(weights, values, False), grad(weights, values, True)


def assert_close(ours, plain, tolerance=2e-3):
    def compare(a, b):
        scale = float(jnp.abs(b).max()) + 1e-6
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)

    jax.tree.map(compare, ours, plain)


MASK = jnp.ones((B, L), bool).at[1, 4:].set(False)
CASES = {
    'attention, dropout, context that all blocks share': (
        tl.BidirectionalRepeat(masked_block(), 2, m=2),
        stream(),
        jax.random.normal(jax.random.key(5), (7, 2)),
        MASK,
    ),
    'decisions, state, auxiliary losses': (tl.BidirectionalRepeat(deciding_block(), 2), stream()),
}


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_the_equation(case):
    assert_close(*differences(*CASES[case]))


def test_with_a_fine_grid_the_gradient_is_the_equations_to_five_digits():
    net = tl.BidirectionalRepeat(plain_block(), 3, shared=True, m=1, fraction=24, chunk_len=4)
    assert_close(*differences(net, stream()), tolerance=1e-5)


def test_with_a_small_gamma_training_is_plain():
    net = tl.BidirectionalRepeat(plain_block(), 4, m=8, fraction=24)
    weights, state = given(net, stream())
    y, plain = (trained(each, weights, state, stream()) for each in (net, net.plain))
    assert 0 < jnp.abs(y - plain).max() < 2**-7 * jnp.abs(plain).max()


def test_gamma_differs_between_samples_and_blocks():
    signs = tl.BidirectionalRepeat(block(), 9).signs(key(), 5)
    assert (signs[0] == 0).all() and set(np.unique(signs[1:]).tolist()) == {-1, 1}
    assert len(np.unique(signs, axis=0)) > 4 and len(np.unique(signs, axis=1).T) > 2


def test_a_value_beyond_the_grid_makes_its_sample_nan():
    net = tl.BidirectionalRepeat(tl.Residual(tl.Fn('Twice', twice)), 12, fraction=16)
    strange = [stream().at[1, 2, 3].set(x) for x in (33000.0, -40000.0, jnp.nan, jnp.inf)]
    grown = jnp.ones((1, B, L, D)).at[0, 1].set(64.0)  # it doubles in each block
    apply = jax.jit(lambda x: net.apply({}, {}, (x,), rng=key(), mode=Mode.TRAIN)[0][0])
    for x in (*strange, *grown):
        assert jnp.isnan(apply(x)).all((1, 2)).tolist() == [False, True, False]
    assert jnp.isfinite(trained(net.replace(fraction=12), {}, {}, grown[0])).all()


@pytest.mark.parametrize('added', [jnp.nan, jnp.inf, 40000.0])
def test_what_a_block_adds_beyond_the_grid_makes_its_sample_nan(added):
    def strange(x):
        return jnp.where(x == -9000, added, 0.0)  # the sum of both is on the grid

    net = tl.BidirectionalRepeat(tl.Residual(tl.Fn('Strange', strange)), 1, fraction=16)
    x = stream().at[1, 2, 3].set(-9000)
    y = net.apply({}, {}, (x,), rng=key(), mode=Mode.TRAIN)[0][0]
    assert jnp.isnan(y).all((1, 2)).tolist() == [False, True, False]


def test_streams_of_pretrained_models_have_room_to_grow():
    net = tl.BidirectionalRepeat(plain_block(), 2)
    x = stream().at[0, 0, :2].set(jnp.array([100_000.0, -100_000.0]))  # 20,000 before training
    weights, state = given(net, x)
    assert jnp.isfinite(trained(net, weights, state, x)).all()


def twice(x):
    return jnp.tanh(x) * 0.5 + x * 0.99


def test_streams_keep_their_dtype():
    net = tl.BidirectionalRepeat(transforms.cast(plain_block()), 2)
    x = stream().astype(jnp.bfloat16)
    weights, state = given(net, x)
    assert trained(net, weights, state, x).dtype == x.dtype


def test_it_stands_inside_a_reversible_stack():
    inner = tl.BidirectionalRepeat(tl.Residual(tl.Dropout(0.1), Choose(), tl.Dense()), 2)
    net = tl.ReversibleSerial(tl.ReversibleHalfResidual(inner))
    weights, state = given(net, stream(), stream())

    def loss(weights, x, mode):
        out, new = net.apply(weights, state, (x, stream()), rng=key(), mode=mode)
        return (out[0] * jnp.cos(out[1])).sum(), take_decisions(new)[0]

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    assert_close(
        grad(weights, stream(), Mode.TRAIN), grad(weights, stream(), Mode.RECORD), tolerance=1e-4
    )


def memory(net, trainable=lambda path: True, batch=4, length=64, width=64):
    """Bytes of temporaries of the gradient, and of what it is asked of."""
    signature = lc.shape_dtype((batch, length, width))
    its_key = jax.eval_shape(jax.random.key, 0)
    weights, state = jax.eval_shape(lambda key: net.init((signature,), key), its_key)
    kept, frozen = lc.trees.partition(weights, trainable)

    def loss(kept, frozen, x, key):
        weights = lc.trees.merge(kept, frozen)
        (y,), _ = net.apply(weights, state, (x,), rng=key, mode=Mode.TRAIN)
        return (y * y).sum()

    compiled = jax.jit(jax.grad(loss)).lower(kept, frozen, signature, its_key).compile()
    return compiled.memory_analysis().temp_size_in_bytes, lc.trees.n_bytes(kept)


def wide():
    return tl.Residual(tl.RMSNorm(), tl.Dense(64), tl.Gelu(), tl.Dense(64), name='block')


def test_memory_grows_with_depth_by_the_bits_alone():
    values = 4 * 64 * 64
    (few, _), (many, _) = (memory(tl.BidirectionalRepeat(wide(), n)) for n in (6, 24))
    bits = (24 - 6) * (values // 2 + 4 * 4)
    assert many - few < 1.1 * bits
    assert many < 0.6 * memory(tl.Repeat(tl.Remat(wide()), 24))[0]


def two_streams():
    half = tl.ReversibleHalfResidual(*wide().layers)
    block = tl.ReversibleSerial(half, tl.ReversibleSwap())
    return tl.Serial(tl.Dup(), tl.ReversibleRepeat(block, 24), tl.Add())


@pytest.mark.parametrize('make', [lambda: tl.BidirectionalRepeat(wide(), 24), two_streams])
def test_frozen_weights_have_no_gradients(make):
    """Those of matrices, 0.8 MB, would stand in the temporaries."""
    temporaries, _ = memory(make(), lambda path: path.endswith('scale'), batch=1, length=8)
    assert temporaries < 24 * 64 * 64 * 4


def test_blocks_that_change_their_context_are_refused():
    masked = tl.Serial(tl.Select((0, 1, 1)), tl.Residual(tl.SelfAttention(2, masked=True)))
    assert passes_on(masked) and passes_on(tl.Remat(masked)) and passes_on(tl.Repeat(masked, 2))
    for wrong in (tl.Swap(), tl.Parallel(tl.Dense(), tl.Dense()), tl.Repeat(tl.Swap(), 2)):
        with pytest.raises(TypeError, match='of which the first alone may change'):
            tl.BidirectionalRepeat(wrong, 2)


def test_errors():
    net = tl.BidirectionalRepeat(tl.Relu(), 2)
    with pytest.raises(ValueError, match='draws γ in training: pass rng='):
        net.apply({}, {}, (stream(),), mode=Mode.TRAIN)
    with pytest.raises(ValueError, match='m must be at least 1 and at most 8, got 9'):
        tl.BidirectionalRepeat(tl.Relu(), 2, m=9)
    with pytest.raises(ValueError, match='fraction must be at least 0 and at most 30, got 31'):
        tl.BidirectionalRepeat(tl.Relu(), 2, fraction=31)


@pytest.mark.parametrize('m', range(1, 9))
def test_bits_are_packed_and_unpacked(m):
    k = jax.random.randint(key(), (3, 5, 7), -(2**31), 2**31 - 1, jnp.int32)
    packed = pack(k, m)
    assert packed.dtype == jnp.uint8 and packed.shape[1] <= -(-35 * m // 8) + 3
    assert (unpack(packed, m, k.shape) == k & (2**m - 1)).all()


def test_a_grid_rounds_to_the_nearest_and_never_beyond_its_ends():
    x = jnp.array([0.3, -0.3, 1e9, -1e9, jnp.nan, 32767.5])
    k = Grid(1).of(x)
    assert k[:2].tolist() == [1, -1] and k[4] == 0 and k[5] == 65535
    assert (jnp.abs(k) <= 2**31 - 1).all()
    assert fits(Grid(1).scaled(jnp.array([[1.0], [2.0**31], [jnp.nan]]))).tolist() == [
        True, False, False,
    ]  # fmt: skip
