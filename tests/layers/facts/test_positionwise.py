"""Who says that a layer works on each position by itself, and what is done if nobody does."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb
from layercomb import losses, tl, transforms
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode

B, L, D, V = 2, 7, 4, 5

X = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def rolled(x: jax.Array) -> jax.Array:
    return jnp.roll(x, 1, 1)


class Roll(Layer):
    """Moves the sequence by one, and does not say so."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (rolled(inputs[0]),), state


class Double(Layer):
    """Twice its input."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (2 * inputs[0],), state


class Passing(tl.Wrapper):
    """Its layer, and nobody knows."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


class SaidPassing(Passing):
    """Its layer, said."""

    position_wise = property(lambda self: self.layer.position_wise)


def chunked(layer: Layer, x: jax.Array = X) -> jax.Array:
    net = tl.Chunk(layer, 3)
    weights, state = net.init(jax.eval_shape(lambda: (x,)), jax.random.key(0))
    return net.apply(weights, state, (x,))[0][0]


def unsaid(name: str, line: str = 'position_wise = True in the class') -> str:
    return re.escape(
        f'{name} does not say whether it works on each position by itself: write {line} if it does'
    )


# What is said, and by whom.


def classes(of: type = Layer) -> Iterator[type]:
    for each in of.__subclasses__():
        yield each
        yield from classes(each)


# What subclasses complete, and what says what it is told: the functions and layers are others'.
SILENT = {
    'Wrapper', 'Activation', 'Rearrange', 'Metric', 'Elementwise', 'Reversible', 'Fn',
    'Hashing', 'LSHOptions', 'SelectingOptions', 'HashedOptions', 'BlockOptions',
    'MixedOptions',
}  # fmt: skip


def test_every_layer_of_the_library_says_whether_it_is_position_wise():
    for module in pkgutil.walk_packages(layercomb.__path__, 'layercomb.'):
        if not module.name.endswith('__main__'):
            importlib.import_module(module.name)
    library = {  # examples in docstrings define classes too
        c for c in classes() if getattr(sys.modules.get(c.__module__), c.__name__, None) is c
    }
    library = {c for c in library if c.__module__.startswith('layercomb.')}
    silent = {c for c in library if inspect.getattr_static(c, 'position_wise') is None}
    assert {c.__name__ for c in silent if not c.__name__.startswith('_')} == SILENT


def test_a_combinator_says_what_its_layers_say():
    unknown = tl.Fn('Roll', rolled)
    for kind in (tl.Serial, tl.Residual, tl.Branch, tl.Parallel):
        assert kind(tl.Dense(D), tl.Relu()).position_wise is True
        assert kind(tl.Dense(D), unknown).position_wise is None
        assert kind(unknown, tl.BatchNorm()).position_wise is False
    assert tl.Serial().position_wise is True
    assert tl.SelfAttention(2).position_wise is False
    assert tl.ReversibleSerial(tl.ReversibleHalfResidual(tl.Dense())).position_wise is True
    assert tl.ReversibleHalfResidual(tl.SelfAttention(2)).position_wise is False


class Twice(tl.Combinator):
    """A route of one's own: its layer, twice."""

    inner: Layer

    def route(self, call, stack):
        return call(0, call(0, stack[:1])) + stack[1:]


class Beside(Twice):
    """One that does more than routing."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (rolled(y),), state


def test_a_combinator_of_ones_own_only_routes_unless_it_computes():
    assert Twice(Double()).position_wise is True and Twice(tl.Mean()).position_wise is False
    np.testing.assert_array_equal(chunked(Twice(Double())), 4 * X)
    assert Beside(Double()).position_wise is None
    with pytest.raises(TypeError, match=f'^Chunk: {unsaid("Beside")}$'):
        tl.Chunk(Beside(Double()))


WRAPPERS = {
    'Remat': tl.Remat,
    'Repeat': lambda layer: tl.Repeat(layer, 2),
    'Map': lambda layer: tl.Map(layer, 1),
    'Once': tl.Once,
    'AssertShape': lambda layer: tl.AssertShape('bld->bld', layer),
    'Tied': lambda layer: transforms.Tied(layer, 'a', 'b'),
    'ones own that says so': SaidPassing,
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_a_wrapper_says_what_its_layer_says(name):
    wrap = WRAPPERS[name]
    for layer in (Double(), Roll(), tl.BatchNorm()):
        assert wrap(layer).position_wise is layer.position_wise


def test_wrappers_of_leaves_say_what_these_say():
    assert transforms.Cast(Roll()).position_wise is None
    assert transforms.Cast(tl.Conv1D(D)).position_wise is False
    for layer, said in ((tl.Dense(D), True), (Moved(D), None)):
        assert transforms.Cast(layer).position_wise is said
        assert transforms.Quantized(layer).position_wise is said


def test_a_wrapper_of_ones_own_says_nothing_unless_it_says_so():
    assert Passing(Double()).position_wise is None
    with pytest.raises(TypeError, match=unsaid('Passing')):
        tl.Chunk(tl.Serial(tl.Dense(D), Passing(Double())))
    np.testing.assert_array_equal(chunked(SaidPassing(Double())), 2 * X)


class Louder(tl.Dense):
    """A dense layer with a method of its own, which computes as `Dense` does."""

    def loudness(self):
        return self.n_units


class Moved(tl.Dense):
    """A dense layer that moves the sequence."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return super().apply(weights, state, (rolled(inputs[0]),), rng=rng, mode=mode)


