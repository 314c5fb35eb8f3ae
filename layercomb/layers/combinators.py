"""Combinators: layers made of layers, which only route values between them.

A combinator writes its arity and one method, `Combinator.route`. The same `route` serves `init`,
with signatures, and `apply`, with arrays, so that the two cannot drift apart. The base class owns
naming, keys, the threading of state, and the notes on errors.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax

from layercomb.layers.base import (
    RESERVED,
    Layer,
    Mode,
    Tree,
    _call_text,
    _set,
    _show,
    default_name,
    fold,
    given_name,
)
from layercomb.layers.cotangents import add_cts
from layercomb.layers.series import Call, Pass, Stack, serial_arity, serial_route
from layercomb.layers.wiring import check_inputs, check_outputs, check_sublayers, where
from layercomb.shapes import Signature


class Combinator(Layer):
    """A layer that routes values through sublayers: its fields that are layers, or tuples of them.

    A field that is a layer gives its sublayer the field's name; a tuple's layers are named by
    their own `name`, or by class in snake_case, with ``_1``, ``_2`` where names collide.

    >>> from layercomb import tl
    >>> tl.Serial(tl.Dense(8), tl.Dense(8), tl.LayerNorm()).keys
    ('dense', 'dense_1', 'layer_norm')
    """

    carries_counted = True

    def route(self, call: Call, stack: Stack) -> Stack:
        """Sends a stack of values (or of signatures) through the sublayers.

        Args:
          call: ``call(i, values)`` applies the i-th sublayer to a tuple of values and returns a
            tuple.
          stack: `n_in` values; more may lie beneath them, and belong into the result.
        """
        raise NotImplementedError(f'{type(self).__name__} has no route')

    @functools.cached_property
    def _children(self) -> tuple[tuple[str, Layer], ...]:
        return tuple(self._name_children())

    @property
    def sublayers(self) -> tuple[Layer, ...]:
        """All layers inside, in the order in which the fields hold them."""
        return tuple(layer for _, layer in self._children)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the sublayers, under which their weights and state lie."""
        return tuple(key for key, _ in self._children)

    def with_sublayers(self, sublayers: tuple[Layer, ...]) -> Any:
        """The same combinator around other sublayers, as many as there are."""
        check_sublayers(self, sublayers)
        rest = iter(sublayers)
        changes: dict[str, Any] = {}
        for field, value in self._layer_fields():
            many = isinstance(value, tuple)
            changes[field] = tuple(next(rest) for _ in value) if many else next(rest)
        return self.replace(**changes)

    def init(self, signature, rng, mode=Mode.TRAIN):
        """Weights and state of all sublayers, each under its key."""
        _, weights, state = self._build(tuple(signature), rng, mode)
        return weights, state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Routes `inputs`; sublayer `i` draws from `rng` folded with `i`."""
        check_inputs(self, inputs)
        new_state = dict(state)
        call = self._caller(weights, state, new_state, rng, mode)
        return self.route(call, tuple(inputs)), new_state

    def _caller(
        self, weights: Tree, state: Tree, new_state: Tree, rng: jax.Array | None, mode: Mode
    ) -> Call:
        """What `route` calls when arrays flow; it writes new states into `new_state`."""

        def call(i: int, values: Stack) -> Stack:
            key, layer = self._children[i]
            with where(self, key, layer, values):
                check_inputs(layer, values)
                outputs, new = layer.apply(
                    weights.get(key, {}), state.get(key, {}), values, rng=fold(rng, i), mode=mode
                )
                check_outputs(layer, outputs)
            if new:
                new_state[key] = new
            return outputs

        return call

    def _build(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        weights: Tree = {}
        state: Tree = {}

        def call(i: int, values: Stack) -> Stack:
            key, layer = self._children[i]
            with where(self, key, layer, values):
                seed = jax.random.fold_in(rng, zlib.crc32(key.encode()))
                outputs, its_weights, its_state = layer._build(values, seed, mode)
            if its_weights:
                weights[key] = its_weights
            if its_state:
                state[key] = its_state
            return outputs

        runs_short_inside = isinstance(self, Variadic) and self.layers
        if len(signature) > self.n_in or not runs_short_inside:
            check_inputs(self, signature)
        outputs: Any = self.route(
            call, tuple(signature)
        )  # a layer that finds too few says so in there
        check_inputs(self, signature)
        check_outputs(self, outputs)
        return outputs, weights, state

    def _layer_fields(self) -> Iterator[tuple[str, Any]]:
        """The fields that hold a layer or a tuple of layers."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            many = isinstance(value, tuple) and value and all(isinstance(v, Layer) for v in value)
            if isinstance(value, Layer) or many:
                yield field.name, value

    def _name_children(self) -> Iterator[tuple[str, Layer]]:
        groups = list(self._layer_fields())
        taken = [name for name, value in groups if isinstance(value, Layer)]
        taken += [n for _, v in groups if isinstance(v, tuple) for n in map(given_name, v) if n]
        twice = {name for name in taken if taken.count(name) > 1}
        if twice:
            raise ValueError(
                f'{type(self).__name__}: two sublayers are named {min(twice)!r}: rename one'
            )
        used = {*RESERVED, *taken}
        for field, value in groups:
            for layer in value if isinstance(value, tuple) else ():
                key = base = given_name(layer) or default_name(layer)
                n = 0
                while given_name(layer) is None and key in used:
                    n += 1
                    key = f'{base}_{n}'
                used.add(key)
                yield key, layer
            if isinstance(value, Layer):
                yield field, value

    def __post_init__(self) -> None:
        super().__post_init__()
        self._children  # noqa: B018  names that clash are an error now, not at the first call


