"""Layers in series: outputs and gradients in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from layercomb.layers.combinators.residual import Add, Residual
from layercomb.layers.combinators.serial import Serial, serial_arity
from layercomb.layers.core.checks import check_inputs, check_outputs, where
from layercomb.layers.core.combinator import Stack
from layercomb.layers.core.layer import Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import add_cts, matched, vjp
from layercomb.layers.reversible.one_pass import is_diagonal, one_pass, recomputes
from layercomb.trees import Tree


@one_pass.register(Serial)
def _serial(layer, weights, state, inputs, cts, *, rng, mode, state_cts):
    """The cotangents go to the last layer, whose outputs are the whole's."""
    _check(layer, inputs, cts)
    return Pass(layer, weights, state, rng, mode, state_cts).run(inputs, cts)


@one_pass.register(Residual)
def _residual(layer, weights, state, inputs, cts, **given):
    """The sum's cotangent goes to the last layer too, which makes what is added."""
    if layer.shortcut is not None or type(layer.add) is not Add:
        return one_pass.default(layer, weights, state, inputs, cts, **given)
    _check(layer, inputs, cts)
    n = serial_arity(layer.layers)[0]
    (y, *more), d_inputs, d_weights = Pass(layer, weights, state, **given).run(inputs[:n], cts)
    x = inputs[0]
    d_x, *d_beside = d_inputs or (None,)  # layers that make values of nothing have none
    y = x + y.astype(x.dtype)
    return (y, *more), (add_cts(d_x, cts[0]), *d_beside), d_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One pass, forward and backward, through the layers in series of a combinator.

    Attributes:
      owner: the combinator, whose first sublayers are its `layers`.
      weights, state, rng, mode, state_cts: as of `one_pass`, of the combinator.
    """

    owner: Any
    weights: Tree
    state: Tree
    rng: jax.Array | None
    mode: Mode
    state_cts: Tree | None

    def run(self, inputs: Stack, cts: Stack) -> tuple[Stack, Stack, Tree]:
        """Outputs, and cotangents of inputs and weights, from the cotangents of the outputs.

        The last layer knows the cotangents of its outputs, so it goes in one pass. The layers
        before it are recorded by `vjp`, except those whose gradient computes them again anyway.
        Diagonal layers at the end (dropout) take cotangents as they take values, so the layer
        before them counts as the last.
        """
        layers, keys = self.owner.layers, self.owner.keys
        n = len(layers)
        while n and is_diagonal(layers[n - 1]):
            n -= 1
        cts = self._scaled(n, cts)
        if not n:
            return self._scaled(n, inputs), cts, {}
        stack, pulls = tuple(inputs), []
        for i, layer in enumerate(layers[: n - 1]):
            outputs, pull = self._recorded(i, stack[: layer.n_in])
            stack = outputs + stack[layer.n_in :]
            pulls.append(pull)
        last = layers[n - 1]
        outputs, d_values, d_last = self._in_one(n - 1, stack[: last.n_in], cts[: last.n_out])
        stack, d_stack = outputs + stack[last.n_in :], d_values + tuple(cts[last.n_out :])
        d_weights = {keys[n - 1]: d_last}
        for i, pull in reversed(list(enumerate(pulls))):
            n_out = layers[i].n_out
            d_values, d_weights[keys[i]] = pull(d_stack[:n_out])
            d_stack = d_values + d_stack[n_out:]
        return self._scaled(n, stack), d_stack, {key: d_weights[key] for key in self.weights}

    def _in_one(self, i: int, inputs: Stack, cts: Stack) -> tuple[Stack, Stack, Tree]:
        """`one_pass` of the i-th layer."""
        key, layer = self._child(i)
        with where(self.owner, key, layer, inputs):
            check_inputs(layer, inputs)
            outputs, d_inputs, d_weights = one_pass(
                layer,
                self.weights.get(key, {}),
                self.state.get(key, {}),
                inputs,
                tuple(cts),
                rng=fold(self.rng, i),
                mode=self.mode,
                state_cts=self._state_cts(key),
            )
        return tuple(outputs), tuple(d_inputs), d_weights

    def _recorded(self, i: int, inputs: Stack) -> tuple[Stack, Callable[[Stack], Any]]:
        """Outputs of the i-th layer, and what takes their cotangents back to inputs and weights."""
        key, layer = self._child(i)

        def run(weights: Tree, inputs: Stack) -> tuple[Stack, Tree]:
            state, rng = self.state.get(key, {}), fold(self.rng, i)
            with where(self.owner, key, layer, inputs):
                check_inputs(layer, inputs)
                outputs, new = layer.apply(weights, state, inputs, rng=rng, mode=self.mode)
                check_outputs(layer, outputs)
            return tuple(outputs), new

        weights = self.weights.get(key, {})
        if recomputes(layer):
            return run(weights, inputs)[0], lambda cts: self._in_one(i, inputs, cts)[1:]
        (outputs, new), pull = vjp(run, weights, inputs)

        def pullback(cts: Stack) -> tuple[Stack, Tree]:
            d_weights, d_inputs = pull((cts, matched(self._state_cts(key), new)))
            return d_inputs, d_weights

        return outputs, pullback

    def _scaled(self, first: int, stack: Stack) -> Stack:
        """The stack after the diagonal layers from `first` on; None stays None."""
        top, below = tuple(stack[:1]), tuple(stack[1:])
        for i, layer in enumerate(self.owner.layers[first:], first):
            if top[0] is not None:
                top, _ = layer.apply({}, {}, top, rng=fold(self.rng, i), mode=self.mode)
        return tuple(top) + below

    def _child(self, i: int) -> tuple[str, Layer]:
        """The key and the i-th layer."""
        return self.owner.keys[i], self.owner.layers[i]

    def _state_cts(self, key: str) -> Tree | None:
        return (self.state_cts or {}).get(key)


def _check(layer: Layer, inputs: Stack, cts: Stack) -> None:
    """Raises a TypeError unless there are as many inputs and cotangents as `layer` has values."""
    check_inputs(layer, inputs)
    if len(cts) != layer.n_out:
        raise TypeError(
            f'one_pass: {type(layer).__name__} has n_out={layer.n_out} and {len(cts)} cotangents '
            'were given: give one for each output, None where there is none'
        )