class Later:
    """An `apply` that comes from no layer."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (rolled(inputs[0]),), state


class Mixed(Later, tl.Dense):
    """A dense layer with another's `apply`."""


class Nodding(tl.Tanh):
    """An activation that looks around."""

    function = staticmethod(rolled)


class Picking(tl.Swap):
    """Another `pick`."""

    def pick(self, values):
        return tuple(map(rolled, values))


class Centred(tl.CrossEntropyLoss):
    """Values about the mean of their sequence."""

    def values(self, logits, targets):
        made = super().values(logits, targets)
        return made - made.mean(1, keepdims=True)


class Named(tl.CrossEntropyLoss):
    """Another name in reports."""

    label = property(lambda self: 'named')


def test_who_computes_anew_says_it_anew():
    assert Louder(D).position_wise is True and Named().position_wise is True
    for layer in (Moved(D), Mixed(D), Nodding(), Picking(), Centred()):
        assert layer.position_wise is None

    class Still(Moved):
        """A subclass of one that says nothing."""

    class Right(Moved):
        """One that says it."""

        position_wise = False

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            return super().apply(weights, state, inputs, rng=rng, mode=mode)

    assert Still(D).position_wise is None and Right(D).position_wise is False
    with pytest.raises(TypeError, match=unsaid('Still')):
        tl.Chunk(Still(D))


def test_it_may_be_a_field_or_a_property():
    class Field(Layer):
        """As it is told."""

        position_wise: bool

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            return inputs, state

    assert Field(True).position_wise is True and Field(False).position_wise is False
    with pytest.raises(TypeError, match='Field: position_wise must be a bool, got 1'):
        Field(1)
    assert tl.Concatenate().position_wise and not tl.Concatenate(axis=1).position_wise


def test_what_is_neither_yes_nor_no_is_refused():
    with pytest.raises(TypeError, match="Odd: position_wise is True, False or None, got 'yes'"):

        class Odd(Layer):
            position_wise = 'yes'


# Functions.


def test_a_function_says_it_where_it_is_made():
    assert tl.Fn('F', rolled).position_wise is None
    said = tl.Fn('F', rolled, position_wise=False)
    assert said.position_wise is False and said != tl.Fn('F', rolled)
    assert repr(tl.Fn('F', rolled)) == "Fn('F', rolled)"
    assert repr(said) == "Fn('F', rolled, position_wise=False)"
    assert said.replace(position_wise=True) == tl.Fn('F', rolled, position_wise=True)
    with pytest.raises(TypeError, match="Fn: position_wise must be a bool or None, got 'yes'"):
        tl.Fn('F', rolled, position_wise='yes')
    double = tl.Fn('Double', lambda x: 2 * x, position_wise=True)
    np.testing.assert_array_equal(chunked(double), 2 * X)


# `Chunk`.


