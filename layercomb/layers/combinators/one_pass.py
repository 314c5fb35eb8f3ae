"""Layers in series: outputs and gradients in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from layercomb.layers.core.checks import check_inputs, check_outputs, where
from layercomb.layers.core.combinator import Stack
from layercomb.layers.core.cotangents import matched, vjp
from layercomb.layers.core.layer import fold
from layercomb.layers.core.mode import Mode
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One pass, forward and backward, through the layers in series of a combinator.

    Attributes:
      owner: the combinator, whose first sublayers are its `layers`.
      weights, state, rng, mode, state_cts: as of `Layer.apply_and_grad`, of the combinator.
    """

    owner: Any
    weights: Tree
    state: Tree
    rng: jax.Array | None
    mode: Mode
    state_cts: Tree | None

    def apply_and_grad(self, inputs: Stack, cts: Stack) -> tuple[Stack, Stack, Tree]:
        """Outputs, and cotangents of inputs and weights, from the cotangents of the outputs.

        The last layer knows them. Those before it are recorded by `vjp`, except those that compute
        again anyway. Diagonal layers at the end (dropout) take cotangents as they take values, so
        the one before them counts as the last.
        """
        layers, keys = self.owner.layers, self.owner.keys
        n = len(layers)
        while n and layers[n - 1].diagonal:
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
        """`Layer.apply_and_grad` of the i-th layer."""
        key, layer = self.owner.children[i]
        with where(self.owner, key, layer, inputs):
            check_inputs(layer, inputs)
            outputs, d_inputs, d_weights = layer.apply_and_grad(
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
        key, layer = self.owner.children[i]

        def run(weights: Tree, inputs: Stack) -> tuple[Stack, Tree]:
            state, rng = self.state.get(key, {}), fold(self.rng, i)
            with where(self.owner, key, layer, inputs):
                check_inputs(layer, inputs)
                outputs, new = layer.apply(weights, state, inputs, rng=rng, mode=self.mode)
                check_outputs(layer, outputs)
            return tuple(outputs), new

        weights = self.weights.get(key, {})
        if layer.recomputes:
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

    def _state_cts(self, key: str) -> Tree | None:
        return (self.state_cts or {}).get(key)
