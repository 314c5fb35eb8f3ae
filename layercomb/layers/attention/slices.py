"""Long sequences some positions at a time, so that no other array of a whole one need be made.

Arrays are (…, L, features), with the positions on the axis before the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.reversible.cotangents import vjp, zero_cts
from layercomb.trees import Tree

POSITIONS_TOGETHER = 4096  # enough to keep a product busy


def over_positions(step: Callable[[Any, Any, int], Any], carry: Any, length: int) -> Any:
    """Carries through ``step(carry, first, size)`` the positions of a sequence, some at a time."""
    n, rest = divmod(length, POSITIONS_TOGETHER)
    carry = tiles.loop(
        0, n, lambda i, carry: step(carry, i * POSITIONS_TOGETHER, POSITIONS_TOGETHER), carry
    )
    return step(carry, n * POSITIONS_TOGETHER, rest) if rest else carry


def positions(tree: Any, first: Any, size: int) -> Any:
    """Some positions of every (…, L, features)."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, x.ndim - 2), tree)


def add_at(tree: Any, slices: Any, first: Any) -> Any:
    """A tree of (…, L, features) with slices added at some positions, in place where it can be."""

    def add(x: jax.Array, some: jax.Array) -> jax.Array:
        axis = x.ndim - 2
        some = lax.dynamic_slice_in_dim(x, first, some.shape[axis], axis) + some
        return lax.dynamic_update_slice_in_dim(x, some, first, axis)

    return jax.tree.map(add, tree, slices)


def by_slice(
    f: Callable[[Tree, Any], Any], weights: Tree, values: Any, cts: Any, sums: Any, d_values: Any
) -> tuple[Any, Any, Tree]:
    """Adds up outputs and gradients of a position-wise function, some positions at a time.

    Args:
      f: from weights and a tree of (…, L, features) to another such tree.
      weights: its weights.
      values: its argument.
      cts: of what it gives.
      sums: what its outputs are added to, or None, where they are not wanted.
      d_values: what the cotangents of `values` are added to.

    Returns:
      The two sums, and the cotangents of the weights.
    """

    def step(carry: Any, first: Any, size: int) -> Any:
        sums, d_values, d_weights = carry
        made, pull = vjp(f, weights, positions(values, first, size))
        d, d_slice = pull(positions(cts, first, size))
        sums = None if sums is None else add_at(sums, made, first)
        return sums, add_at(d_values, d_slice, first), jax.tree.map(jnp.add, d_weights, d)

    length = jax.tree.leaves(values)[0].shape[-2]
    result: tuple[Any, Any, Tree] = over_positions(
        step, (sums, d_values, zero_cts(weights)), length
    )
    return result
