"""What a layer declares about itself, as the checks ask for it: a function for each."""

from __future__ import annotations

from typing import Any

import jax

from layercomb.layers.core.cotangents import Cotangents
from layercomb.layers.core.decisions import take_decisions
from layercomb.layers.core.layer import RESERVED, Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.trees import Tree


def says_position_wise(layer: Layer) -> bool:
    """Whether a layer, with all its sublayers, says that it may be cut along the positions."""
    return not layer.mixes_positions and all(map(says_position_wise, layer.sublayers))


def weight_axes(layer: Layer) -> dict[str, str]:
    """The axes of a layer's weights, in letters, by path."""
    return layer.matrices


def has_own_one_pass(layer: Layer) -> bool:
    """Whether outputs and gradients in one pass are the layer's own, and not `vjp` of `apply`."""
    return type(layer).apply_and_grad is not Layer.apply_and_grad


def one_pass(
    layer: Layer, weights: Tree, state: Tree, inputs: Arrays, cts: Cotangents, rng: Any
) -> tuple[Arrays, Cotangents, Tree]:
    """Outputs, gradients of inputs, and gradients of weights, in training."""
    return layer.apply_and_grad(weights, state, inputs, cts, rng=rng, mode=Mode.TRAIN)


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


def reserved_keys() -> tuple[str, ...]:
    """Keys that no weight may have."""
    return RESERVED
