"""Reversible layers: each computes its inputs from its outputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from layercomb.layers.combinators.residual import Add
from layercomb.layers.combinators.routing import Select, Swap
from layercomb.layers.combinators.serial import serial_arity, serial_route
from layercomb.layers.combinators.variadic import Variadic
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import call_text, named
from layercomb.layers.reversible.cotangents import Cotangents, add_cts
from layercomb.layers.reversible.series import Pass
from layercomb.trees import Tree


class Reversible(Layer, init=False):
    """A layer that computes its inputs from its outputs."""

    def reverse_and_grad(
        self,
        weights: Tree,
        state: Tree,
        outputs: Arrays,
        cts: Cotangents,
        *,
        rng: jax.Array | None,
        mode: Mode = Mode.REPLAY,
        state_cts: Tree | None = None,
    ) -> tuple[Arrays, Cotangents, Tree]:
        """Inputs and gradients in one pass, from the outputs and their cotangents.

        Args:
          weights: those of the forward pass.
          state: the one that the forward pass was given, with the decisions that it took.
          outputs: of the forward pass.
          cts: of the outputs, None for integers.
          rng: the key of the forward pass.
          mode: ``REPLAY``.
          state_cts: of the new state (its auxiliary losses), by path; what is absent is zero.

        Returns:
          Inputs, their cotangents, cotangents of weights: None for what is no float.
        """
        raise NotImplementedError(f'{type(self).__name__} has no reverse_and_grad')


class ReversibleHalfResidual(Variadic, Reversible, init=False):
    """(acc, x, *context) → (acc + f(x, *context), x, *context), where f is the layers in series.

    f may be anything that leaves one value: it may draw (dropout), hold state (BatchNorm), decide
    (LSH), and take context, such as masks or the states of an encoder. Backwards, acc is what is
    left when f(x, *context) is subtracted, and the same pass through f gives the gradients.

    Attributes:
      layers: f.

    Raises:
      ValueError: if f leaves more values than one, or none.

    >>> from layercomb import tl
    >>> tl.ReversibleHalfResidual(tl.LayerNorm(), tl.Dense()).n_in
    2
    """

    add: Add = Add()

    @functools.cached_property
    def _arity(self) -> int:
        return 1 + serial_arity(self.layers)[0]

    n_in = property(lambda self: self._arity)
    n_out = property(lambda self: self._arity)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.add, Add):
            raise TypeError(
                f'ReversibleHalfResidual: add={self.add!r} is not undone by subtracting: use Add()'
            )
        n_out = serial_arity(self.layers)[1]
        if n_out != 1:
            raise ValueError(
                'ReversibleHalfResidual: its layers must leave one value to add, they leave '
                f'{n_out}: end them with Add, Concatenate or Drop'
            )

    def route(self, call: Call, stack: Stack) -> Stack:
        """(acc, x, *context) → (acc + f(x, *context), x, *context)."""
        (y,) = serial_route(self.layers, call, stack[1 : self.n_in])
        return call(len(self.layers), (stack[0], y)) + stack[1:]

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Subtracts what f adds; the cotangent of the sum is that of f's output."""
        (acc, *xs), (d_acc, *d_xs) = outputs, cts
        (y,), d_inner, d_weights = Pass(self, weights, state, rng, mode, state_cts).run(
            tuple(xs), (d_acc,)
        )
        d_inputs = (d_acc, *map(add_cts, d_xs, d_inner))
        return (acc - y.astype(acc.dtype), *xs), d_inputs, d_weights


class ReversibleSelect(Select, Reversible):
    """A `Select` that can be undone: every value once, in another order.

    Attributes:
      indices: positions from the top of the stack, each of 0 … n − 1 once.

    Raises:
      ValueError: if a value is lost or repeated.

    >>> from layercomb import tl
    >>> tl.ReversibleSelect([2, 0, 1]).n_out
    3
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.indices)
        if sorted(self.indices) != list(range(n)) or n != self.n_in:
            raise ValueError(
                f'ReversibleSelect: {list(self.indices)} of {self.n_in} values lose or repeat a '
                'value, which cannot be undone: give each index once'
            )

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Puts values and cotangents back where they came from."""
        back = [self.indices.index(i) for i in range(len(self.indices))]
        return tuple(outputs[i] for i in back), tuple(cts[i] for i in back), {}

    def __repr__(self) -> str:
        return call_text('ReversibleSelect', [repr(list(self.indices)), *named(self)])


class ReversibleSwap(Swap, Reversible):
    """(a, b) → (b, a)."""

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Swaps back."""
        return (outputs[1], outputs[0]), (cts[1], cts[0]), {}


class ReversibleConcatenatePair(Reversible):
    """(a, b) → ([a, b], [a, b]): both streams become the two joined along the last axis.

    Widens two streams in the middle of a reversible stack; a and b must be of one shape.

    Raises:
      ValueError: when applied to values of two shapes.
    """

    position_wise = True
    n_in = 2
    n_out = 2
    float32 = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Joins the two values, twice."""
        a, b = inputs
        if a.shape != b.shape:
            raise ValueError(
                f'ReversibleConcatenatePair: {tuple(a.shape)} and {tuple(b.shape)} could not be '
                'told apart again: give two streams of one shape'
            )
        joined = jnp.concatenate((a, b.astype(a.dtype)), -1)  # (B, L, 2·D)
        return (joined, joined), state

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Cuts in half what was joined, and the sum of the cotangents."""
        ct = add_cts(*cts)
        cts = (None, None) if ct is None else tuple(jnp.split(ct, 2, -1))
        return tuple(jnp.split(outputs[0], 2, -1)), cts, {}
