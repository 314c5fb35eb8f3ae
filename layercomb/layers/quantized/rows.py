"""Rows of an array, taken and written at indices that are in bounds."""

from __future__ import annotations

from typing import Any

import jax

# Indices are never negative either: to say so spares a comparison for each entry moved.
IN_BOUNDS: dict[str, Any] = {'mode': 'promise_in_bounds', 'wrap_negative_indices': False}


def rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """x[at]: (N, …), integers (…) → (…, …)."""
    return x.at[at].get(**IN_BOUNDS)


def put(x: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """x with `values` at indices, each of which is there once."""
    return x.at[at].set(values, unique_indices=True, **IN_BOUNDS)


def add(x: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """x with `values` added at indices, which may repeat."""
    return x.at[at].add(values, **IN_BOUNDS)
