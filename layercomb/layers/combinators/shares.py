"""Auxiliary losses of a layer that works slice by slice: the slices' mean, weighted by shares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.facts.devices import over_rows
from layercomb.layers.state.counted import Counted
from layercomb.layers.state.parts import AuxLoss, own
from layercomb.trees import Tree


def how_many(found: Tree) -> Tree:
    """A tree from `take_counted`, each mask replaced by its number of True entries, float32 ().

    Where devices split a batch, the number is of all of them: so is what a layer averages over.
    """
    return jax.tree.map(lambda counted: over_rows(counted.sum(dtype=jnp.float32)), found)


def shares(piece: Tree, of_all: Tree) -> Tree:
    """A slice's share of the positions that count, float32 () in the place of each mask.

    The share is 0 if no position counts.

    Args:
      piece: a tree from `take_counted`, of the slice.
      of_all: `how_many` of the whole.
    """
    return jax.tree.map(lambda n, m: n / jnp.maximum(m, 1), how_many(piece), of_all)


def add_aux(state: Tree, new: Tree, share: float, by_layer: Tree | None = None) -> Tree:
    """`new`, with its auxiliary losses multiplied by `share` and added to those in `state`.

    Args:
      state: the sums so far; a loss that it lacks starts from 0.
      new: the state of the next slice.
      share: the slice's share of the positions, 0 … 1.
      by_layer: from `shares`; replaces `share` in layers that know which positions count.
    """
    out, by_layer = {}, by_layer or {}
    for key, value in new.items():
        if isinstance(value, AuxLoss):
            part = _scaled(value, _share(by_layer, share))
            out[key] = jax.tree.map(jnp.add, state[key], part) if key in state else part
        elif isinstance(value, dict):
            out[key] = add_aux(state.get(key, {}), value, share, by_layer.get(key))
        else:
            out[key] = value
    return out


def by_share(state_cts: Tree | None, share: float, by_layer: Tree) -> Tree | None:
    """Cotangents of a slice's auxiliary losses: the whole's times its share, as in `add_aux`."""
    if state_cts is None:
        return None
    return {
        key: _scaled(value, _share(by_layer, share))
        if not isinstance(value, dict)
        else by_share(value, share, by_layer.get(key, {}))
        for key, value in state_cts.items()
    }


def passes_on(state: Tree) -> bool:
    """Whether a state holds anything but auxiliary losses: slices then depend on earlier ones."""
    return any(
        passes_on(value) if isinstance(value, dict) else not isinstance(value, AuxLoss)
        for value in state.values()
    )


def _share(by_layer: Tree, share: Any) -> Any:
    """A layer's own share in `by_layer`, or else `share`."""
    its_own = own(by_layer, Counted)
    return share if its_own is None else its_own.mask


def _scaled(tree: Any, share: float | jax.Array) -> Any:
    """A tree times a number, each array in its own dtype; times 0.0, NaN is 0 too."""

    def one(x: jax.Array) -> jax.Array:
        if isinstance(share, float) and not share:
            return jnp.zeros_like(x)
        return x * (share.astype(x.dtype) if isinstance(share, jax.Array) else share)

    return jax.tree.map(one, tree)
