"""Rows of an array, read and written at indices known to be in bounds."""

from __future__ import annotations

from typing import Any

import jax

# Indices are never negative either; without this flag XLA compares each one with 0.
IN_BOUNDS: dict[str, Any] = {'mode': 'promise_in_bounds', 'wrap_negative_indices': False}


def rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """x[at].

    Args:
      x: (N, …).
      at: integers of any shape, from 0 to N − 1.

    Returns:
      The shape of `at`, then the axes of x after the first.
    """
    return x.at[at].get(**IN_BOUNDS)


def put(x: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """x with x[at] = values.

    Args:
      x: (N, …).
      at: integers of any shape, from 0 to N − 1, all different.
      values: as of x[at].
    """
    return x.at[at].set(values, unique_indices=True, **IN_BOUNDS)


def add(x: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """x with `values` added at the indices.

    Args:
      x: (N, …).
      at: integers of any shape, from 0 to N − 1; repeated ones add up.
      values: as of x[at].
    """
    return x.at[at].add(values, **IN_BOUNDS)
