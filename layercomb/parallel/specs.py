"""Which axis of the mesh cuts which axis of each weight: from the letters that layers declare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from layercomb import trees
from layercomb.layers.basic.activations import Activation
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import unwrapped
from layercomb.layers.facts.axes import Axes
from layercomb.layers.facts.sequence import SEQUENCE
from layercomb.shapes import nearest_divisor
from layercomb.transforms.weight_axes import axes
from layercomb.trees import Tree

# (letter, mesh axis), the most wanted first; a mesh axis cuts a weight once.
RULES = (
    ('H', 'tensor'),
    ('M', 'tensor'),
    ('F', 'tensor'),
    ('V', 'tensor'),
    ('D', 'fsdp'),
)

_CUT_ANYWHERE = ('fsdp',)  # mesh axes that cut the longest axis of a matrix without such a letter


def weight_specs(
    net: Layer,
    weights: Tree,
    sizes: Mapping[str, int],
    rules: tuple[tuple[str, str], ...] = RULES,
) -> Tree:
    """A `PartitionSpec` for each weight, from the letters of its axes.

    By default heads, hidden units, those of experts and the vocabulary (H, F, M, V) go to
    ``tensor``, and the width of the model (D) to ``fsdp``. A matrix without D, or one that no layer
    declares, is cut along its longest axis that ``fsdp`` divides. Of two `Dense` in series, as in a
    feed-forward, the second is cut along its input, so that what the first one gives stays where
    it is. Axes that `Repeat` stacks are never cut, and vectors are not cut by ``fsdp``.

    Args:
      net: the model.
      weights: its weights or a part of them, arrays or `jax.ShapeDtypeStruct`.
      sizes: how many devices each axis of the mesh has; axes of one device cut nothing.
      rules: (letter, mesh axis), the most wanted first. A letter may have several mesh axes.

    Returns:
      A tree like `weights`, of specs.

    Raises:
      ValueError: if a mesh axis does not divide an axis that a rule gives it, naming the weight
        and the nearest size that does.
    """
    of_weights = axes(net, weights)
    by_input = _read_by_parts(net)

    def one(path: str, leaf: Any) -> PartitionSpec:
        return _spec(path, leaf, of_weights[path], sizes, rules, path in by_input)

    return trees.map_with_path(one, weights)


def _spec(
    path: str,
    leaf: Any,
    its: Axes,
    sizes: Mapping[str, int],
    rules: tuple[tuple[str, str], ...],
    by_input: bool,
) -> PartitionSpec:
    cuts: list[str | None] = [None] * len(leaf.shape)
    letters = dict(enumerate(its.letters, its.stacked))
    if by_input:  # (F, D) although its letters are D->F
        letters = {i: {'D': 'F', 'F': 'D'}.get(letter, letter) for i, letter in letters.items()}
    for wanted, axis in rules:
        if sizes.get(axis, 1) == 1 or axis in cuts or (its.is_vector and axis in _CUT_ANYWHERE):
            continue
        found = [i for i, letter in letters.items() if letter == wanted and cuts[i] is None]
        if not found or (by_input and its.is_vector):
            continue
        at = found[0]
        if leaf.shape[at] % sizes[axis]:
            nearest = nearest_divisor(leaf.shape[at], sizes[axis])
            of_both = axis == 'fsdp' and sizes.get(SEQUENCE, 1) > 1
            name = f'fsdp × {SEQUENCE}' if of_both else axis
            raise ValueError(
                f'{path}: its axis {wanted} has {leaf.shape[at]} numbers, which {name} = '
                f'{sizes[axis]} does not divide: use {name} = {nearest}'
                if of_both
                else f'{path}: its axis {wanted} has {leaf.shape[at]} numbers, which {name}='
                f'{sizes[axis]} does not divide: use {name}={nearest}'
            )
        cuts[at] = axis
    for axis in _CUT_ANYWHERE:
        n = sizes.get(axis, 1)
        free = [i for i in letters if cuts[i] is None and leaf.shape[i] % n == 0]
        if n > 1 and axis not in cuts and not its.is_vector and free:
            cuts[max(free, key=lambda i: leaf.shape[i])] = axis
    return PartitionSpec(*cuts)


def _read_by_parts(net: Layer) -> set[str]:
    """The paths of weights of each `Dense` that follows another, elementwise layers between them.

    What the first one gives is cut along its units, and the second one sums over these.
    """
    found: set[str] = set()
    for path, layer in walk(net):
        cut = False
        for key, child in layer.children:
            inside = unwrapped(child)
            if isinstance(inside, GatedDense):
                cut = True
            elif isinstance(inside, Dense):
                if cut:
                    found |= {joined(joined(path, key), name) for name in ('kernel', 'bias')}
                cut = not cut
            elif not isinstance(inside, (Activation, Dropout)):
                cut = False
    return found


def renamed(spec: PartitionSpec, axis: str, others: tuple[str, ...]) -> PartitionSpec:
    """A spec in which other mesh axes together cut what one cut.

    Args:
      spec: of an array.
      axis: of the mesh.
      others: of the mesh, in its order.
    """
    whole = others if len(others) > 1 else others[0] if others else None
    return PartitionSpec(*(whole if name == axis else name for name in spec))


def cut_along(spec: PartitionSpec, axis: str | tuple[str, ...]) -> int | None:
    """The axis of an array that a mesh axis cuts, maybe with others; None if it cuts none.

    Args:
      spec: of the array.
      axis: of the mesh, or several that cut together.
    """
    wanted = _together(axis)
    return next((i for i, name in enumerate(spec) if wanted <= _together(name)), None)


def only(spec: PartitionSpec, kept: tuple[str, ...]) -> PartitionSpec:
    """A spec of some mesh axes alone.

    Args:
      spec: of an array.
      kept: the mesh axes that stay.
    """
    return PartitionSpec(*(name if _together(name) <= {*kept} else None for name in spec))


def _together(name: Any) -> set[str]:
    return set() if name is None else {name} if isinstance(name, str) else {*name}


def like_tree(specs: Tree, tree: Tree) -> Tree:
    """The specs of a part of the weights; None where the tree has None.

    Args:
      specs: of all weights.
      tree: a part of the weights, by the same paths.
    """
    flat = trees.flatten(specs)
    return trees.map_with_path(lambda path, _: flat[path], tree)


def is_spec(x: Any) -> bool:
    """Whether it is a leaf of a tree of specs."""
    return isinstance(x, PartitionSpec)


def like_weights(specs: Tree, tree: Any) -> Any:
    """Specs for an optimizer's state: an array like a weight is where the weight is.

    An array belongs to a weight if its path ends with the weight's, or with it and a field of a
    named tuple, as the bytes of `optimizers.narrow_state` do, and it has the same number of axes.
    An axis of another length, such as that of Adafactor's means, is not cut.

    Args:
      specs: of the weights, with the shape that each was made for: path -> (spec, shape).
      tree: arrays or `jax.ShapeDtypeStruct`.
    """
    flat: dict[str, tuple[PartitionSpec, tuple[int, ...]]] = specs
    longest_first = sorted(flat, key=len, reverse=True)

    def one(path: Any, leaf: Any) -> PartitionSpec:
        in_field = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
        whole = path[:-1] if in_field else path
        name = jax.tree_util.keystr(whole, simple=True, separator='/')
        its = next((p for p in longest_first if name == p or name.endswith(f'/{p}')), None)
        if its is None or len(flat[its][1]) != len(leaf.shape):
            return PartitionSpec()
        spec, shape = flat[its]
        same = zip(spec, shape, leaf.shape, strict=True)
        return PartitionSpec(*(name if n == m else None for name, n, m in same))

    return jax.tree_util.tree_map_with_path(one, tree)