def test_chunk_refuses_what_says_nothing_and_names_it():
    line = 'Fn(…, position_wise=True)'
    for layer, text in (
        (Roll(), unsaid('Roll')),
        (tl.Fn('Roll', rolled), unsaid("Fn('Roll', rolled)", line)),
        (tl.Residual(tl.Repeat(tl.Remat(tl.Serial(tl.Dense(D), Roll())), 2)), unsaid('Roll')),
        (tl.Serial(Double(), Passing(Roll())), unsaid('Roll')),
        (Moved(D), unsaid('Moved')),
    ):
        with pytest.raises(TypeError, match=f'^Chunk: {text}$'):
            tl.Chunk(layer)
    with pytest.raises(TypeError, match=r'^Chunk: BatchNorm mixes positions'):
        tl.Chunk(tl.Serial(Roll(), tl.BatchNorm()))
    with pytest.raises(TypeError, match=r'^Chunk: BatchNorm mixes positions'):
        tl.Chunk(Passing(tl.BatchNorm()))


def test_a_rewrite_that_puts_in_what_says_nothing_is_refused_too():
    net = tl.Chunk(tl.Serial(tl.Dense(D), tl.Relu()))
    with pytest.raises(TypeError, match=unsaid('Roll')):
        transforms.rewrite(net, lambda layer: Roll() if layer == tl.Relu() else layer)


def test_who_says_it_wrongly_gets_what_he_asked_for():
    class Wrong(Roll):
        """Rolls, and says that it does not."""

        position_wise = True

    pieces = [jnp.roll(X[:, i : i + 3], 1, 1) for i in range(0, L, 3)]
    np.testing.assert_array_equal(chunked(Wrong()), jnp.concatenate(pieces, 1))


# Losses in pieces.

IDS = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, L)), jnp.int32)
WEIGHTS = jnp.ones((B, L), jnp.float32)


def scored(net: Layer, chunk_len: int | None) -> tuple[Layer, jax.Array]:
    layer = losses.attach(net, tl.CrossEntropyLoss(), chunk_len)
    inputs = (IDS, IDS, WEIGHTS)
    weights, state = layer.init(jax.eval_shape(lambda: inputs), jax.random.key(0))
    return layer, layer.apply(weights, state, inputs)[0][0]


def pieces(layer: Layer) -> Layer | None:
    """What is chunked in a model with its loss."""
    if isinstance(layer, tl.Chunk):
        return layer.layer.layer
    found = (pieces(each) for each in layer.sublayers)
    return next((each for each in found if each is not None), None)


def test_an_own_layer_that_says_it_is_chunked_with_the_head():
    head = tl.Serial(Double(), tl.Fn('Half', lambda x: x / 2, position_wise=True), tl.Dense(V))
    layer, values = scored(tl.Serial(tl.Embedding(V, D), head), 3)
    assert (
        pieces(layer).layers
        == tuple(each.replace(name=key) for key, each in zip(head.keys, head.layers, strict=True))
        or pieces(layer).layers == head.layers
    )
    np.testing.assert_allclose(values, scored(tl.Serial(tl.Embedding(V, D), head), None)[1], 1e-6)


@pytest.mark.parametrize('own', [Roll(), tl.Fn('Roll', rolled), Passing(Double()), Moved(D)])
def test_an_own_layer_that_says_nothing_is_kept_out_of_the_pieces(own):
    for head, inside in (
        (tl.Serial(own, tl.Dense(V)), tl.Dense(V, name='dense')),
        (tl.Serial(tl.Dense(V), tl.Residual(own) if own != Moved(D) else Moved(V)), None),
    ):
        net = tl.Serial(tl.Embedding(V, D), head)
        layer, values = scored(net, 3)
        assert pieces(layer) == inside
        np.testing.assert_allclose(values, scored(net, None)[1], 1e-6)


def test_a_metric_that_says_nothing_is_not_measured_in_pieces():
    net = tl.Serial(tl.Embedding(V, D), tl.Dense(V))
    with pytest.raises(TypeError, match=rf'^attach: {unsaid("Centred")}, or measure .*_len=None\)'):
        losses.attach(net, (tl.CrossEntropyLoss(), Centred()), 3)
    assert losses.attach(net, Centred()).n_out == 2
    with pytest.raises(TypeError, match='attach: SequenceAccuracy needs all positions'):
        losses.attach(net, tl.SequenceAccuracy(), 3)


def test_fields_stay_what_they_are():
    assert [field.name for field in dataclasses.fields(tl.Dense(3))].count('position_wise') == 0
    assert [field.name for field in dataclasses.fields(Moved)].count('position_wise') == 0


def test_a_mixin_that_says_nothing_does_not_hide_what_others_say():
    class Options(Layer):
        size: int = 1

    class Own(Options, tl.Dense):
        pass

    assert Own(4).position_wise is True
    assert tl.LSHSelfAttention(2).position_wise is False
