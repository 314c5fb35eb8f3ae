"""`one_pass` of every layer that has a rule equals `vjp` of its `apply`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl, transforms
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import add_cts, vjp
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.shapes import is_float, shape_dtype, signature_of

B, L, D = 2, 7, 4


class Balance(Layer):
    """Passes on what it gets; its auxiliary loss depends on a weight and on the values."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'gain': jnp.ones(())}, {'aux_loss': tl.AuxLoss(jnp.zeros(()))}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x,), {'aux_loss': tl.AuxLoss((weights['gain'] * x**2).mean())}


class Choose(Layer):
    """Keeps each position's greatest feature, a decision."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        found, state = tl.decide(mode, state, 'at', lambda: jnp.argmax(x, -1).astype(jnp.uint8))
        at = found.astype(jnp.int32)[..., None]
        return (jnp.where(jnp.arange(x.shape[-1]) == at, 3 * x, x),), state


class Shift(Layer):
    """Adds its state, which passes on from one application to the next."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'times': jnp.zeros(())}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x * (1 + state['times']),), {'times': state['times'] + 1}


def feed_forward() -> Layer:
    return tl.Serial(tl.LayerNorm(), tl.Dense(6), Choose(), Balance(), tl.Dense(D), tl.Dropout(0.3))


def tied() -> Layer:
    net = tl.Serial(tl.Dense(6, use_bias=False, name='up'), tl.Dense(D, name='down'))
    return transforms.Tied(net, 'up/kernel', 'down/kernel', jnp.transpose)


X, MASK, IDS = shape_dtype((B, L, D)), shape_dtype((B, L), bool), shape_dtype((B, L), 'int32')
LAYERS = {
    'Serial': (feed_forward, (X,)),
    'Serial of nothing': (tl.Serial, (X,)),
    'Serial with values beneath': (lambda: tl.Serial(tl.Dup(), tl.Dense(D), tl.Swap()), (X,)),
    'Serial from integers': (lambda: tl.Serial(tl.Embedding(7, D), tl.Relu()), (IDS,)),
    'masked attention': (
        lambda: tl.Serial(tl.Dense(D), tl.SelfAttention(2, masked=True)),
        (X, MASK),
    ),
    'Residual': (lambda: tl.Residual(tl.Dense(6), tl.Dense(D)), (X,)),
    'Residual that keeps more': (lambda: tl.Residual(tl.Dup(), tl.Dense(D)), (X,)),
    'Residual of two': (lambda: tl.Residual(tl.Multiply()), (X, X)),
    'Residual with a shortcut': (lambda: tl.Residual(tl.Dense(6), shortcut=tl.Dense(6)), (X,)),
    'Remat': (lambda: tl.Remat(feed_forward()), (X,)),
    'Chunk': (lambda: tl.Chunk(feed_forward(), 3), (X,)),
    'Chunk that fits': (lambda: tl.Chunk(feed_forward(), 7), (X,)),
    'Chunk longer': (lambda: tl.Chunk(feed_forward(), 8), (X,)),
    'Chunk in a Chunk': (lambda: tl.Chunk(tl.Chunk(feed_forward(), 2), 4), (X,)),
    'Chunk of integers': (lambda: tl.Chunk(tl.Serial(tl.Embedding(7, D), tl.Dup()), 3), (IDS,)),
    'Chunk whose pieces pass on': (lambda: tl.Chunk(tl.Serial(tl.Dense(D), Shift()), 3), (X,)),
    'Tied': (tied, (X,)),
}
every_layer = pytest.mark.parametrize('case', LAYERS.values(), ids=list(LAYERS))


def example(signature):
    made = np.random.default_rng(0)

    def one(s):
        if is_float(s):
            return jnp.asarray(made.normal(size=s.shape), s.dtype)
        return jnp.asarray(made.integers(0, 2, s.shape), s.dtype)

    return tuple(map(one, signature))


def setting(net, signature):
    """Weights, inputs, a state with decisions, and cotangents of outputs and auxiliary losses."""
    weights, state = net.init(signature, jax.random.key(0))
    inputs = example(signature)
    outputs, new = net.apply(weights, state, inputs, rng=jax.random.key(1), mode=Mode.RECORD)
    plain, found = take_decisions(new)
    cts = tuple(jnp.cos(y.astype(jnp.float32)) if is_float(y) else None for y in outputs)
    state_cts = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), plain)
    return weights, put_decisions(state, found), inputs, cts, state_cts


