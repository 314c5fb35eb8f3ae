"""`Map`: one layer, with one set of weights, on each of several groups of values."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.combinators.shares import add_aux
from layercomb.layers.core.checks import check_inputs, check_outputs
from layercomb.layers.core.layer import Arrays, Key, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.layers.state.decisions import Decisions, put_decisions, take_decisions
from layercomb.layers.state.parts import Blocks, beside, own, refuse_blocks, without
from layercomb.shapes import Signature, describe
from layercomb.trees import Tree


class Map(Wrapper):
    """Applies one layer, with one set of weights, to each of `n` groups of values.

    ``n · layer.n_in`` values → ``n · layer.n_out`` values; all groups have the same shapes
    and dtypes.
    State (running statistics) is passed from group to group, and auxiliary losses are summed. In
    ``PREDICT`` each group has its own state.

    Attributes:
      layer: the layer.
      n: how many groups.

    Raises:
      TypeError: in `init`, if groups differ in shape or dtype.

    >>> from layercomb import tl
    >>> tl.Map(tl.Dense(4), 3).n_in
    3
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    n: Size = 1

    n_in = property(lambda self: self.n * self.layer.n_in)
    n_out = property(lambda self: self.n * self.layer.n_out)

    def inner_signature(self, signature: Signature) -> Signature:
        """The signature of the first group."""
        return self._groups(signature)[0]

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The layer's weights and state, from the signature of the first group.

        Raises:
          TypeError: if groups have different signatures.
        """
        groups = self._groups(signature)
        for group in groups[1:]:
            if describe(group) != describe(groups[0]):
                raise TypeError(
                    f'Map: one layer on values of one shape, got ({describe(groups[0])}) and '
                    f'({describe(group)})'
                )
        weights, state = self.layer.init(groups[0], rng, mode)
        if mode is Mode.PREDICT and state:
            state = Blocks({str(i): jax.tree.map(jnp.copy, state) for i in range(self.n)})
        return weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Applies the layer to each group; group `i` draws from `rng` folded with `i`."""
        check_inputs(self, inputs)
        apart = mode is Mode.PREDICT
        if not apart:
            refuse_blocks('Map', state, mode)
        kept = copy.copy(state)  # of the same type
        found = own(state, Decisions)
        state, counted = take_counted(without(state, Decisions))
        state = state if apart else add_aux({}, state, 0.0)
        outputs: Arrays = ()
        decisions: Tree = {}
        for i, group in enumerate(self._groups(inputs)):
            its_state = put_decisions(
                state.get(str(i), {}) if apart else state,
                {} if found is None else found.values.get(str(i), {}),
            )
            its_state = put_counted(its_state, counted)
            made, new = self.layer.apply(weights, its_state, group, rng=fold(rng, i), mode=mode)
            outputs += check_outputs(self.layer, made)
            new, its_decisions = take_decisions(take_counted(new)[0])
            if apart and new:
                kept[str(i)] = new
            if not apart:
                state = add_aux(state, new, 1.0)
            if its_decisions:
                decisions[str(i)] = its_decisions
        new_state = kept if apart else state
        if mode is Mode.RECORD and decisions:
            new_state = beside(new_state, Decisions(decisions))
        return outputs, new_state

    def block_weights(self, weights: Tree, i: int) -> Tree:
        """The weights of group `i`: those of all groups."""
        return weights

    def block_state(self, state: Tree, i: int) -> Tree:
        """The state of group `i`, of a state from training: that of all groups."""
        return state

    def _groups(self, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        k = self.layer.n_in
        return [values[i * k : (i + 1) * k] for i in range(self.n)]