class Variadic(Combinator, init=False):
    """A combinator that is made of any number of layers: ``Serial(layer, layer, …)``.

    In series, lists of layers are flattened and None is left out. In `Branch` and `Parallel`, whose
    layers stand side by side, each argument is one layer: a list is a `Serial` of its layers, and
    None or an empty list is ``Serial()``, which passes one value on as it is.
    """

    layers: tuple[Layer, ...] = ()

    def __init__(self, *layers: Any, name: str | None = None):
        self._hold(layers=layers, name=name)

    def _hold(self, layers: Any, **values: Any) -> None:
        _set(self, 'layers', self._arranged(layers))
        for field, value in values.items():
            _set(self, field, value)
        self.__post_init__()

    def _arranged(self, layers: Any) -> tuple[Layer, ...]:
        """The layers, of the constructor's arguments."""
        return tuple(_flatten(type(self).__name__, layers))

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        unknown = sorted(changes.keys() - values.keys())
        if unknown:
            raise TypeError(
                f'{type(self).__name__} has no field {unknown[0]!r}: there are {", ".join(values)}'
            )
        values |= changes
        made = object.__new__(type(self))
        for field, value in values.items():
            _set(made, field, value)
        made.__post_init__()
        return made

    def __repr__(self) -> str:
        parts = [_show(layer) for layer in self.layers]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != 'layers' and value != field.default:
                parts.append(f'{field.name}={_show(value)}')
        return _call_text(type(self).__name__, parts)


class Serial(Variadic, init=False):
    """Layers one after the other on a data stack.

    Each layer takes its `n_in` values off the top of the stack and puts its `n_out` back::

        for layer in layers:
            stack = layer(stack[:layer.n_in]) + stack[layer.n_in:]

    so what a layer does not take lies there for a later one. `n_in` is the number of values that
    the whole needs, `n_out` what it leaves of them. `Serial()` is the identity.

    >>> from layercomb import tl
    >>> net = tl.Serial(tl.Dense(4), tl.Add())   # Dense on the first of two, then their sum
    >>> net.n_in, net.n_out
    (2, 1)
    """

    @functools.cached_property
    def _arity(self) -> tuple[int, int]:
        return serial_arity(self.layers)

    n_in = property(lambda self: self._arity[0])
    n_out = property(lambda self: self._arity[1])

    def route(self, call: Call, stack: Stack) -> Stack:
        return serial_route(self.layers, call, stack)

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Handed to the last layer, whose outputs are the whole's."""
        return Pass(self, weights, state, rng, mode, state_cts).apply_and_grad(inputs, cts)


class _SideBySide(Variadic, init=False):
    """Layers side by side, where None is the identity and a list is a `Serial`."""

    def _arranged(self, layers: Any) -> tuple[Layer, ...]:
        owner = type(self).__name__
        return tuple(_one_layer(owner, layer) for layer in layers)


class Parallel(_SideBySide, init=False):
    """Layers side by side, each on values of its own: the first takes the top of the stack.

    None or an empty list is the identity, which takes one value; a list is a `Serial`.

    >>> from layercomb import tl
    >>> tl.Parallel(tl.Dense(4), tl.Add()).n_in
    3
    >>> tl.Parallel(None, [tl.Dense(4), tl.Relu()])
    Parallel(Serial(), Serial(Dense(4), Relu()))
    """

    n_in = property(lambda self: sum(layer.n_in for layer in self.layers))
    n_out = property(lambda self: sum(layer.n_out for layer in self.layers))

    def route(self, call: Call, stack: Stack) -> Stack:
        outputs: Stack = ()
        for i, layer in enumerate(self.layers):
            outputs += call(i, stack[: layer.n_in])
            stack = stack[layer.n_in :]
        return outputs + stack


