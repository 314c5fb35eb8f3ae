"""Combinators: layers made of layers, which only route values between them.

A combinator writes its arity and one method, `Combinator.route`. `init` calls it with signatures
and `apply` with arrays, so the two cannot differ. The base class names sublayers, gives them keys,
threads their state, and adds notes to errors.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from layercomb.layers.core.checks import check_inputs, check_outputs, check_sublayers, where
from layercomb.layers.core.layer import Arrays, Key, Layer, fold, is_layers
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import default_name, given_name
from layercomb.layers.facts.observing import tell
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.shapes import Signature
from layercomb.trees import Tree

Stack = tuple[Any, ...]
Call = Callable[[int, Stack], Stack]


class Combinator(Layer):
    """A layer that routes values through sublayers: its fields that are layers, or tuples of them.

    A field that is a layer gives its sublayer the field's name; a tuple's layers are named by
    their own `name`, or by class in snake_case, with ``_1``, ``_2`` where names collide.

    >>> from layercomb import tl
    >>> tl.Serial(tl.Dense(8), tl.Dense(8), tl.LayerNorm()).keys
    ('dense', 'dense_1', 'layer_norm')
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    @property
    def runs_short_inside(self) -> bool:
        """Whether the sublayer that lacks inputs reports it, not this layer."""
        return False

    def route(self, call: Call, stack: Stack) -> Stack:
        """Sends a stack of values (or of signatures) through the sublayers.

        Args:
          call: ``call(i, values)`` applies the i-th sublayer to a tuple of values and returns a
            tuple.
          stack: `n_in` values, arrays or signatures. Further values may lie beneath them: they are
            returned unchanged, after the outputs.

        Returns:
          A tuple: `n_out` values, then those from beneath.
        """
        raise NotImplementedError(f'{type(self).__name__} has no route')

    @functools.cached_property
    def children(self) -> tuple[tuple[str, Layer], ...]:
        """All sublayers, each as (key, layer), in the order of the fields that hold them."""
        return tuple(self._name_children())

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the sublayers, under which their weights and state lie."""
        return tuple(key for key, _ in self.children)

    def with_sublayers(self, sublayers: tuple[Layer, ...]) -> Any:
        """The same combinator around other sublayers.

        Args:
          sublayers: as many as there are now, in the order of `children`.

        Raises:
          ValueError: if there are fewer or more.
        """
        check_sublayers(self, sublayers)
        rest = iter(sublayers)
        changes: dict[str, Any] = {}
        for field, value in self._layer_fields():
            many = isinstance(value, tuple)
            changes[field] = tuple(next(rest) for _ in value) if many else next(rest)
        return self.replace(**changes)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights and state of all sublayers, each under its key.

        Sublayers draw from `rng` folded with a hash of their keys; those without weights
        or state have no entry.
        """
        _, weights, state = self.init_with_outputs(tuple(signature), rng, mode)
        return weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Routes `inputs` through the sublayers; sublayer `i` draws from `rng` folded with `i`.

        Returns:
          A tuple of `n_out` arrays, and the new state, each sublayer's under its key.
        """
        check_inputs(self, inputs)
        new_state = copy.copy(state)  # of the same type
        call = self._caller(weights, state, new_state, rng, mode)
        return self.route(call, tuple(inputs)), new_state

    def _caller(
        self, weights: Tree, state: Tree, new_state: Tree, rng: jax.Array | None, mode: Mode
    ) -> Call:
        """What `route` calls when arrays flow; it writes new states into `new_state`."""

        def call(i: int, values: Stack) -> Stack:
            key, layer = self.children[i]
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

    def init_with_outputs(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        """Outputs' signature, weights and state, by one `route` with signatures.

        Args:
          signature: of the inputs, a tuple.
          rng: a typed key.
          mode: see `Mode`.

        Raises:
          TypeError: if there are not `n_in` inputs or `n_out` outputs, or a sublayer
            refuses its inputs.
        """
        weights: Tree = {}
        state: Tree = {}

        def call(i: int, values: Stack) -> Stack:
            key, layer = self.children[i]
            with where(self, key, layer, values):
                seed = jax.random.fold_in(rng, zlib.crc32(key.encode()))
                outputs, its_weights, its_state = layer.init_with_outputs(values, seed, mode)
            if its_weights:
                weights[key] = its_weights
            if its_state:
                state[key] = its_state
            return outputs

        if len(signature) > self.n_in or not self.runs_short_inside:
            check_inputs(self, signature)
        outputs: Any = self.route(call, tuple(signature))
        check_inputs(self, signature)
        check_outputs(self, outputs)
        tell(self, signature, mode, (weights, state))
        return outputs, weights, state

    def _layer_fields(self) -> Iterator[tuple[str, Any]]:
        """The fields that hold a layer or a tuple of layers."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if is_layers(value):
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
        used = set(taken)
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
        self.children  # noqa: B018  names that clash are an error now, not at the first call
