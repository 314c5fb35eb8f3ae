"""`apply_in_parts`: a model over prompts as several programs, of which equal blocks share one.

A program of all blocks takes time to compile, and megabytes, for each of them. With one program for
some blocks, a model of thirty is ready in half the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.seek import seek
from layercomb.layers.quantized.native import FEW
from layercomb.layers.reversible.stack import ReversibleSerial
from layercomb.shapes import Signature
from layercomb.supervised.decoding.compiling import compile_for
from layercomb.transforms.fusing.layer import Fused
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_MOST = 6  # blocks of a program


class Settled(NamedTuple):
    """What becomes of a state that has read prompts.

    Attributes:
      shapes: what it grows to, padded with zeros: a tree of what has a shape.
      lengths: (B,) int32, the positions at which rows stand then.
    """

    shapes: Tree
    lengths: jax.Array

    def part(self, shapes: Tree) -> tuple[tuple[tuple[int, ...], ...], jax.Array]:
        """The arguments of `_settle` for a part of the state."""
        return tuple(x.shape for x in jax.tree.leaves(shapes)), self.lengths


def _settle(state: Tree, shapes: tuple[tuple[int, ...], ...], lengths: jax.Array) -> Tree:
    leaves, structure = jax.tree.flatten(state)
    if len(leaves) != len(shapes):
        raise ValueError(
            f'in PREDICT, init of these layers makes a state of {len(shapes)} arrays, and apply '
            f'returns one of {len(leaves)}: return as many as there were'
        )
    grown = []
    for x, shape in zip(leaves, shapes, strict=True):
        widths = [(0, there - here) for here, there in zip(x.shape, shape, strict=True)]
        grown.append(jnp.pad(x, widths) if any(wide for _, wide in widths) else x)
    return seek(jax.tree.unflatten(structure, grown), lengths)


def apply_in_parts(
    net: Layer, weights: Tree, state: Tree, inputs: Arrays, settled: Settled
) -> tuple[Arrays, Tree]:
    """What ``net.apply`` computes in ``PREDICT``, by a program for each kind of block.

    A model whose blocks do not stand in a row at its top is applied by one program, and so are few
    positions, for which `Fused` has one call. Inside `jit` all of it becomes part of that program.

    Args:
      net: a model, unstacked.
      weights: its weights.
      state: of ``PREDICT``. It becomes the new one part by part, so that memory is free again.
      inputs: of the model.
      settled: what becomes of the state then.
    """
    row = _row(net) if max(x.size for x in inputs) > FEW else None
    if row is None:
        return _call(_whole(net), *settled.part(settled.shapes), weights, state, inputs)
    key = row.key
    around = {name: x for name, x in weights.items() if name != key}
    blocks = state.get(key, {})

    def beside(part: _Part, values: Arrays) -> Arrays:
        its, shapes = (
            {name: tree[name] for name in part.keys if name in tree}
            for tree in (state, settled.shapes)
        )
        outputs, new = _call(part.program, *settled.part(shapes), around, its, values[: part.n_in])
        state.update(new)
        return outputs + values[part.n_in :]

    values = beside(row.before, inputs)
    for group in row.groups:
        shapes, *its = (
            _numbered(tree.get(key, {}), group.keys) for tree in (settled.shapes, weights, state)
        )
        outputs, new = _call(group.program, *settled.part(shapes), *its, values[: group.n_in])
        del its
        values = outputs + values[group.n_in :]
        blocks.update((group.keys[int(i)], part) for i, part in new.items())
    if blocks:
        state[key] = blocks
    return beside(row.after, values), state


def _numbered(tree: Tree, keys: tuple[str, ...]) -> Tree:
    """What lies at some keys, at '0', '1' …, so that equal groups are equal."""
    return {str(i): tree[key] for i, key in enumerate(keys) if key in tree}


class _Part(NamedTuple):
    """Some layers, as a program of `_program`."""

    program: Any
    keys: tuple[str, ...]  # of its layers
    n_in: int


class _Row(NamedTuple):
    """A model whose blocks stand in a row."""

    before: _Part
    key: str  # of the blocks
    groups: list[_Part]  # of neighbours
    after: _Part


@functools.lru_cache(maxsize=32)
def _row(net: Layer) -> _Row | None:
    """The parts of a model; None if its blocks do not stand in a row."""
    found = _found(net)
    if found is None:
        return None
    serial, at = found
    stack: Any = _inside(serial.layers[at])
    size = _group_size(stack.sublayers)
    groups = []
    for first in range(0, len(stack.keys), size):
        blocks = enumerate(stack.sublayers[first : first + size])
        group = type(stack)(*(block.replace(name=str(i)) for i, block in blocks))
        groups.append(_Part(_whole(group), stack.keys[first : first + size], stack.n_in))
    named = _named(serial)
    return _Row(_part(net, named[:at]), serial.keys[at], groups, _part(net, named[at + 1 :]))


def _group_size(blocks: tuple[Layer, ...]) -> int:
    """How many neighbours make a program, so that all groups are equal if they can be.

    A call of some blocks costs little more than they do alone, and what they share, such as the
    sines of their positions, is computed once.
    """
    kinds = [block.replace(name=None) for block in blocks]
    sizes = (size for size in range(_MOST, 1, -1) if len(kinds) % size == 0)
    return next((size for size in sizes if kinds[size:] == kinds[:-size]), 1)


def _found(net: Layer) -> tuple[Serial, int] | None:
    """The layers of a model, and which of them is the row of its blocks."""
    *ties, serial = _in_ties(net)
    if type(serial) is not Serial:
        return None
    at = next((i for i, layer in enumerate(serial.layers) if _has_equal_blocks(layer)), None)
    if at is None:
        return None
    inside = f'{serial.keys[at]}/'
    if any(f'{end}/'.startswith(inside) for tie in ties for end in (tie.source, tie.target)):
        return None  # the weights of a block stand elsewhere, too
    return serial, at


def _in_ties(net: Layer) -> Iterator[Any]:
    """A model and, while it is tied, the one inside."""
    yield net
    while isinstance(net, Tied):
        net = net.layer
        yield net


def _named(serial: Serial) -> tuple[Layer, ...]:
    """Layers that keep their keys elsewhere."""
    return tuple(layer.replace(name=key) for key, layer in serial.children)


def with_equal_blocks_once(net: Layer) -> Layer:
    """A model whose `init` in ``PREDICT`` gives the same state, and traces equal blocks once.

    It gives no weights of the blocks. Two kinds of models stay as they are: those whose blocks do
    not stand in a row, and reversible ones, whose blocks get other inputs than the row.

    Args:
      net: a model, unstacked.
    """
    found = _found(net)
    if found is None or type(_inside(found[0].layers[found[1]])) is not Serial:
        return net
    serial, at = found
    layers = list(_named(serial))
    layers[at] = _EqualOnce(layers[at], name=serial.keys[at])
    changed: Layer = Serial(*layers, name=serial.name)
    for tie in [*_in_ties(net)][-2::-1]:
        changed = tie.replace(layer=changed)
    return changed


class _EqualOnce(Wrapper):
    """Blocks in a row, of which equal ones with equal inputs are initialised once, for a state."""

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        return self.init_with_outputs(signature, rng, mode)[1:]

    def init_with_outputs(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        stack: Any = _inside(self.layer)
        made: dict[Any, Any] = {}
        state: Tree = {}

        def call(i: int, values: Any) -> Any:
            key, block = stack.children[i]
            known = block.replace(name=None), values
            if known not in made:
                made[known] = block.init_with_outputs(values, rng, mode)
            outputs, _, its = made[known]
            if its:
                state[key] = its
            return outputs

        return stack.route(call, signature), {}, state


def _inside(layer: Layer) -> Layer:
    return layer.layer if isinstance(layer, Fused) else layer


def _has_equal_blocks(layer: Layer) -> bool:
    """Whether a layer is a row of blocks, each of as many inputs as outputs, and some are equal."""
    stack = _inside(layer)
    if type(stack) not in (Serial, ReversibleSerial):
        return False
    blocks = [block.replace(name=None) for block in stack.sublayers]
    alike = all(block.n_in == block.n_out == stack.n_in for block in blocks)
    return alike and len(set(blocks)) < len(blocks)


def _part(net: Layer, layers: tuple[Layer, ...]) -> _Part:
    """Neighbours in the row, whose weights may be tied to others."""
    part = Serial(*layers)

    def run(weights: Tree, state: Tree, values: Arrays) -> tuple[Arrays, Tree]:
        for tie in [*_in_ties(net)][:-1]:
            weights = tie.untied(weights)
        return part.apply(weights, state, values, mode=Mode.PREDICT)

    return _Part(_program(run), part.keys, part.n_in)


@functools.lru_cache(maxsize=64)
def _whole(layer: Layer) -> Any:
    """The program of a layer."""

    def run(weights: Tree, state: Tree, values: Arrays) -> tuple[Arrays, Tree]:
        return layer.apply(weights, state, values, mode=Mode.PREDICT)

    return _program(run)


def _program(run: Callable[[Tree, Tree, Arrays], tuple[Arrays, Tree]]) -> Any:
    """(shapes, lengths, weights, state, values) → (values, state), the new state settled."""

    @functools.partial(jax.jit, static_argnums=0)
    def program(
        shapes: Any, lengths: jax.Array, weights: Tree, state: Tree, values: Arrays
    ) -> tuple[Arrays, Tree]:
        outputs, new = run(weights, state, values)
        return outputs, _settle(new, shapes, lengths)

    return program


def _call(program: Any, *args: Any) -> Any:
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args[1:])):
        compile_for(program, *args)
    return program(*args)
