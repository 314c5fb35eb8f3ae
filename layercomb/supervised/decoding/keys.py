"""The random keys of samples: from a key or a seed, one for each row and step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import plain
from layercomb.model import seeded


def key(name: str, value: Any) -> jax.Array:
    """Makes a typed key.

    Args:
      name: what messages call the value.
      value: a typed key (), its numbers as ``jax.random.PRNGKey`` gives them, or an integer seed.

    Raises:
      ValueError: for anything else, such as several keys at once.
    """
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.shape == ():
            return value
        if value.dtype == jnp.uint32 and value.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
            return jax.random.wrap_key_data(value)
        if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f'{name} must be one key, such as jax.random.key(0), or a seed, got {value.dtype} '
                f'of shape {value.shape}'
            )
    return seeded(name, plain(value))


def row_keys(rng: jax.Array | int, n_rows: int) -> jax.Array:
    """The keys (B,) of rows: `rng`, a key or a seed, folded with the number of each row."""
    rows = jnp.arange(n_rows, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key('rng', rng), rows)


def fold_each(keys: jax.Array, step: Any) -> jax.Array:
    """The keys (B,) of a step.

    Args:
      keys: (B,), of rows.
      step: the number of the step, () or one for each row, (B,).
    """
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(step) else None))(keys, step)
