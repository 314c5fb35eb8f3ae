"""Stacks whose weights live in host memory: `swapped`, and how their blocks come to the device.

JAX's gradient of a `jax.custom_vjp` has one cotangent for each argument, of its shape and dtype.
The arguments of a stack are its weights and its optimizer's state, and what its backward pass
returns in the place of cotangents are the *new* weights and the *new* state::

    forward    block i's weights are copied to the device when the scan reaches it
    backward   from the last block to the first: weights and state of block i come to the device,
               its gradient is computed and applied at once, and both go back

So the device never holds more of these than one block has. The arrays are the carry of the scan,
and are written in place.

Weights may be in `halves`. Then blocks are computed, forwards and backwards, with the first ones,
and the second are sent for the update alone: a gradient moves the float32 number that both are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.constants import refuse_narrow
from layercomb.layers.reversible.cotangents import constant
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.layers.reversible.stack import ReversibleRepeat, widened
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.parallel import halves
from layercomb.shapes import Signature
from layercomb.transforms.segments import Segmented
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

# (gradient, state, shared, weights) → (weights, state, Σ gradient²), of one block; shared is the
# same for all.
Update = Callable[[Tree, Any, Any, Tree], tuple[Tree, Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Held:
    """What a stack trains with, which stands in the place of its weights.

    It is no pytree: a gradient is asked of the arrays in it, by whoever makes it.

    Attributes:
      weights: those that train, (n, …) in host memory; None in the places of others. Some may be in
        `halves`, and so may frozen ones.
      frozen: the others, likewise.
      moments: arrays in host memory, the optimizer's state; n divides the first axis of each, and
        each is a float: see `update`.
      squares: float32 (), 0. Its "cotangent" is the sum of the squares of the stack's gradients.
      shared: what the optimizer's updates of all blocks read.
      update: applies a block's gradient. It is given a block's slices of weights (1, …) and of
        moments.
    """

    weights: Tree
    frozen: Tree
    moments: Any
    squares: jax.Array
    shared: Any
    update: Update


class Swapped(Wrapper):
    """A stack of blocks, each of whose weights are on the device while it is computed alone.

    In training it is given a `Held`, and what its gradient returns for weights and moments is what
    they become. Blocks that are not reversible are computed again in the backward pass.

    Attributes:
      layer: the `Repeat` or `ReversibleRepeat`.
      host_inputs: whether the inputs of blocks that are not reversible are in host memory until the
        backward pass needs them.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    host_inputs: bool = False

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The stack's weights and state."""
        return self.layer.init(signature, rng, mode)

    def init_with_outputs(self, signature: Signature, rng: jax.Array, mode: Mode) -> Any:
        """As of the stack."""
        return self.layer.init_with_outputs(signature, rng, mode)

    def apply(
        self, weights: Any, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Runs the blocks in order; a block's weights come to the device when it is reached."""
        if isinstance(self.layer, ReversibleRepeat):
            inputs = widened(inputs)
        if not isinstance(weights, Held):
            outputs, new, _ = _forwards(self, weights, state, tuple(inputs), rng, mode)
            return outputs, new
        refuse_narrow(halves.others(trees.merge(weights.weights, weights.frozen)))
        frozen = weights.frozen, weights.shared
        trained = weights.weights, weights.moments, weights.squares
        return _trained(_Static(self, weights.update), trained, frozen, state, tuple(inputs), rng)

    @property
    def is_reversible(self) -> bool:
        """Whether blocks restore their inputs."""
        return isinstance(self.layer, ReversibleRepeat)


@dataclasses.dataclass(frozen=True)
class _Static:
    net: Swapped
    update: Update


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(
    static: _Static, trained: Any, frozen: Any, state: Tree, inputs: Arrays, rng: Any
) -> tuple[Arrays, Tree]:
    """The stack in ``TRAIN``; its gradient is the new `trained`. The rest is constant."""
    outputs, new, _ = _forwards(
        static.net, trees.merge(trained[0], frozen[0]), state, inputs, rng, Mode.TRAIN
    )
    return outputs, new


def _forward(
    static: _Static, trained: Any, frozen: Any, state: Tree, inputs: Arrays, rng: Any
) -> tuple[Any, Any]:
    reverses = static.net.is_reversible
    mode = Mode.RECORD if reverses else Mode.TRAIN
    whole = trees.merge(trained[0], frozen[0])
    outputs, new, kept = _forwards(static.net, whole, state, inputs, rng, mode, not reverses)
    new, found = take_decisions(new)
    values = outputs if reverses else kept
    return (outputs, new), (trained, frozen, put_decisions(state, found), values, rng)


def _backward(static: _Static, kept: Any, cts: Any) -> tuple[Any, ...]:
    trained, frozen, state, values, rng = kept
    cts, state_cts = jax.tree.map(_without_float0, cts)
    net: Any = static.net
    stack: Any = net.layer
    state, counted = take_counted(state)  # the same for all blocks
    outputs = values if net.is_reversible else ()
    inputs = None if net.is_reversible or net.host_inputs else values
    hosted = values if net.host_inputs and not net.is_reversible else None
    step = functools.partial(_undone, static, frozen, hosted, counted, rng)
    # The block is counted in the carry: XLA for GPUs has read slices of host memory forwards where
    # a scan that is reversed goes backwards (openxla/xla#46231).
    carry = trained, tuple(cts), outputs, jnp.int32(stack.n - 1)
    (trained, d_inputs, *_), _ = jax.lax.scan(
        step, carry, (state, state_cts, inputs), stack.n, reverse=True
    )
    return trained, None, None, d_inputs, None


_trained.defvjp(_forward, _backward)


def _forwards(
    net: Swapped, weights: Tree, state: Tree, inputs: Arrays, rng: Any, mode: Mode,
    keep: bool = False,
) -> tuple[Arrays, Tree, Any]:  # fmt: skip
    """Outputs, the new state, and the inputs of all blocks if they are to be kept."""
    stack: Any = net.layer
    read = _rounded if mode.is_training else _exact
    state, counted = take_counted(state)

    def step(values: Arrays, xs: Any) -> Any:
        its_state, i = xs
        made, new = stack.layer.apply(
            _without_stack(read(weights, stack.n, i)),
            put_counted(its_state, counted),
            values,
            rng=fold(rng, i),
            mode=mode,
        )
        stays = sent(values) if net.host_inputs else values
        return made, (take_counted(new)[0], stays if keep else None)

    numbers = jnp.arange(stack.n, dtype=jnp.int32)
    outputs, (new, kept) = jax.lax.scan(step, inputs, (state, numbers))
    return outputs, new, kept


def _undone(
    static: _Static, frozen: Any, hosted: Any, counted: Tree, rng: Any, carry: Any, xs: Any
) -> tuple[Any, None]:
    """One block backwards: its gradient is computed, and applied at once."""
    stack: Any = static.net.layer
    trained, cts, outputs, i = carry
    its_state, its_cts, inputs = xs
    given: dict[str, Any] = {'rng': fold(rng, i), 'state_cts': its_cts}
    its_state = put_counted(its_state, counted)

    def gradient(whole: Tree) -> tuple[Any, Tree]:
        if static.net.is_reversible:
            made, d_inputs, d = stack.layer.reverse_and_grad(
                whole, its_state, outputs, cts, mode=Mode.REPLAY, **given
            )
            return (tuple(made), tuple(d_inputs)), d
        values: Any = inputs if hosted is None else _without_stack(fetched(hosted, stack.n, i))
        _, d_inputs, d = one_pass(
            stack.layer, whole, its_state, values, cts, mode=Mode.TRAIN, **given
        )
        return (tuple(outputs), tuple(d_inputs)), d

    trained, (outputs, d_inputs) = moved(static.update, stack.n, trained, frozen, i, gradient)
    return (trained, d_inputs, outputs, i - 1), None


def moved(
    update: Update, n: int, trained: Any, frozen: Any, i: jax.Array,
    gradient: Callable[[Tree], tuple[Any, Tree]],
) -> tuple[Any, Any]:  # fmt: skip
    """One block's gradient, computed and applied at once.

    Args:
      update: as of `Held`.
      n: how many blocks there are.
      trained: weights, moments and squares, as of `Held`.
      frozen: frozen weights and what all blocks share, as of `Held`.
      i: int32 (), the block.
      gradient: from the block's weights to anything, and the cotangents of these weights.

    Returns:
      `trained` after the update, and what `gradient` gave beside cotangents.
    """
    frozen, shared = frozen
    weights, moments, squares = trained
    its, its_moments = fetched((weights, moments), n, i)
    its_frozen = _rounded(frozen, n, i)
    whole = _without_stack(trees.merge(halves.widened(halves.first(its), its), its_frozen))
    fixed = [w for w, f in zip(_leaves(whole), _leaves(its_frozen), strict=True) if f is not None]
    with constant(fixed):
        made, d = gradient(whole)
    exact = halves.joined(its)
    exact, its_moments, more = update(_like(exact, d), its_moments, shared, exact)
    its = halves.split(exact, halves.halved(its))
    weights, moments = _put_back((weights, moments), (its, its_moments), n, i)
    return (weights, moments, squares + more), made


def block(weights: Tree, n: int, i: jax.Array) -> Tree:
    """The weights of one block of a stack in host memory, on the device, as training computes.

    Args:
      weights: (n, …) each, in host memory.
      n: how many blocks there are.
      i: int32 (), the block.
    """
    return _without_stack(_rounded(weights, n, i))


def fetched(tree: Any, n: int, i: jax.Array) -> Any:
    """Block i's part of stacked arrays, brought to the device.

    Args:
      tree: arrays (n·k, …), of any memory.
      n: how many blocks there are.
      i: int32 (), the block.

    Returns:
      Arrays (k, …).
    """

    def one(x: jax.Array) -> jax.Array:
        k = x.shape[0] // n
        return jax.lax.dynamic_slice_in_dim(x, i * k, k)

    return _to_device(jax.tree.map(one, tree))


def _exact(weights: Tree, n: int, i: jax.Array) -> Tree:
    """Block i's weights, as they are."""
    return halves.joined(fetched(weights, n, i))


def _rounded(weights: Tree, n: int, i: jax.Array) -> Tree:
    """Block i's weights, of halves the first alone."""
    return halves.widened(fetched(halves.first(weights), n, i), weights)


def sent(tree: Any) -> Any:
    """Arrays in host memory, inside a compiled function."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def _to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def _put_back(tree: Any, parts: Any, n: int, i: jax.Array) -> Any:
    def one(x: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, i * (x.shape[0] // n), 0)

    return jax.tree.map(one, tree, sent(parts))


def _without_stack(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: x is None)


def _like(weights: Tree, cts: Tree) -> Tree:
    """Cotangents of one block's weights, of the shapes and dtypes of its stack of one."""
    found = trees.flatten(cts)

    def one(path: str, weight: Any) -> Any:
        if weight is None:
            return None
        ct = found.get(path)
        return jnp.zeros_like(weight) if ct is None else ct.astype(weight.dtype)[None]

    return trees.map_with_path(one, weights)


def _without_float0(ct: Any) -> Any:
    return None if ct.dtype == jax.dtypes.float0 else ct


def stacks(net: Layer) -> dict[str, int]:
    """The stacks that can be swapped: path -> how many blocks.

    They are `Repeat` and `ReversibleRepeat` with weights for each block, in series with the rest.
    A stack inside another layer, such as a residual or a reversible one, stays where it is.

    Args:
      net: any layer.
    """
    return {path: stack.n for path, stack in _found(net, '')}


def _found(net: Layer, path: str) -> Iterator[tuple[str, Repeat]]:
    if _is_stack(net):
        yield path, net  # type: ignore[misc]
    elif _is_entered(net):
        tied = (net.source, net.target) if isinstance(net, Tied) else ()
        shared = [joined(path, p) for p in tied]
        for key, child in net.children:
            for at, stack in _found(child, joined(path, key)):
                if not any(f'{p}/'.startswith(f'{at}/') for p in shared):
                    yield at, stack


def swapped(net: Layer, host_inputs: bool = False) -> Layer:
    """The model with each of its `stacks` in a `Swapped`. Paths stay.

    Args:
      net: any layer.
      host_inputs: as of `Swapped`.
    """
    return rewritten(net, functools.partial(Swapped, host_inputs=host_inputs))


def rewritten(net: Layer, make: Callable[[Any], Layer]) -> Layer:
    """The model with another layer in the place of each of its `stacks`. Paths stay.

    Args:
      net: any layer.
      make: what it is, from the stack.
    """
    found = stacks(net)

    def one(layer: Layer, path: str) -> Layer:
        if _is_stack(layer):
            return make(layer) if path in found else layer
        if not _is_entered(layer):
            return layer
        made = (one(child, joined(path, key)) for key, child in layer.children)
        return layer.with_sublayers(tuple(made))

    return one(net, '')


def _is_stack(net: Layer) -> bool:
    return type(net) in (Repeat, ReversibleRepeat) and not net.shared  # type: ignore[attr-defined]


def _is_entered(net: Layer) -> bool:
    """Whether what is inside is applied once, with weights that nobody looks at on the way."""
    return type(net) is Serial or isinstance(net, (Tied, Segmented))
