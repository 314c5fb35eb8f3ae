"""Layers that run backwards: training keeps no activations, its memory does not grow with depth.

A reversible layer computes its inputs from its outputs. `ReversibleSerial` and `ReversibleRepeat`
carry a `jax.custom_vjp`, so that everything outside of them (optax, jit, sharding) sees an ordinary
differentiable function::

    forward    in RECORD; kept are outputs, weights, the key, the incoming state and the decisions
               that a rounding error could flip (LSH buckets, chosen units)
    backward   from the last layer to the first, in REPLAY; each gives its inputs and the gradients
               in one pass

Only TRAIN opens the `custom_vjp`; RECORD and REPLAY run plainly, so that reversible layers nest.

References:
    The Reversible Residual Network (Gomez et al. 2017), https://arxiv.org/abs/1707.04585
    Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.assert_shape import AssertShape
from layercomb.layers.base import Arrays, Layer, Mode, Tree, _call_text, _named, fold
from layercomb.layers.combinators import Add, Serial, Variadic
from layercomb.layers.control import Repeat
from layercomb.layers.cotangents import Cotangents, add_cts, zero_cts
from layercomb.layers.counted import put_counted, take_counted
from layercomb.layers.decisions import put_decisions, take_decisions
from layercomb.layers.routing import Select, Swap
from layercomb.layers.series import Pass, serial_arity, serial_route
from layercomb.shapes import Signature, is_float


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

    def route(self, call, stack):
        (y,) = serial_route(self.layers, call, stack[1 : self.n_in])
        return call(len(self.layers), (stack[0], y)) + stack[1:]

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Subtracts what f adds; the cotangent of the sum is that of f's output."""
        (acc, *xs), (d_acc, *d_xs) = outputs, cts
        (y,), d_inner, d_weights = Pass(self, weights, state, rng, mode, state_cts).apply_and_grad(
            tuple(xs), (d_acc,)
        )
        d_xs = map(add_cts, d_xs, d_inner)
        return (acc - y.astype(acc.dtype), *xs), (d_acc, *d_xs), d_weights


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
        return _call_text('ReversibleSelect', [repr(list(self.indices)), *_named(self)])


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

    n_in = 2
    n_out = 2
    float32 = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
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


