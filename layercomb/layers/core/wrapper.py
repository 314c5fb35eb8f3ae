"""`Wrapper`: a layer around one other, which adds no level to the paths of weights."""

from __future__ import annotations

import re
from typing import Any

from layercomb.layers.core.checks import (
    check_sublayers,
)
from layercomb.layers.core.layer import (
    Layer,
)
from layercomb.layers.core.mode import Mode
from layercomb.shapes import Signature


class Wrapper(Layer):
    """A layer around one other, which adds no level to the paths of the weights.

    What a subclass computes is its own, so it says whether it is `position_wise`: one that passes
    positions on as they are writes ``position_wise = property(lambda self:
    self.layer.position_wise)``.
    """

    layer: Layer

    n_in = property(lambda self: self.layer.n_in)
    n_out = property(lambda self: self.layer.n_out)

    @property
    def sublayers(self) -> tuple[Layer, ...]:
        """The one layer inside."""
        return (self.layer,)

    def with_sublayers(self: Any, sublayers: tuple[Layer, ...]) -> Any:
        """The same wrapper around another layer."""
        check_sublayers(self, sublayers)
        return self.replace(layer=sublayers[0])

    def inner_signature(self, signature: Signature) -> Signature:
        """The signature of what the inner layer is given, first if it is applied several times."""
        return signature

    def init(self, signature, rng, mode=Mode.TRAIN):
        """The inner layer's weights and state."""
        return self.layer.init(signature, rng, mode)


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
    if layer.name is None and isinstance(layer, Wrapper):
        return given_name(layer.layer)
    return layer.name


def default_name(layer: Layer) -> str:
    """The key of a layer without a name: its class's, through wrappers, in snake_case."""
    if isinstance(layer, Wrapper):
        return default_name(layer.layer)
    return snake_case(layer._class_name)
