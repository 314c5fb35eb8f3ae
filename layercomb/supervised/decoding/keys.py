"""The random key of a sample, from a key or a seed."""

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
