"""Layers that run backwards: training keeps no activations, its memory does not grow with depth.

A reversible layer also computes its inputs from its outputs. `ReversibleSerial` and
`ReversibleRepeat` carry a `jax.custom_vjp`, so that all outside of them (optax, jit, the Loop) sees
an ordinary differentiable function::

    forward    in RECORD; kept are outputs, weights, the key, the incoming state, and the decisions
               that a rounding error could flip (LSH buckets, chosen units)
    backward   from the last layer to the first, each restores its inputs and their gradients in
               one pass, in REPLAY

References:
    Gomez et al. 2017, The Reversible Residual Network, https://arxiv.org/abs/1707.04585
    Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.base import Arrays, Layer, Mode, Tree, fold, put_decisions, take_decisions
from layercomb.layers.combinators import Add, Serial, Variadic, serial_arity, serial_route
from layercomb.layers.control import Repeat
from layercomb.shapes import Signature, is_float

# Inputs, their gradients, the weights' gradients; None where there is none, as for integers.
Reversed = tuple[Arrays, tuple[Any, ...], Tree]


class ReversibleHalfResidual(Variadic, init=False):
    """(a, x, *context) → (a + f(x, *context), x, *context), f being any layers in series.

    f may draw (dropout), hold state (BatchNorm), decide (LSH), and take further values, such as
    masks and the states of an encoder. The sum is made in float32. Backwards, one pass through f
    gives both what to subtract and the gradients.
    """

    add: Layer = Add()

    def __init__(self, *layers: Any, name: str | None = None):
        self._hold(layers=layers, add=Add(), name=name)

    @functools.cached_property
    def _arity(self) -> int:
        n_in, n_out = serial_arity(self.layers)
        if n_out != 1:
            raise ValueError(
                'ReversibleHalfResidual: its layers must leave one value to add, they leave '
                f'{n_out}: end them with Select or Drop'
            )
        return 1 + n_in

    n_in = property(lambda self: self._arity)
    n_out = property(lambda self: self._arity)

    def route(self, call, stack):
        (y,) = serial_route(self.layers, call, stack[1 : self.n_in])
        return call(len(self.layers), (stack[0], y)) + stack[1:]

    def reverse_and_grad(
        self,
        weights: Tree,
        state: Tree,
        outputs: Arrays,
        cts: tuple[Any, ...],
        state_cts: Tree,
        *,
        rng: jax.Array | None,
        mode: Mode = Mode.REPLAY,
    ) -> Reversed:
        """Subtracts f(x, *context), computed again, and pulls the gradient of the sum through f."""
        total, *xs = outputs

        def f(weights: Tree, xs: Arrays) -> tuple[jax.Array, Tree]:
            made, new = self.apply(weights, state, (jnp.zeros_like(total), *xs), rng=rng, mode=mode)
            return made[0], take_decisions(new)[0]

        (y, _), pull = vjp(f, weights, tuple(xs))
        d_weights, d_xs = pull((cts[0], state_cts))
        d_xs = tuple(map(add_cts, cts[1:], d_xs))
        return (total - y, *xs), (cts[0], *d_xs), d_weights


class ReversibleSelect(Layer):
    """Puts values into another order: output i is input ``indices[i]``.

    Attributes:
      indices: each of 0 … n − 1 once.

    >>> from layercomb import tl
    >>> tl.ReversibleSelect((2, 0, 1)).n_out
    3
    """

    indices: tuple[int, ...]

    float32 = True
    n_in = property(lambda self: len(self.indices))
    n_out = property(lambda self: len(self.indices))

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.indices) != list(range(len(self.indices))):
            raise ValueError(
                f'ReversibleSelect: indices={self.indices} lose or repeat a value, which cannot be '
                f'undone: use each of 0 to {max(len(self.indices) - 1, 0)} once'
            )

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return tuple(inputs[i] for i in self.indices), state

    def reverse_and_grad(
        self,
        weights: Tree,
        state: Tree,
        outputs: Arrays,
        cts: tuple[Any, ...],
        state_cts: Tree,
        *,
        rng: jax.Array | None,
        mode: Mode = Mode.REPLAY,
    ) -> Reversed:
        """Puts values and gradients back."""
        back = [self.indices.index(i) for i in range(len(self.indices))]
        return tuple(outputs[i] for i in back), tuple(cts[i] for i in back), weights


def ReversibleSwap() -> ReversibleSelect:
    """(a, b) → (b, a)."""
    return ReversibleSelect((1, 0))


class ReversibleSerial(Serial, init=False):
    """Reversible layers in series; floating inputs become float32 streams.

    Only ``TRAIN`` keeps nothing inside; the other modes run as `Serial`, so reversible layers nest.

    Raises:
      TypeError: if a layer is not reversible.

    >>> from layercomb import tl
    >>> tl.ReversibleSerial(tl.ReversibleHalfResidual(tl.Dense()), tl.ReversibleSwap()).n_in
    2
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.layers:
            check_reversible(type(self).__name__, layer)

    def _build(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        return super()._build(wide_signature(signature), rng, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """As `Serial`, on float32 streams; in ``TRAIN`` with the reversible gradient."""
        if mode is Mode.TRAIN:
            return reversible_call(self, weights, state, wide(inputs), rng)
        return super().apply(weights, state, wide(inputs), rng=rng, mode=mode)

    def reverse_and_grad(
        self,
        weights: Tree,
        state: Tree,
        outputs: Arrays,
        cts: tuple[Any, ...],
        state_cts: Tree,
        *,
        rng: jax.Array | None,
        mode: Mode = Mode.REPLAY,
    ) -> Reversed:
        """Undoes the layers, the last one first."""
        d_weights: Tree = {}
        values, cts = tuple(outputs), tuple(cts)
        for i in reversed(range(len(self.layers))):
            key, layer = self._children[i]
            n = layer.n_out
            inputs, d_inputs, d = layer.reverse_and_grad(  # type: ignore[attr-defined]
                weights.get(key, {}),
                state.get(key, {}),
                values[:n],
                cts[:n],
                state_cts.get(key, {}),
                rng=fold(rng, i),
                mode=mode,
            )
            values, cts = inputs + values[n:], d_inputs + cts[n:]
            if key in weights:
                d_weights[key] = d
        return values, cts, d_weights


class ReversibleRepeat(Repeat):
    """A reversible block n times, as one scan forwards and one backwards.

    As `Repeat`, in every mode. Memory of training does not grow with `n`, but for weights,
    gradients, state and recorded decisions.

    Raises:
      TypeError: if the block is not reversible.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reversible('ReversibleRepeat', self.layer)

    def _build(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        return super()._build(wide_signature(signature), rng, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """As `Repeat`, on float32 streams; in ``TRAIN`` with the reversible gradient."""
        if mode is Mode.TRAIN:
            return reversible_call(self, weights, state, wide(inputs), rng)
        return super().apply(weights, state, wide(inputs), rng=rng, mode=mode)

    def reverse_and_grad(
        self,
        weights: Tree,
        state: Tree,
        outputs: Arrays,
        cts: tuple[Any, ...],
        state_cts: Tree,
        *,
        rng: jax.Array | None,
        mode: Mode = Mode.REPLAY,
    ) -> Reversed:
        """Undoes the blocks, the last one first, in one scan."""

        def step(carry: Any, xs: Any) -> tuple[Any, Tree]:
            values, cts, total = carry
            its_weights, its_state, its_cts, i = xs
            values, cts, d = self.layer.reverse_and_grad(  # type: ignore[attr-defined]
                weights if self.shared else its_weights,
                its_state,
                values,
                cts,
                its_cts,
                rng=fold(rng, i),
                mode=mode,
            )
            if self.shared:
                return (values, cts, jax.tree.map(jnp.add, total, d)), {}
            return (values, cts, total), d

        total = jax.tree.map(jnp.zeros_like, floats(weights)) if self.shared else {}
        xs = ({} if self.shared else weights, state, state_cts, jnp.arange(self.n))
        carry = tuple(outputs), tuple(cts), total
        (values, cts, total), stacked = jax.lax.scan(step, carry, xs, reverse=True)
        return values, cts, total if self.shared else stacked


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reversible_call(
    layer: Any, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None
) -> tuple[Arrays, Tree]:
    """`layer` in ``TRAIN``, keeping nothing of what is inside for the backward pass."""
    return _forward(layer, weights, state, inputs, rng)[0]


def _forward(layer: Any, weights: Tree, state: Tree, inputs: Arrays, rng: Any) -> Any:
    outputs, new = layer.apply(weights, state, inputs, rng=rng, mode=Mode.RECORD)
    new, found = take_decisions(new)
    return (outputs, new), (weights, state, found, outputs, rng)


def _backward(layer: Any, kept: Any, cts: Any) -> Any:
    weights, state, found, outputs, rng = kept
    d_outputs, state_cts = floats(cts[0], outputs), floats(cts[1])
    _, d_inputs, d_weights = layer.reverse_and_grad(
        weights, put_decisions(state, found), outputs, d_outputs, state_cts, rng=rng
    )
    return d_weights, None, d_inputs, None


reversible_call.defvjp(_forward, _backward)


def vjp(f: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`jax.vjp` of the floating leaves alone: integers have the gradient None, in and out.

    Their tangents, float0, could not pass through a scan.
    """
    leaves, tree = jax.tree.flatten(args)
    moving = [is_float(x) for x in leaves]
    structure: list[Any] = []

    def of_floats(values: list[Any]) -> tuple[list[Any], list[Any]]:
        rest = iter(values)
        filled = [next(rest) if m else x for m, x in zip(moving, leaves, strict=True)]
        made, out_tree = jax.tree.flatten(f(*tree.unflatten(filled)))
        structure.append(out_tree)
        made_floats = [x for x in made if is_float(x)]
        return made_floats, made

    values = [x for m, x in zip(moving, leaves, strict=True) if m]
    _, pull_floats, made = jax.vjp(of_floats, values, has_aux=True)

    def pull(cts: Any) -> Any:
        given = structure[-1].flatten_up_to(cts)
        wanted = [
            jnp.zeros(x.shape, x.dtype) if ct is None else ct.astype(x.dtype)
            for x, ct in zip(made, given, strict=True)
            if is_float(x)
        ]
        (found,) = pull_floats(wanted)
        rest = iter(found)
        return tree.unflatten([next(rest) if m else None for m in moving])

    return structure[-1].unflatten(made), pull


def floats(tree: Any, like: Any = None) -> Any:
    """`tree` with None for each leaf that is no float (in `like`, if given)."""
    return jax.tree.map(
        lambda x, y: x if is_float(y) else None, tree, tree if like is None else like
    )


def add_cts(a: Any, b: Any) -> Any:
    """The sum of two gradients, either of which may be None."""
    if a is None or b is None:
        return b if a is None else a
    return a + b.astype(a.dtype)


def wide(values: Arrays) -> Arrays:
    """Floating streams as float32."""
    return tuple(x.astype(jnp.float32) if is_float(x) else x for x in values)


def wide_signature(signature: Signature) -> Signature:
    """The signature of `wide`."""
    return tuple(
        jax.ShapeDtypeStruct(s.shape, jnp.float32) if is_float(s) else s for s in signature
    )


def check_reversible(owner: str, layer: Layer) -> None:
    """Raises a TypeError unless `layer` can be run backwards."""
    if not hasattr(layer, 'reverse_and_grad'):
        raise TypeError(
            f'{owner}: {type(layer).__name__} is not reversible: put it into a '
            'ReversibleHalfResidual'
        )
