"""`Serial`: layers one after the other on a data stack."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from layercomb.layers.combinators.variadic import Variadic
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Layer


def serial_arity(layers: Iterable[Layer]) -> tuple[int, int]:
    """(n_in, n_out) of layers in series: how many values they need and how many they leave.

    >>> from layercomb import tl
    >>> serial_arity([tl.Dup(), tl.Dense(4), tl.Add()])
    (1, 1)
    """
    layers = tuple(layers)
    if not layers:
        return 1, 1
    height = needed = 0  # relative to the stack at the start
    for layer in layers:
        needed = max(needed, layer.n_in - height)
        height += layer.n_out - layer.n_in
    return needed, needed + height


def serial_route(layers: Iterable[Layer], call: Call, stack: Stack) -> Stack:
    """Sends a stack through layers in series.

    Args:
      layers: whose `n_in` says how many values each takes.
      call: ``call(i, values)`` applies the i-th layer, as in `Combinator.route`.
      stack: arrays or signatures, the top first.
    """
    for i, layer in enumerate(layers):
        stack = call(i, stack[: layer.n_in]) + stack[layer.n_in :]
    return stack


class Serial(Variadic, init=False):
    """Layers one after the other on a data stack.

    Each layer takes its `n_in` values off the top of the stack and puts its `n_out` back::

        for layer in layers:
            stack = layer(stack[:layer.n_in]) + stack[layer.n_in:]

    so values that a layer does not take remain for later ones. `n_in` is the number of values that
    all layers together need, `n_out` the number that they leave. `Serial()` is the identity.

    >>> from layercomb import tl
    >>> net = tl.Serial(tl.Dense(4), tl.Add())   # Dense on the first of two, then their sum
    >>> net.n_in, net.n_out
    (2, 1)
    """

    @functools.cached_property
    def _arity(self) -> tuple[int, int]:
        return serial_arity(self.layers)

    n_in = property(lambda self: self._arity[0])
    n_out = property(lambda self: self._arity[1])

    def route(self, call: Call, stack: Stack) -> Stack:
        """Sends the stack through the layers, the first to the last."""
        return serial_route(self.layers, call, stack)
