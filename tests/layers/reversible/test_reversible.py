"""Reversible layers: the gradient of plain autodiff, nothing kept, every mode, and errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import take_decisions

B, L, D = 2, 12, 8


class Balance(Layer):
    """A layer whose auxiliary loss is the mean square of its input."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'aux_loss': tl.AuxLoss(jnp.zeros(()))}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return inputs, {'aux_loss': tl.AuxLoss((x * x).mean())}


def half(*layers):
    return tl.ReversibleHalfResidual(*layers)


def block(masked=False):
    """Attention and a feed-forward, with all that draws, decides and keeps state."""
    attention = tl.LSHSelfAttention(2, chunk_len=4, n_buckets=4, masked=masked, dropout=0.1)
    feed_forward = tl.Serial(tl.Dense(2 * D), tl.Gelu(), tl.Dropout(0.2), tl.Dense(D))
    return tl.ReversibleSerial(
        half(tl.LayerNorm(), attention, tl.Dropout(0.1)),
        tl.ReversibleSwap(),
        half(tl.BatchNorm(), tl.Chunk(feed_forward, 5)),
        tl.ReversibleSelect((1, 0)),
    )


def inputs(masked=False):
    x = jax.random.normal(jax.random.key(0), (2, B, L, D))
    mask = jnp.ones((B, L), bool).at[1, 7:].set(False)
    return (x[0], x[1], mask) if masked else (x[0], x[1])


def gradients(net, values, dtype=jnp.float32):
    """Loss, state and gradients in TRAIN (reversible) and in RECORD (plain autodiff)."""
    weights, state = net.init(lc.signature_of(values), jax.random.key(1))

    def loss(weights, streams, mode):
        out, new = net.apply(
            weights, state, (*streams, *values[2:]), rng=jax.random.key(3), mode=mode
        )
        new = take_decisions(new)[0]
        aux = sum(x.sum() for path, x in lc.trees.flatten(new).items() if 'aux_loss' in path)
        return (out[0] * jnp.cos(out[1])).sum() + 3 * jnp.float32(aux), new

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    return [grad(weights, values[:2], mode) for mode in (Mode.TRAIN, Mode.RECORD)]


def assert_close(ours, plain, rtol=1e-4):
    def compare(a, b):
        assert a.dtype == b.dtype
        scale = float(jnp.abs(b).max()) + 1e-6
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)

    jax.tree.map(compare, ours, plain)


@pytest.mark.slow
def test_the_gradient_at_depth_12_is_that_of_plain_autodiff():
    ours, plain = gradients(tl.ReversibleRepeat(block(masked=True), 12), inputs(masked=True))
    assert_close(ours, plain)


NETS = {
    'serial': lambda: tl.ReversibleSerial(block(), tl.ReversibleSwap()),
    'nested': lambda: tl.ReversibleRepeat(
        tl.ReversibleRepeat(half(tl.Dense(D), tl.Dropout(0.1)), 2), 2
    ),
    'shared': lambda: tl.ReversibleRepeat(half(tl.BatchNorm(), tl.Dense(D)), 3, shared=True),
    'cast': lambda: lc.cast(tl.ReversibleRepeat(half(tl.Dense(D), tl.Dropout(0.1)), 3)),
    'aux_loss': lambda: tl.ReversibleRepeat(
        tl.ReversibleSerial(half(tl.Dense(D), Balance()), tl.ReversibleSwap()), 3
    ),
    'aux_loss in pieces': lambda: tl.ReversibleRepeat(
        half(tl.Chunk(tl.Serial(tl.Dense(D), Balance(), tl.Dense(D)), 5)), 2
    ),
    'aux_loss before the last': lambda: tl.ReversibleSerial(half(Balance(), tl.Dense(D))),
    'inside a half': lambda: tl.ReversibleRepeat(
        half(
            tl.Dup(),
            tl.ReversibleSerial(half(tl.Dense(D), tl.Dropout(0.1)), tl.ReversibleSwap()),
            tl.Add(),
        ),
        2,
    ),
    'rearranged': lambda: tl.ReversibleSerial(
        half(tl.Dense(D)), tl.ReversibleConcatenatePair(), tl.ReversibleSwap(), half(tl.Dense(16))
    ),
    'shared, computed again': lambda: tl.ReversibleRepeat(
        half(tl.Remat(tl.Residual(tl.Dense(D)))), 2, shared=True
    ),
}


@pytest.mark.parametrize('name', NETS)
def test_the_gradient_is_that_of_plain_autodiff(name):
    ours, plain = gradients(NETS[name](), inputs())
    assert_close(ours, plain, rtol=2e-2 if name == 'cast' else 1e-4)


def test_context_gets_its_gradient_from_every_block():
    cross = half(tl.CrossAttention(2))
    net = tl.ReversibleRepeat(tl.ReversibleSerial(cross, tl.ReversibleSwap()), 3)
    x, y = inputs()
    memory = jax.random.normal(jax.random.key(5), (B, 5, D))
    weights, state = net.init(lc.signature_of((x, y, memory)), jax.random.key(1))

    def loss(memory, mode):
        rng = jax.random.key(0)
        out, _ = net.apply(weights, state, (x, y, memory), rng=rng, mode=mode)
        return (out[0] * out[1]).sum()

    ours, plain = (jax.grad(loss)(memory, mode) for mode in (Mode.TRAIN, Mode.RECORD))
    assert_close(ours, plain)


