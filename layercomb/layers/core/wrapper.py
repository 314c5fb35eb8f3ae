"""`Wrapper`: a layer around another, which adds no level to the paths of weights."""

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
    """A layer around another, which adds no level to the paths of the weights.

    Other fields may hold layers, or tuples of them. Their keys are the fields' names, with ``_0``,
    ``_1`` … for those of a tuple.
    A subclass declares `position_wise` itself. One that passes positions on unchanged writes
    ``position_wise = property(lambda self: self.layer.position_wise)``.

    Attributes:
      layer: the layer inside.
    """

    layer: Layer

    # How many axes it adds in front of those of each weight of the layer inside: 1 in `Repeat`.
    stacked_axes = 0

    n_in = property(lambda self: self.layer.n_in)
    n_out = property(lambda self: self.layer.n_out)

    @property
    def children(self) -> tuple[tuple[str, Layer], ...]:
        """(key, layer) of the layer inside, whose key is '', and of the layers in other fields."""
        found: list[tuple[str, Layer]] = [('', self.layer)]
        for field, value in self._layers_beside():
            if isinstance(value, tuple):
                found += [(f'{field}_{i}', layer) for i, layer in enumerate(value)]
            else:
                found.append((field, value))
        return tuple(found)

    def with_sublayers(self: Any, sublayers: tuple[Layer, ...]) -> Any:
        """The same wrapper around other layers.

        Args:
          sublayers: the layer inside, then those of the other fields, as many as there are now.

        Raises:
          ValueError: if there are fewer or more.
        """
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
        """The signature of the inner layer's inputs, the first time if it is applied several times.

        Args:
          signature: of the wrapper's inputs, a tuple.
        """
        return signature

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The inner layer's weights and state."""
        return self.layer.init(signature, rng, mode)


def wrapped(layer: Layer) -> Iterator[Layer]:
    """A layer and, while it is a wrapper, the layer inside, down to one that is no wrapper."""
    yield layer
    while isinstance(layer, Wrapper):
        layer = layer.layer
        yield layer


def unwrapped(layer: Layer) -> Layer:
    """The layer inside all wrappers, such as those of `cast`."""
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
    """The name given to a layer, or to a layer that it wraps; None if there is none."""
    return next((each.name for each in wrapped(layer) if each.name is not None), None)


def default_name(layer: Layer) -> str:
    """The key of a layer without a name: its class's name, wrappers left out, in snake_case."""
    return snake_case(unwrapped(layer)._class_name)
