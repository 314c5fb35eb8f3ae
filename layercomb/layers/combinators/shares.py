"""Auxiliary losses of a layer that works piece by piece: the pieces' mean, weighted by shares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.counted import COUNTED
from layercomb.layers.core.layer import AUX_LOSS
from layercomb.trees import Tree


def how_many(found: Tree) -> Tree:
    """How many positions count, float32 (), in place of each array that `take_counted` found."""
    return jax.tree.map(lambda counted: counted.sum(dtype=jnp.float32), found)


def shares(piece: Tree, of_all: Tree) -> Tree:
    """Which part of the positions that count is in a piece, in place of each array; 0 if none does.

    Args:
      piece: the piece of what `take_counted` found.
      of_all: `how_many` count in all pieces.
    """
    return jax.tree.map(lambda n, m: n / jnp.maximum(m, 1), how_many(piece), of_all)


def add_aux(state: Tree, new: Tree, share: float, by_layer: Tree | None = None) -> Tree:
    """`new`, with its auxiliary losses times `share` and added to those in `state`.

    `by_layer` has shares, under `COUNTED`, for layers that know which positions count.
    """
    out, by_layer = {}, by_layer or {}
    for key, value in new.items():
        if key == AUX_LOSS:
            part = _scaled(value, by_layer.get(COUNTED, share))
            out[key] = jax.tree.map(jnp.add, state[key], part) if key in state else part
        elif isinstance(value, dict):
            out[key] = add_aux(state.get(key, {}), value, share, by_layer.get(key))
        else:
            out[key] = value
    return out


def by_share(state_cts: Tree | None, share: float, by_layer: Tree) -> Tree | None:
    """Cotangents of auxiliary losses for a piece, each times its share, as in `add_aux`."""
    if state_cts is None:
        return None
    return {
        key: _scaled(value, by_layer.get(COUNTED, share))
        if key == AUX_LOSS or not isinstance(value, dict)
        else by_share(value, share, by_layer.get(key, {}))
        for key, value in state_cts.items()
    }


def passes_on(state: Tree) -> bool:
    """Whether a state holds more than auxiliary losses, which are only summed."""
    return any(
        key != AUX_LOSS and (not isinstance(value, dict) or passes_on(value))
        for key, value in state.items()
    )


def _scaled(tree: Any, share: float | jax.Array) -> Any:
    """A tree times a number, each array in its own dtype."""

    def one(x: jax.Array) -> jax.Array:
        return x * (share.astype(x.dtype) if isinstance(share, jax.Array) else share)

    return jax.tree.map(one, tree)