class Branch(_SideBySide, init=False):
    """Layers side by side on the same values: each gets the top of the stack, none moves it.

    None or an empty list is the identity, which gives the top of the stack; a list is a `Serial`.

    >>> from layercomb import tl
    >>> net = tl.Branch(tl.Dense(4), tl.Dense(8))
    >>> net.n_in, net.n_out
    (1, 2)
    """

    n_in = property(lambda self: max((layer.n_in for layer in self.layers), default=0))
    n_out = property(lambda self: sum(layer.n_out for layer in self.layers))

    def route(self, call: Call, stack: Stack) -> Stack:
        outputs: Stack = ()
        for i, layer in enumerate(self.layers):
            outputs += call(i, stack[: layer.n_in])
        return outputs + stack[self.n_in :]


class Add(Layer):
    """a + b in a's dtype, so that a float32 stream stays one whatever is added to it."""

    n_in = 2
    float32 = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Adds the second value to the first."""
        a, b = inputs
        if a.shape != b.shape:
            raise ValueError(
                f'Add: cannot add {tuple(b.shape)} to {tuple(a.shape)}: what is added to a stream '
                f'must keep its shape; end it with Dense({a.shape[-1] if a.shape else 1}), or '
                'project the stream by shortcut='
            )
        return (a + b.astype(a.dtype),), state


class Residual(Variadic, init=False):
    """x + f(x), where f is the layers in series.

    The layers may take more values than one; the first is what they are added to. The sum is made
    in the shortcut's dtype.

    Attributes:
      layers: f; its first output is added, further ones are put back beneath the sum.
      shortcut: a layer in x's way, e.g. a projection; f's output is added to its one output. A list
        is a `Serial` of its layers, and None or an empty list is the identity.

    Raises:
      ValueError: if the layers leave nothing to add, or the shortcut more values than one, or none.
    """

    shortcut: Layer | None = None
    add: Layer = Add()

    def __init__(self, *layers: Any, shortcut: Any = None, name: str | None = None):
        if isinstance(shortcut, (list, tuple)):
            shortcut = _one_layer('Residual', shortcut) if shortcut else None
        self._hold(layers=layers, shortcut=shortcut, add=Add(), name=name)

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.shortcut.n_out if self.shortcut else 1
        if n != 1:
            raise ValueError(
                f'Residual: its shortcut must leave the one value that is added to, it leaves {n}: '
                'end it with Add, Concatenate or Drop'
            )

    @functools.cached_property
    def _arity(self) -> tuple[int, int]:
        n_in, n_out = serial_arity(self.layers)
        if n_out < 1:
            raise ValueError('Residual: its layers leave nothing to add: n_out must be at least 1')
        return max(n_in, self.shortcut.n_in if self.shortcut else 1), n_out

    n_in = property(lambda self: self._arity[0])
    n_out = property(lambda self: self._arity[1])

    def route(self, call: Call, stack: Stack) -> Stack:
        n = len(self.layers)
        inner = stack[: serial_arity(self.layers)[0]]
        y, *more = serial_route(self.layers, call, inner)
        x = call(n, stack[: self.shortcut.n_in]) if self.shortcut else stack
        return call(n + bool(self.shortcut), (x[0], y)) + tuple(more) + stack[self.n_in :]

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Handed to the last layer: what it adds has the sum's cotangent."""
        if self.shortcut is not None or not isinstance(self.add, Add):
            return super().apply_and_grad(
                weights, state, inputs, cts, rng=rng, mode=mode, state_cts=state_cts
            )
        n = serial_arity(self.layers)[0]
        (y, *more), d_inputs, d_weights = Pass(
            self, weights, state, rng, mode, state_cts
        ).apply_and_grad(inputs[:n], cts)
        x = inputs[0]
        d_x, *d_beside = d_inputs or (None,)  # layers that make values of nothing have none
        y = x + y.astype(x.dtype)
        return (y, *more), (add_cts(d_x, cts[0]), *d_beside), d_weights


def _one_layer(owner: str, layer: Any) -> Layer:
    """One argument as one layer: a list as its `Serial`, None as the identity."""
    if layer is None or isinstance(layer, (list, tuple)):
        return Serial(*_flatten(owner, layer or ()))
    (layer,) = _flatten(owner, (layer,))
    return layer


def _flatten(owner: str, layers: Any) -> Iterator[Layer]:
    for layer in layers:
        if isinstance(layer, (list, tuple)):
            yield from _flatten(owner, layer)
        elif isinstance(layer, Layer):
            yield layer
        elif layer is not None:
            cure = (
                f'call it, {layer.__name__}(…)'
                if isinstance(layer, type)
                else 'wrap a function in Fn(label, f)'
            )
            raise TypeError(f'{owner} is made of layers, got {_show(layer)}: {cure}')
