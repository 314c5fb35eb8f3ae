"""Moves the rows of a decoding state to other positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.attention.lsh import rings
from layercomb.layers.core.layer import POSITION
from layercomb.layers.decoding.caches import BEFORE
from layercomb.trees import Tree


def set_positions(state: Tree, lengths: jax.Array) -> Tree:
    """A decoding state in which each row stands at a position of its own.

    Where something else was read `BEFORE` the inputs, what is inside stands as much further. Rings
    of buckets are filled anew, for they hold what came last, and now something else did.

    Args:
      state: any state of ``PREDICT``, of a whole model.
      lengths: (B,) int32.
    """
    out: dict[str, Any] = {}
    inside = lengths + state[BEFORE] if _holds(state, BEFORE) else lengths
    for key, value in state.items():
        if isinstance(value, dict):
            out[key] = set_positions(value, inside)
        else:
            out[key] = jnp.asarray(lengths, jnp.int32) if key == POSITION else value
    return rings.refill(out) if _holds(out, 'rings') else out


def _holds(state: Tree, key: str) -> bool:
    """Whether there is an array of that name, and not the state of a layer of that name."""
    return not isinstance(state.get(key, {}), dict)
