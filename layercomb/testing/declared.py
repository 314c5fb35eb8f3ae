"""What a layer declares about itself, as the checks ask for it: a function for each."""

from __future__ import annotations

from typing import Any

import jax

from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import Cotangents
from layercomb.layers.reversible.one_pass import one_pass as rules
from layercomb.layers.state.decisions import take_decisions
from layercomb.trees import Tree


def says_position_wise(layer: Layer) -> bool:
    """Whether a layer says that it works on each position by itself."""
    return layer.position_wise is True


def weight_axes(layer: Layer) -> dict[str, str]:
    """The axes of a layer's weights, in letters, by path."""
    return layer.weight_axes


def has_own_one_pass(layer: Layer) -> bool:
    """Whether outputs and gradients in one pass are the layer's own, and not `vjp` of `apply`."""
    return rules.rule(type(layer)) is not rules.default


def one_pass(
    layer: Layer, weights: Tree, state: Tree, inputs: Arrays, cts: Cotangents, rng: Any
) -> tuple[Arrays, Cotangents, Tree]:
    """Outputs, gradients of inputs, and gradients of weights, in training."""
    return rules(layer, weights, state, inputs, cts, rng=rng, mode=Mode.TRAIN)


def kept_state(state: Tree) -> Tree:
    """A state without the decisions that ``RECORD`` leaves in it."""
    return take_decisions(state)[0]


def n_axes(letters: str) -> int:
    """How many axes the letters of a weight stand for."""
    return sum(map(str.isalpha, letters))


def is_entry(value: Any) -> bool:
    """Whether a leaf of a nested dict holds arrays under names: an array, or a typed entry."""
    arrays = all(hasattr(x, 'shape') and hasattr(x, 'dtype') for x in jax.tree.leaves(value))
    return arrays and not isinstance(value, (list, tuple)) and value is not None