def test_the_gradient_is_that_of_the_equations():
    """y₁ = x₁ + tanh(x₂ W), y₂ = x₂, swapped, n times; written without a layer."""
    half_residual = half(tl.Dense(D, use_bias=False), tl.Tanh())
    net = tl.ReversibleRepeat(tl.ReversibleSerial(half_residual, tl.ReversibleSwap()), 4)
    x = inputs()
    weights, _ = net.init(lc.signature_of(x), jax.random.key(1))

    def plain(weights, a, b):
        for kernel in weights['reversible_half_residual']['dense']['kernel']:
            a, b = b, a + jnp.tanh(b @ kernel)
        return (a * jnp.sin(b)).sum()

    def ours(weights, a, b):
        (a, b), _ = net.apply(weights, {}, (a, b), mode=Mode.TRAIN)
        return (a * jnp.sin(b)).sum()

    assert_close(*(jax.grad(f, (0, 1, 2))(weights, *x) for f in (ours, plain)))


def test_integers_beside_the_streams_pass_through():
    embed = half(tl.Select([1]), tl.Embedding(7, D))
    net = tl.ReversibleRepeat(embed, 3)
    tokens = jnp.arange(B * L).reshape(B, L) % 7
    values = (*inputs(), tokens)
    weights, _ = net.init(lc.signature_of(values), jax.random.key(1))

    def loss(weights, mode):
        outputs, _ = net.apply(weights, {}, values, mode=mode)
        return (outputs[0] ** 2).sum()

    assert_close(*(jax.grad(loss)(weights, mode) for mode in (Mode.TRAIN, Mode.RECORD)))


