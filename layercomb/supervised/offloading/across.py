"""How a block is moved whose weights are cut: each device moves its part, or all the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from layercomb import trees
from layercomb.layers.core.layer import Layer
from layercomb.parallel.layout import Layout
from layercomb.parallel.specs import cut_along, is_spec, like_tree, like_weights
from layercomb.supervised.offloading import wire
from layercomb.supervised.offloading.dividing import Divided
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True)
class Across:
    """What devices do together when a block is moved.

    Attributes:
      layout: where arrays are.
      of_weights: a spec for each weight.
      of_state: a spec for each array of the optimizer's state, by name.
      by_parts: whether each device moves its own part. If not, parts are gathered first, and all
        devices compute the same.
    """

    layout: Layout
    of_weights: Tree
    of_state: Mapping[str, PartitionSpec]
    by_parts: bool

    def summed(self, grads: Tree) -> tuple[Tree, jax.Array]:
        """A block's gradients of all devices, and the sum of their squares.

        Args:
          grads: a device's own, summed over those along which they were gathered.
        """
        specs = like_tree(self.of_weights, grads)
        grads = self.layout.summed(grads, specs)

        def squares(spec: PartitionSpec, g: jax.Array) -> jax.Array:
            found = jnp.sum(jnp.square(g.astype(jnp.float32)))
            return found if self._at(spec) is None else jax.lax.psum(found, self.layout.cut)

        found = jax.tree.leaves(jax.tree.map(squares, specs, grads, is_leaf=is_spec))
        return grads, sum(found, jnp.float32(0))

    def moved(
        self,
        move: Callable[[Tree, dict[str, Any], Tree], tuple[Tree, dict[str, Any]]],
        grads: Tree,
        own: dict[str, Any],
        weights: Tree,
    ) -> tuple[Tree, dict[str, Any]]:
        """A block's new weights and state, each device's parts.

        Args:
          move: (gradients, state by name, weights) → (weights, state by name).
          grads: of `summed`.
          own: each device's parts of the state.
          weights: each device's parts.
        """
        if self.by_parts:
            return move(grads, own, weights)
        specs = like_tree(self.of_weights, weights)
        grads, weights = (_each(self._whole, specs, x) for x in (grads, weights))
        own = {name: self._whole(self.of_state[name], x) for name, x in own.items()}
        weights, own = move(grads, own, weights)
        own = {name: self._part(self.of_state[name], x) for name, x in own.items()}
        return _each(self._part, specs, weights), own

    def _whole(self, spec: PartitionSpec, x: jax.Array) -> jax.Array:
        at = self._at(spec)
        return x if at is None else jax.lax.all_gather(x, self.layout.cut, axis=at, tiled=True)

    def _part(self, spec: PartitionSpec, x: jax.Array) -> jax.Array:
        at = self._at(spec)
        if at is None:
            return x
        n = x.shape[at] // self.layout.n_cut
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.layout.cut) * n, n, at)

    def _at(self, spec: PartitionSpec) -> int | None:
        return cut_axis(self.layout, spec)


def across(layout: Layout, net: Layer, like: Tree, parts: Divided, by_parts: bool) -> Across:
    """What devices do together when blocks of a model are moved.

    Args:
      layout: where arrays are.
      net: the model.
      like: the weights that train.
      parts: of the optimizer's state.
      by_parts: whether the optimizer moves each number by itself.
    """
    of_weights = layout.by_rows(net, like)
    of_state = state_specs(layout, net, like, parts)
    alone = by_parts and all(
        cut_axis(layout, of_state[name]) is not None
        for path, spec in trees.flatten(of_weights).items()
        if spec is not None and cut_axis(layout, spec) is not None
        for name in parts.hosted
        if f'/{path}/' in f'/{name}/'
    )
    return Across(layout, of_weights, of_state, alone)


def state_specs(layout: Layout, net: Layer, like: Tree, parts: Divided) -> dict[str, PartitionSpec]:
    """A spec for each array of an optimizer's state, by name.

    Args:
      layout: where arrays are.
      net: the model.
      like: the weights that train.
      parts: of the state.
    """
    specs = trees.flatten(layout.by_rows(net, like))
    shapes = {p: x.shape for p, x in trees.flatten(like).items() if x is not None}
    tree = like_weights(
        {p: (specs[p], shape) for p, shape in shapes.items()}, parts.whole.state(parts.abstract)
    )
    found = zip(parts.whole.names, jax.tree.leaves(tree, is_leaf=is_spec), strict=True)
    return {
        name: spec if _is_sent_so(layout, spec, parts.abstract[name]) else PartitionSpec()
        for name, spec in found
    }


def _is_sent_so(layout: Layout, spec: PartitionSpec, x: Any) -> bool:
    """Whether the parts of an array travel as the whole does: as words, of integers."""
    at = cut_axis(layout, spec)
    if at is None or at != len(x.shape) - 1:
        return True
    part = (*x.shape[:-1], x.shape[-1] // layout.n_cut)
    return wire.is_packed(jax.ShapeDtypeStruct(part, x.dtype)) == wire.is_packed(x)


def _each(do: Any, specs: Tree, tree: Tree) -> Tree:
    return jax.tree.map(do, specs, tree, is_leaf=is_spec)


def cut_axis(layout: Layout, spec: PartitionSpec) -> int | None:
    """The axis along which an array is cut that `fsdp` and `sequence` cut; None if it is whole.

    Args:
      layout: where arrays are.
      spec: of the array.
    """
    return cut_along(spec, layout.cut) if layout.cut else None
