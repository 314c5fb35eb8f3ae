"""The key of a sample, as people give it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import plain
from layercomb.model import seeded


def key(name: str, value: Any) -> jax.Array:
    """A typed key, from one, from its numbers as ``jax.random.PRNGKey`` gives them, or from a seed.

    Raises:
      ValueError: if it is none of these, such as several keys at once.
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