class Scale(tl.Reversible):
    """A reversible layer of a user: x ↦ exp(w)·x."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.full((), 0.1)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0] * jnp.exp(weights['w']),), state

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        x = outputs[0] * jnp.exp(-weights['w'])
        _, d_inputs, d = tl.one_pass(self, weights, state, (x,), cts, rng=rng, mode=mode)
        return (x,), d_inputs, d


def test_a_reversible_layer_can_be_made():
    ours, plain = gradients(tl.ReversibleSerial(Scale(), half(tl.Dense(D)), Scale()), inputs())
    assert_close(ours, plain)
    with pytest.raises(NotImplementedError, match='Reversible has no reverse_and_grad'):
        tl.Reversible().reverse_and_grad({}, {}, (), (), rng=None)


def test_the_backward_pass_computes_each_piece_once_more():
    """A product, again, and its two gradients: 3 in the backward pass, 4 in all."""
    feed_forward = tl.Serial(tl.Dense(D, use_bias=False), tl.Relu())
    net = tl.ReversibleRepeat(half(tl.Chunk(feed_forward, 3)), 5)
    x = inputs()
    weights, _ = net.init(lc.signature_of(x), jax.random.key(0))

    def loss(weights, x):
        return net.apply(weights, {}, x, mode=Mode.TRAIN)[0][0].sum()

    assert str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x)).count('dot_general') == 4


def test_restored_streams_drift_little_at_depth_48():
    feed_forward = half(tl.LayerNorm(), tl.Dense(2 * D), tl.Gelu(), tl.Dense(D))
    net = tl.ReversibleRepeat(tl.ReversibleSerial(feed_forward, tl.ReversibleSwap()), 48)
    x = inputs()
    weights, state = net.init(lc.signature_of(x), jax.random.key(1))
    outputs, _ = net.apply(weights, state, x, mode=Mode.TRAIN)
    restored, _, _ = net.reverse_and_grad(weights, state, outputs, outputs, rng=None)
    # Each block rounds once more; an H100, which sums products in another order, is at 1.04e-5.
    np.testing.assert_allclose(restored, x, atol=2e-5)


def test_statistics_are_updated_as_without_reversal():
    net = tl.ReversibleRepeat(half(tl.BatchNorm(), tl.Dense(D)), 2)
    x = inputs()
    weights, state = net.init(lc.signature_of(x), jax.random.key(1))
    plain = tl.Repeat(half(tl.BatchNorm(), tl.Dense(D)), 2)
    ours = net.apply(weights, state, x, mode=Mode.TRAIN)
    assert_close(ours, plain.apply(weights, state, x, mode=Mode.TRAIN), 1e-6)
    assert (ours[1]['batch_norm']['mean'] != 0).all()


def test_streams_are_float32_whatever_comes_in():
    net = tl.ReversibleRepeat(half(tl.Dense(D)), 2)
    signature = (lc.shape_dtype((B, L, D), 'bfloat16'),) * 2
    weights, state = net.init(signature, jax.random.key(0))
    x = jnp.ones((B, L, D), jnp.bfloat16)
    for mode in (Mode.TRAIN, Mode.EVAL):
        out, _ = net.apply(weights, state, (x, x), rng=jax.random.key(0), mode=mode)
        assert out[0].dtype == jnp.float32
    assert net.output_signature(signature)[0].dtype == jnp.float32
    flat, flat_weights = lc.unstack(net, weights)
    unstacked, _ = flat.apply(flat_weights, state, (x, x))
    assert isinstance(flat, tl.ReversibleSerial)
    np.testing.assert_allclose(unstacked, out, rtol=1e-6)


def test_outputs_are_those_of_the_plain_layers():
    net = tl.ReversibleRepeat(block(), 3)
    x, y = inputs()
    weights, state = net.init(lc.signature_of((x, y)), jax.random.key(0))
    values = x, y
    for i in range(3):
        one, its_state = jax.tree.map(lambda w, i=i: w[i], (weights, state))
        values, _ = block().apply(one, its_state, values)
    got, _ = net.apply(weights, state, (x, y))
    np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_depth(optimized):
    feed_forward = half(tl.LayerNorm(), tl.Dense(256), tl.Gelu(), tl.Dropout(0.1), tl.Dense(64))
    inner = tl.ReversibleSerial(feed_forward, tl.ReversibleSwap())

    def temporaries(make, n):
        net = make(inner, n)
        signature = (lc.shape_dtype((4, 128, 64)),) * 2
        key = jax.eval_shape(jax.random.key, 0)
        weights, state = jax.eval_shape(lambda key: net.init(signature, key), key)

        def loss(weights, inputs, key):
            out, _ = net.apply(weights, state, inputs, rng=key, mode=Mode.TRAIN)
            return (out[0] * out[1]).sum()

        compiled = jax.jit(jax.grad(loss)).lower(weights, signature, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    low, high = (temporaries(tl.ReversibleRepeat, n) for n in (4, 16))
    assert high < 1.02 * low
    plain = tl.Serial(feed_forward, tl.Swap())
    keeps = functools.partial(lambda _, n: tl.Repeat(plain, n))
    assert temporaries(keeps, 16) > 4 * high


@pytest.mark.slow
def test_a_model_of_reversible_layers_decodes_as_it_evaluates():
    net = lc.models.ReformerLM(
        16, 8, 16, n_layers=4, n_heads=2, max_len=32, chunk_len=4,
        attention=(tl.LocalSelfAttention(2, 4), tl.LSHSelfAttention(2, chunk_len=4)),
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (B, 20), 0, 16)
    weights, _ = net.init(lc.signature_of((tokens,)), jax.random.key(1))
    (expected,), _ = net.apply(weights, {}, (tokens,))
    flat, flat_weights = lc.unstack(net, weights)
    for model, its_weights in ((net, weights), (flat, flat_weights)):
        state = lc.init_state(model, lc.signature_of((tokens,)), Mode.PREDICT)
        step = jax.jit(functools.partial(model.apply, mode=Mode.PREDICT))
        got = []
        for piece in (tokens[:, :11], *(tokens[:, t : t + 1] for t in range(11, 20))):
            (logits,), state = step(its_weights, state, (piece,))
            got.append(logits)
        np.testing.assert_allclose(jnp.concatenate(got, 1), expected, atol=1e-4)


def test_what_cannot_be_undone_is_refused():
    with pytest.raises(TypeError, match='ReversibleSerial: Dense is not reversible: put it into'):
        tl.ReversibleSerial(tl.Dense(4))
    with pytest.raises(TypeError, match='ReversibleRepeat: Serial is not reversible: put it into'):
        tl.ReversibleRepeat(tl.Serial(tl.Dense(4)), 2)
    with pytest.raises(ValueError, match='lose or repeat a value, which cannot be undone'):
        tl.ReversibleSelect((0, 0))
    with pytest.raises(TypeError, match='ReversibleSerial: Swap is not reversible: put it into'):
        tl.ReversibleSerial(tl.ReversibleSwap()).with_sublayers((tl.Swap(),))
    with pytest.raises(TypeError, match='ReversibleRepeat: a block must put back as many values'):
        tl.ReversibleRepeat(tl.ReversibleSerial(), 2).replace(layer=tl.Drop())
    with pytest.raises(ValueError, match='lose or repeat a value, which cannot be undone'):
        tl.ReversibleSelect([0], n_in=2)
    with pytest.raises(ValueError, match='must leave one value to add, they leave 2: end them'):
        tl.ReversibleHalfResidual(tl.Dup())


def test_streams_that_do_not_fit_are_refused_where_they_meet():
    x, y = jnp.ones((B, D)), jnp.ones((B, D + 1))
    with pytest.raises(ValueError, match=r'\(2, 8\) and \(2, 9\) could not be told apart again'):
        tl.ReversibleConcatenatePair().apply({}, {}, (x, y))
    net = tl.ReversibleSerial(half(tl.Dense(5)))
    with pytest.raises(ValueError, match='Add: cannot add') as caught:
        net.init(lc.signature_of((x, x)), jax.random.key(0))
    assert 'in ReversibleSerial.reversible_half_residual' in caught.value.__notes__
