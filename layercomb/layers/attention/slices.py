"""Long sequences a slice of positions at a time, so that temporaries stay small.

Arrays are (…, L, features): the axis of positions is the one before the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.reversible.cotangents import add_wanted, vjp, zero_cts
from layercomb.trees import Tree

POSITIONS_TOGETHER = 4096  # positions in a slice: enough for an efficient product


def over_positions(step: Callable[[Any, Any, int], Any], carry: Any, length: int) -> Any:
    """Carries a value through ``step`` for each slice of a sequence.

    Args:
      step: ``step(carry, first, size)`` → the next carry; `first` is the slice's first position,
        int32 or int, and `size` its length, an int.
      carry: the first carry, a tree of arrays.
      length: L.

    Returns:
      The last carry.
    """
    n, rest = divmod(length, POSITIONS_TOGETHER)
    carry = tiles.loop(
        0, n, lambda i, carry: step(carry, i * POSITIONS_TOGETHER, POSITIONS_TOGETHER), carry
    )
    return step(carry, n * POSITIONS_TOGETHER, rest) if rest else carry


def positions(tree: Any, first: Any, size: int) -> Any:
    """Positions first … first + size − 1 of each array.

    Args:
      tree: arrays (…, L, features).
      first: int32 ().
      size: how many positions.

    Returns:
      The same tree of (…, size, features).
    """
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, x.ndim - 2), tree)


def add_at(tree: Any, slices: Any, first: Any) -> Any:
    """Adds slices to a tree of arrays, from a position on; in place where XLA can.

    Args:
      tree: arrays (…, L, features).
      slices: the same tree of (…, size, features).
      first: the first position, int32 ().

    Returns:
      The tree of (…, L, features).
    """

    def add(x: jax.Array, some: jax.Array) -> jax.Array:
        axis = x.ndim - 2
        some = lax.dynamic_slice_in_dim(x, first, some.shape[axis], axis) + some
        return lax.dynamic_update_slice_in_dim(x, some, first, axis)

    return jax.tree.map(add, tree, slices)


def by_slice(
    f: Callable[[Tree, Any], Any], weights: Tree, values: Any, cts: Any, sums: Any, d_values: Any
) -> tuple[Any, Any, Tree]:
    """Adds up outputs and gradients of a position-wise function, a slice of positions at a time.

    Args:
      f: ``f(weights, values)`` → a tree of (…, L, features).
      weights: of f.
      values: a tree of (…, L, features).
      cts: cotangents of the outputs of f.
      sums: arrays to which the outputs are added; None if outputs are not wanted.
      d_values: arrays to which the cotangents of `values` are added.

    Returns:
      `sums` and `d_values` after the additions, and the cotangents of the weights.
    """

    def step(carry: Any, first: Any, size: int) -> Any:
        sums, d_values, d_weights = carry
        made, pull = vjp(f, weights, positions(values, first, size))
        d, d_slice = pull(positions(cts, first, size))
        sums = None if sums is None else add_at(sums, made, first)
        return sums, add_at(d_values, d_slice, first), add_wanted(d_weights, d)

    length = jax.tree.leaves(values)[0].shape[-2]
    result: tuple[Any, Any, Tree] = over_positions(
        step, (sums, d_values, zero_cts(weights)), length
    )
    return result
