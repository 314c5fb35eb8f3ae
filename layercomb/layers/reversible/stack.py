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

from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.constants import refuse_narrow
from layercomb.layers.reversible.cotangents import zero_cts
from layercomb.layers.reversible.layers import (
    Reversible,
)
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.shapes import Signature, is_float
from layercomb.trees import Tree


class ReversibleStack(Reversible, init=False):
    """What `ReversibleSerial` and `ReversibleRepeat` share: streams in float32, and the gradient.

    It stands before the class whose `apply` runs the layers plainly. Having an `apply` of its own,
    it goes by the default of `one_pass`; the rule of `Serial` would keep what the layers hold.
    """

    position_wise = property(of_sublayers)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Runs the layers on streams of float32; in ``TRAIN`` nothing inside is kept."""
        if mode is Mode.TRAIN:
            refuse_narrow(weights)
            return _reversible(self, weights, state, widened(inputs), rng)
        return self.run(weights, state, inputs, rng, mode)

    def run(
        self, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None, mode: Mode
    ) -> tuple[Arrays, Tree]:
        """The layers in order, as any other layers."""
        return super().apply(weights, state, widened(inputs), rng=rng, mode=mode)

    def init_with_outputs(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        """As of the layers in order, for streams in float32."""
        return super().init_with_outputs(_widened_signature(signature), rng, mode)


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
        children: Any = self.children
        for i, (key, layer) in reversed(list(enumerate(children))):
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


def widened(values: Arrays) -> Arrays:
    """Streams in float32: what is narrower could not be restored by subtraction.

    Args:
      values: inputs of reversible layers.
    """
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
