"""`Wrapper`: a layer around one other, which adds no level to the paths of weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from layercomb.layers.core.checks import check_sublayers
from layercomb.layers.core.layer import Layer, is_layers
from layercomb.layers.core.mode import Mode
from layercomb.shapes import Signature
from layercomb.trees import Tree


class Wrapper(Layer):
    """A layer around one other, which adds no level to the paths of the weights.

    Other fields may hold layers too, or tuples of them; they stand beside the one that is wrapped,
    under the field's name, with ``_0``, ``_1`` … for those of a tuple.
    What a subclass computes is its own, so it says whether it is `position_wise`: one that passes
    positions on as they are writes ``position_wise = property(lambda self:
    self.layer.position_wise)``.
    """

    layer: Layer

    # How many axes it puts before those of each weight of the layer inside: 1 in `Repeat`.
    stacked_axes = 0

    n_in = property(lambda self: self.layer.n_in)
    n_out = property(lambda self: self.layer.n_out)

    @property
    def children(self) -> tuple[tuple[str, Layer], ...]:
        """The layer inside, which adds no level, and layers in other fields by their names."""
        found: list[tuple[str, Layer]] = [('', self.layer)]
        for field, value in self._layers_beside():
            if isinstance(value, tuple):
                found += [(f'{field}_{i}', layer) for i, layer in enumerate(value)]
            else:
                found.append((field, value))
        return tuple(found)

    def with_sublayers(self: Any, sublayers: tuple[Layer, ...]) -> Any:
        """The same wrapper around another layer, and with others beside it."""
        check_sublayers(self, sublayers)
        layer, *rest = sublayers
        changes: dict[str, Any] = {'layer': layer}
        for field, value in self._layers_beside():
            n = len(value) if isinstance(value, tuple) else 1
            changes[field] = tuple(rest[:n]) if isinstance(value, tuple) else rest[0]
            rest = rest[n:]
        return self.replace(**changes)

    def _layers_beside(self) -> Iterator[tuple[str, Any]]:
        """The fields that hold other layers than the one inside."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != 'layer' and is_layers(value):
                yield field.name, value

    def inner_signature(self, signature: Signature) -> Signature:
        """The signature of what the inner layer is given, first if it is applied several times."""
        return signature

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The inner layer's weights and state."""
        return self.layer.init(signature, rng, mode)


def wrapped(layer: Layer) -> Iterator[Layer]:
    """A layer, what it is around if it is a wrapper, and so on to one that is none."""
    yield layer
    while isinstance(layer, Wrapper):
        layer = layer.layer
        yield layer


def unwrapped(layer: Layer) -> Layer:
    """The layer that wrappers, such as those of `cast`, are around."""
    *_, inside = wrapped(layer)
    return inside


def snake_case(name: str) -> str:
    """A class's name as a key.

    >>> snake_case('LSHSelfAttention'), snake_case('LayerNorm'), snake_case('Conv1D')
    ('lsh_self_attention', 'layer_norm', 'conv1d')
    """
    return re.sub(
        r'(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[0-9])(?=[A-Z][a-z])', '_', name
    ).lower()


def given_name(layer: Layer) -> str | None:
    """The name a person gave to a layer, or to the layer that a wrapper is around."""
    return next((each.name for each in wrapped(layer) if each.name is not None), None)


def default_name(layer: Layer) -> str:
    """The key of a layer without a name: its class's, through wrappers, in snake_case."""
    return snake_case(unwrapped(layer)._class_name)