def assert_close(got, wanted, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


@every_layer
def test_equals_the_vjp(case):
    make, signature = case
    net = make()
    weights, state, inputs, cts, state_cts = setting(net, signature)
    given = {'mode': Mode.REPLAY, 'state_cts': state_cts}

    def both(rng, again):
        ours = tl.one_pass(net, weights, state, inputs, cts, rng=rng, **given)
        return ours, tl.one_pass.default(net, weights, state, inputs, cts, rng=again, **given)

    ours, wanted = jax.jit(both)(jax.random.key(1), jax.random.key(1))
    assert_close(ours, wanted)


def test_an_auxiliary_loss_in_pieces_is_weighted_by_their_positions():
    net = tl.Chunk(Balance(), 3)
    weights, state, inputs, cts, _ = setting(net, (X,))
    cts = (jnp.zeros_like(cts[0]),)
    _, (d_x,), d = tl.one_pass(
        net, weights, state, inputs, cts, state_cts={'aux_loss': tl.AuxLoss(jnp.ones(()))}
    )
    np.testing.assert_allclose(d['gain'], (inputs[0] ** 2).mean(), rtol=1e-6)
    np.testing.assert_allclose(d_x, 2 * inputs[0] / inputs[0].size, rtol=1e-5)


def test_a_cast_layer_takes_wide_cotangents_and_gives_wide_gradients():
    net = transforms.cast(tl.Serial(tl.LayerNorm(), tl.Dense(6), tl.Relu(), tl.Dense(D)))
    weights, state, inputs, cts, _ = setting(net, (X,))
    given = functools.partial(tl.one_pass, net, weights, state, inputs, cts)
    (y,), d_inputs, d_weights = given(mode=Mode.TRAIN)
    assert y.dtype == jnp.bfloat16
    assert {g.dtype.name for g in jax.tree.leaves((d_inputs, d_weights))} == {'float32'}
    assert_close(
        (d_inputs, d_weights),
        tl.one_pass.default(net, weights, state, inputs, cts)[1:],
        1e-2,
    )


def test_chunk_computes_each_piece_twice_and_not_three_times(optimized):
    """Forward and backward of a matrix product are 3 products; a third computation makes 4."""
    d = 64
    net = tl.Chunk(tl.Serial(tl.Dense(d, use_bias=False), tl.Relu()), 32)
    x = shape_dtype((1, 128, d))
    weights, state = net.init((x,), jax.random.key(0))

    def flops(of):
        run = jax.jit(lambda w, x, ct: of(w, state, (x,), (ct,), mode=Mode.TRAIN))
        text = run.lower(weights, x, x).as_text()
        return text.count('dot_general')

    assert flops(functools.partial(tl.one_pass, net)) == 3
    assert flops(functools.partial(tl.one_pass.default, net)) == 4


def test_errors_say_where():
    net = tl.Serial(tl.Dense(3), tl.Add(), name='net')
    weights, _ = tl.Serial(tl.Dense(3)).init((X,), jax.random.key(0))
    x = jnp.ones((B, L, D))
    with pytest.raises(ValueError, match='Add: cannot add') as caught:
        tl.one_pass(net, weights, {}, (x, x), (x,))
    assert any('in Serial.add: Add()' in note for note in caught.value.__notes__)


def test_vjp_gives_none_for_what_is_no_float():
    def f(x, tree):
        return {'y': x * tree['scale'], 'n': tree['n'] + 1}

    tree = {'scale': jnp.float32(3), 'n': jnp.int32(1), 'key': jax.random.key(0)}
    made, pull = vjp(f, jnp.ones(2, jnp.bfloat16).astype(jnp.float32), tree)
    d_x, d_tree = pull({'y': jnp.ones(2), 'n': None})
    assert made['n'] == 2 and d_tree['n'] is None and d_tree['key'] is None
    assert d_x.tolist() == [3, 3] and d_tree['scale'] == 2
    d_x, d_tree = pull({'y': None, 'n': None})
    assert d_x.tolist() == [0, 0] and d_tree['scale'] == 0


def test_cotangents_are_summed_in_the_dtype_of_the_first():
    a, b = jnp.ones(2), jnp.ones(2, jnp.bfloat16)
    assert add_cts(a, b).dtype == jnp.float32 and add_cts(b, a).dtype == jnp.bfloat16
    assert add_cts(None, b) is b and add_cts(a, None) is a and add_cts(None, None) is None


def test_signatures_are_enough():
    net = tl.Chunk(feed_forward(), 3)
    weights, state, inputs, cts, _ = setting(net, (X,))

    def run(weights, state, inputs, cts, rng):
        return tl.one_pass(net, weights, state, inputs, cts, rng=rng, mode=Mode.REPLAY)

    made = jax.eval_shape(run, weights, state, inputs, cts, jax.random.key(0))
    assert signature_of(made[0]) == signature_of(made[1]) == signature_of((inputs[0],))