class ReversibleStack(Reversible, init=False):
    """What `ReversibleSerial` and `ReversibleRepeat` share: streams in float32, and the gradient.

    It stands before the class whose `apply` runs the layers plainly.
    """

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Runs the layers on streams of float32; in ``TRAIN`` nothing inside is kept."""
        if mode is Mode.TRAIN:
            return _reversible(self, weights, state, _widened(inputs), rng)
        return self.run(weights, state, inputs, rng, mode)

    # `Serial` would hand it to the last layer and keep what the others hold.
    apply_and_grad = Layer.apply_and_grad

    def run(
        self, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None, mode: Mode
    ) -> tuple[Arrays, Tree]:
        """The layers in order, as any other layers."""
        return super().apply(weights, state, _widened(inputs), rng=rng, mode=mode)

    def _build(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        return super()._build(_widened_signature(signature), rng, mode)


class ReversibleSerial(ReversibleStack, Serial, init=False):
    """Reversible layers one after the other, whose activations training does not keep.

    As `Serial` otherwise. Floating inputs become float32, for streams are restored by subtraction.
    For depth use `ReversibleRepeat`: over many layers in one program XLA reorders and merges work
    of both passes, and memory grows again, if slower than without reversal.

    Raises:
      TypeError: if a layer is not reversible.

    >>> from layercomb import tl
    >>> tl.ReversibleSerial(tl.ReversibleHalfResidual(tl.Dense()), tl.ReversibleSwap()).n_in
    2
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.layers:
            _check_reversible('ReversibleSerial', layer)

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Undoes the layers from the last to the first."""
        d_weights: Tree = {}
        values, cts = tuple(outputs), tuple(cts)
        for i, (key, layer) in reversed(list(enumerate(self._children))):
            n = layer.n_out
            inputs, d_inputs, d = layer.reverse_and_grad(
                weights.get(key, {}),
                state.get(key, {}),
                values[:n],
                cts[:n],
                rng=fold(rng, i),
                mode=mode,
                state_cts=(state_cts or {}).get(key),
            )
            values, cts = tuple(inputs) + values[n:], tuple(d_inputs) + cts[n:]
            if key in weights:
                d_weights[key] = d
        return values, cts, d_weights


class ReversibleRepeat(ReversibleStack, Repeat):
    """A reversible block n times in series, as one scan forward and one backward.

    As `Repeat` otherwise. The memory of training does not grow with `n`, but for the weights, their
    gradients, the state and the recorded decisions. Floating inputs become float32. Inside a
    `ReversibleHalfResidual` it runs plainly, and what it holds exists for one residual at a time.

    Attributes:
      layer: the block.
      n: how many times.
      shared: one set of weights for all.

    Raises:
      TypeError: if the block is not reversible.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_reversible('ReversibleRepeat', self.layer)

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """Undoes the blocks from the last to the first, in one scan."""
        block: Any = self.layer
        state, counted = take_counted(state)  # the same for all blocks

        def step(carry: Any, xs: Any) -> tuple[Any, Tree | None]:
            values, cts, total = carry
            its_weights, its_state, its_cts, i = xs
            inputs, d_inputs, d = block.reverse_and_grad(
                weights if self.shared else its_weights,
                put_counted(its_state, counted),
                values,
                cts,
                rng=fold(rng, i),
                mode=mode,
                state_cts=its_cts,
            )
            total, d = (jax.tree.map(jnp.add, total, d), None) if self.shared else (None, d)
            return (tuple(inputs), tuple(d_inputs), total), d

        total = zero_cts(weights) if self.shared else None
        scanned = None if self.shared else weights
        (inputs, d_inputs, total), d_weights = jax.lax.scan(
            step,
            (tuple(outputs), tuple(cts), total),
            (scanned, state, state_cts, jnp.arange(self.n, dtype=jnp.int32)),
            reverse=True,
        )
        return inputs, d_inputs, total if self.shared else d_weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(
    net: ReversibleStack, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None
) -> tuple[Arrays, Tree]:
    """`net` in ``TRAIN``; its gradient runs it backwards. `state` is taken as constant."""
    return net.run(weights, state, inputs, rng, Mode.TRAIN)


def _forward(
    net: ReversibleStack, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None
) -> tuple[Any, Any]:
    outputs, new = net.run(weights, state, inputs, rng, Mode.RECORD)
    new, found = take_decisions(new)
    return (outputs, new), (weights, state, found, outputs, rng)


def _backward(net: ReversibleStack, kept: Any, cts: Any) -> tuple[Any, ...]:
    weights, state, found, outputs, rng = kept
    cts, state_cts = jax.tree.map(_without_float0, cts)
    _, d_inputs, d_weights = net.reverse_and_grad(
        weights, put_decisions(state, found), outputs, cts, rng=rng, state_cts=state_cts
    )
    return d_weights, None, d_inputs, None


_reversible.defvjp(_forward, _backward)


def _without_float0(ct: Any) -> Any:
    return None if ct.dtype == jax.dtypes.float0 else ct


def _is_narrow(x: Any) -> bool:
    return is_float(x) and x.dtype.itemsize < 4


def _widened(values: Arrays) -> Arrays:
    """Streams in float32: what is narrower could not be restored by subtraction."""
    return tuple(x.astype(jnp.float32) if _is_narrow(x) else x for x in values)


def _widened_signature(signature: Signature) -> Signature:
    return tuple(
        jax.ShapeDtypeStruct(x.shape, jnp.float32) if _is_narrow(x) else x for x in signature
    )


def _check_reversible(owner: str, layer: Layer) -> None:
    if isinstance(layer, AssertShape):
        if not layer.changes_nothing:
            _check_reversible(owner, layer.layer)
    elif not isinstance(layer, Reversible):
        raise TypeError(
            f'{owner}: {type(layer).__name__} is not reversible: put it into a '
            'ReversibleHalfResidual, which adds what it computes to another stream'
        )
