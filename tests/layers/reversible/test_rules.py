"""Rules by class of layer: a layer of one's own joins, and one that computes otherwise does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.attention.heads import goes_by_head
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.rules import Rules
from layercomb.shapes import shape_dtype, signature_of

B, L, D = 2, 6, 4
X = shape_dtype((B, L, D))


def floats(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Scale(Layer):
    """x ↦ w·x, whose rule counts how often it is followed."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.full((), 2.0)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (weights['w'] * x,), state


followed = []


@tl.one_pass.register(Scale)
def scale_in_one_pass(layer, weights, state, inputs, cts, *, rng, mode, state_cts):
    followed.append((rng is None, mode, state_cts))
    (x,), (ct,), w = inputs, cts, weights['w']
    return (w * x,), (w * ct,), {'w': (x * ct).sum()}


def assert_is_vjp(net, *inputs, **given):
    """Checks `one_pass` against `vjp` of `apply`; gives what the first gave."""
    weights, state = net.init(signature_of(inputs), jax.random.key(0))
    outputs, _ = net.apply(weights, state, inputs, rng=jax.random.key(1), mode=Mode.TRAIN)
    cts = tuple(jnp.cos(y) for y in outputs)

    def gradients(of):
        return of(net, weights, state, inputs, cts, rng=jax.random.key(1), **given)

    got = gradients(tl.one_pass)
    wanted = jax.tree.leaves(gradients(tl.one_pass.default))
    for a, b in zip(jax.tree.leaves(got), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return got


AROUND = {
    'alone': lambda layer: layer,
    'Serial': lambda layer: tl.Serial(tl.Dense(D), layer),
    'Serial before dropout': lambda layer: tl.Serial(layer, tl.Dropout(0.5)),
    'Residual': lambda layer: tl.Residual(layer),
    'Remat': lambda layer: tl.Remat(layer),
    'Once': lambda layer: tl.Once(layer),
    'Chunk': lambda layer: tl.Chunk(layer, 4),
    'AssertShape': lambda layer: tl.AssertShape('bld->bld', layer),
}


@pytest.mark.parametrize('around', AROUND.values(), ids=list(AROUND))
def test_a_layer_of_ones_own_joins(around):
    followed.clear()
    assert_is_vjp(around(Scale()), floats(B, L, D))
    assert followed


def test_the_backward_pass_of_a_reversible_stack_follows_the_rule():
    net = tl.ReversibleRepeat(tl.ReversibleHalfResidual(Scale()), 2)
    x = floats(B, D), floats(B, D, seed=1)
    weights, _ = net.init(signature_of(x), jax.random.key(0))

    def loss(weights, mode):
        (a, b), _ = net.apply(weights, {}, x, mode=mode)
        return (jnp.sin(a) * b).sum()

    followed.clear()
    ours = jax.grad(loss)(weights, Mode.TRAIN)
    assert [mode for _, mode, _ in followed] == [Mode.REPLAY]  # a scan traces its body once
    wanted = jax.grad(loss)(weights, Mode.RECORD)
    np.testing.assert_allclose(ours['scale']['w'], wanted['scale']['w'], rtol=1e-5)


def test_a_rule_is_given_all_arguments():
    followed.clear()
    tl.one_pass(Scale(), {'w': jnp.ones(())}, {}, (floats(D),), (floats(D),))
    assert followed == [(True, Mode.TRAIN, None)]
    with pytest.raises(TypeError, match="missing a required argument: 'cts'"):
        tl.one_pass(Scale(), {}, {}, ())


class Doubled(tl.Serial, init=False):
    """A series whose outputs are doubled."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        outputs, state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return tuple(2 * y for y in outputs), state


class Backwards(tl.Serial, init=False):
    """A series from the last layer to the first."""

    def route(self, call, stack):
        for i in reversed(range(len(self.layers))):
            stack = call(i, stack[:1]) + stack[1:]
        return stack


class Plain(tl.Serial, init=False):
    """A series under another name."""


class Negated(tl.Residual, init=False):
    """−(x + f(x))."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (-y,), state


class Minus(tl.Add):
    """a − b."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0] - inputs[1],), state


class Halved(tl.Chunk):
    """What a chunked layer gives, halved."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (y / 2,), state


class Squared(tl.Dropout):
    """The square of what is not dropped."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (y * y,), state


class Softened(tl.SelfAttention):
    """The tanh of attention."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (jnp.tanh(y),), state


class Bent(tl.MergeHeads):
    """A projection from heads that is no sum over them."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (jax.nn.relu(y),), state


INHERITED = {
    'Serial': lambda: Doubled(tl.Dense(5), tl.Tanh()),
    'Serial, route': lambda: Backwards(tl.Dense(D), tl.Tanh()),
    'Residual': lambda: Negated(tl.Dense(D)),
    'Residual, add': lambda: tl.Residual(tl.Dense(D)).replace(add=Minus()),
    'Chunk before another layer': lambda: tl.Serial(Halved(tl.Dense(D), 4), tl.Dense(3)),
    'Chunk': lambda: Halved(tl.Dense(D), 4),
    'Dropout': lambda: tl.Serial(tl.Dense(D), Squared(0.5)),
    'SelfAttention': lambda: Softened(2),
    'MergeHeads': lambda: tl.SelfAttention(2, output=Bent()),
}


@pytest.mark.parametrize('make', INHERITED.values(), ids=list(INHERITED))
def test_a_subclass_that_computes_otherwise_has_its_own_gradient(make):
    assert_is_vjp(make(), floats(B, L, D))


def test_a_subclass_that_computes_the_same_keeps_the_rule():
    assert tl.one_pass.rule(Plain) is tl.one_pass.rule(tl.Serial) is not tl.one_pass.default
    assert_is_vjp(Plain(tl.Dense(D), tl.Dropout(0.5)), floats(B, L, D))
    attention = [tl.SelfAttention, tl.LocalSelfAttention, tl.LSHSelfAttention, tl.CrossAttention]
    assert len({tl.one_pass.rule(cls) for cls in attention}) == 1  # the route may be another
    assert tl.one_pass.rule(Softened) is tl.one_pass.default
    assert tl.one_pass.rule(tl.ReversibleSerial) is tl.one_pass.default


def test_a_head_that_is_no_part_of_a_sum_goes_with_the_others():
    x = floats(B, L, D)
    for net, goes in ((tl.SelfAttention(2), True), (tl.SelfAttention(2, output=Bent()), False)):
        weights, _ = net.init((X,), jax.random.key(0))
        assert goes_by_head(net, weights, (x,)) == goes
        (y,), _ = net.apply(weights, {}, (x,), mode=Mode.RECORD)
        (wanted,), _ = net.apply(weights, {}, (x,), mode=Mode.EVAL)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_a_projection_of_ones_own_joins():
    class Lone(Layer):
        """Heads of features, each scaled by a weight of its own."""

        n_heads: int = 2
        position_wise = True

        def init(self, signature, rng, mode=Mode.TRAIN):
            return {'scale': jnp.arange(1.0, self.n_heads + 1)}, {}

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            (x,) = inputs
            return (x[:, None] * weights['scale'][:, None, None],), state

    net = tl.SelfAttention(2, d_head=D, query=Lone())
    weights, _ = net.init((X,), jax.random.key(0))
    assert not goes_by_head(net, weights, (X,))
    tl.by_head.register(Lone)(lambda layer, weights: {'scale': weights['scale'][:, None]})
    assert goes_by_head(net, weights, (X,))
    assert_is_vjp(net, floats(B, L, D), mode=Mode.REPLAY)


def test_dropout_of_ones_own_joins():
    class Sign(Layer):
        """Keeps or turns the sign of features, by the key."""

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            (x,) = inputs
            return (jax.random.rademacher(rng, x.shape[-1:], x.dtype) * x,), state

    followed.clear()
    net = tl.Serial(Scale(), Sign())
    assert_is_vjp(net, floats(B, D))
    assert not followed  # Scale is not the last
    tl.is_diagonal.register(Sign)(lambda layer: True)
    assert_is_vjp(net, floats(B, D))
    assert followed


def test_what_recomputes_is_not_kept():
    class Again(Layer):
        """A layer that says that its gradient computes it again."""

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            return (jnp.tanh(inputs[0]),), state

    def passes():
        net = tl.Serial(Again(), tl.Relu())
        run = jax.make_jaxpr(lambda x: tl.one_pass(net, {}, {}, (x,), (x,)))
        return str(run(floats(D))).count(' tanh ')

    assert passes() == 1
    tl.recomputes.register(Again)(lambda layer: True)
    assert passes() == 2


@pytest.mark.parametrize('net', [tl.Serial(tl.Relu()), tl.Residual(tl.Relu())])
def test_too_many_values_are_refused(net):
    x = floats(D)
    with pytest.raises(TypeError, match='takes 1 value off the stack, 2 were there'):
        tl.one_pass(net, {}, {}, (x, x), (x,))
    with pytest.raises(TypeError, match='has n_out=1 and 2 cotangents were given: give one for'):
        tl.one_pass(net, {}, {}, (x,), (x, x))


def test_the_core_knows_no_gradient():
    for name in ('apply_and_grad', 'diagonal', 'headwise', 'recomputes', 'by_head'):
        assert not any(hasattr(v, name) for v in vars(tl).values() if isinstance(v, type))


def test_a_rule_holds_for_the_methods_that_it_is_of():
    @Rules
    def kind(layer, mark='?'):
        """What a layer is."""
        return 'any' + mark

    kind.register(tl.Serial)(lambda layer, mark: 'series' + mark)
    kind.register(tl.Chunk, of=())(lambda layer, mark: 'chunk' + mark)
    assert kind(tl.Relu()) == 'any?' and kind(tl.Serial(), mark='!') == 'series!'
    assert kind(Plain()) == 'series?' and kind(Doubled()) == 'any?' and kind(Backwards()) == 'any?'
    assert kind(Halved(tl.Relu())) == 'chunk?'
    kind.register(Doubled)(kind.rule(tl.Serial))
    assert kind(Doubled()) == 'series?'
    assert kind.__doc__ == 'What a layer is.' and kind.__name__ == 'kind'
