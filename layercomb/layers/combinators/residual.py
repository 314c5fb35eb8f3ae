"""`Residual`: x + f(x), and the sum itself, `Add`."""

from __future__ import annotations

import functools
from typing import Any

from layercomb.layers.combinators.serial import serial_arity, serial_route
from layercomb.layers.combinators.side_by_side import one_layer
from layercomb.layers.combinators.variadic import Variadic
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.trees import Tree


class Add(Layer):
    """a + b in a's dtype, so that a float32 stream stays float32; both are of one shape.

    Raises:
      ValueError: when applied to values of two shapes.
    """

    position_wise = True
    n_in = 2
    float32 = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(a, b), both (…) → a + b, (…)."""
        a, b = inputs
        if a.shape != b.shape:
            raise ValueError(
                f'Add: cannot add {tuple(b.shape)} to {tuple(a.shape)}: what is added to a stream '
                f'must keep its shape; end it with Dense({a.shape[-1] if a.shape else 1}), or '
                'project the stream by shortcut='
            )
        return (a + b.astype(a.dtype),), state


class Residual(Variadic, init=False):
    """x + f(x), where f is the layers in series.

    If the layers take several values, x is the first. The sum has the dtype of x, or of the
    shortcut's output.

    Attributes:
      layers: f; its first output is added, further ones are put back beneath the sum.
      shortcut: a layer applied to x before the sum, e.g. a projection, with one output. A list is a
        `Serial` of its layers, and None or an empty list is the identity.

    Raises:
      ValueError: if the layers leave nothing to add, or the shortcut does not leave one value.
    """

    shortcut: Layer | None = None
    add: Layer = Add()

    def __init__(self, *layers: Any, shortcut: Any = None, name: str | None = None):
        if isinstance(shortcut, (list, tuple)):
            shortcut = one_layer('Residual', shortcut) if shortcut else None
        self._hold(layers=layers, shortcut=shortcut, add=Add(), name=name)

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.shortcut.n_out if self.shortcut else 1
        if n != 1:
            raise ValueError(
                f'Residual: its shortcut must leave the one value that is added to, it leaves {n}: '
                'end it with Add, Concatenate or Drop'
            )

    @functools.cached_property
    def _arity(self) -> tuple[int, int]:
        n_in, n_out = serial_arity(self.layers)
        if n_out < 1:
            raise ValueError('Residual: its layers leave nothing to add: n_out must be at least 1')
        return max(n_in, self.shortcut.n_in if self.shortcut else 1), n_out

    n_in = property(lambda self: self._arity[0])
    n_out = property(lambda self: self._arity[1])

    def route(self, call: Call, stack: Stack) -> Stack:
        """x, … → x + f(x, …), further outputs of f, and the values beneath."""
        n = len(self.layers)
        inner = stack[: serial_arity(self.layers)[0]]
        y, *more = serial_route(self.layers, call, inner)
        x = call(n, stack[: self.shortcut.n_in]) if self.shortcut else stack
        return call(n + bool(self.shortcut), (x[0], y)) + tuple(more) + stack[self.n_in :]
