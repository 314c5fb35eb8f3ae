"""`Parallel` and `Branch`: layers side by side."""

from __future__ import annotations

from typing import Any

from layercomb.layers.combinators.serial import Serial
from layercomb.layers.combinators.variadic import Variadic, flattened
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Layer


class _SideBySide(Variadic, init=False):
    """Layers side by side, where None is the identity and a list is a `Serial`."""

    def _arranged(self, layers: Any) -> tuple[Layer, ...]:
        owner = type(self).__name__
        return tuple(one_layer(owner, layer) for layer in layers)


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
        """Gives each layer its own values; the outputs follow in the layers' order."""
        outputs: Stack = ()
        for i, layer in enumerate(self.layers):
            outputs += call(i, stack[: layer.n_in])
            stack = stack[layer.n_in :]
        return outputs + stack


class Branch(_SideBySide, init=False):
    """Layers side by side on the same values: each is given the top of the stack.

    None or an empty list is the identity, which returns the top of the stack; a list is a `Serial`.

    >>> from layercomb import tl
    >>> net = tl.Branch(tl.Dense(4), tl.Dense(8))
    >>> net.n_in, net.n_out
    (1, 2)
    """

    n_in = property(lambda self: max((layer.n_in for layer in self.layers), default=0))
    n_out = property(lambda self: sum(layer.n_out for layer in self.layers))

    def route(self, call: Call, stack: Stack) -> Stack:
        """Gives each layer the top of the stack; the outputs follow in the layers' order."""
        outputs: Stack = ()
        for i, layer in enumerate(self.layers):
            outputs += call(i, stack[: layer.n_in])
        return outputs + stack[self.n_in :]


def one_layer(owner: str, layer: Any) -> Layer:
    """One argument as one layer: a list as its `Serial`, None as the identity."""
    if layer is None or isinstance(layer, (list, tuple)):
        return Serial(*flattened(owner, layer or ()))
    (layer,) = flattened(owner, (layer,))
    return layer
