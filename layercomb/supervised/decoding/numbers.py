"""The numbers that people give to decoding: Python's, NumPy's or JAX's, as Python's."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.model import seeded


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number.

    Raises:
      ValueError: if it is none, or less than `least`.

    >>> import numpy as np
    >>> whole('top_k', np.int64(3))
    3
    """
    number = _plain(value)
    if not isinstance(number, int) or number < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}')
    return number


def real(
    name: str, value: Any, range_: str, least: float, most: float, *, above: bool = False
) -> float:
    """A finite number.

    Args:
      name: what it is.
      value: the number.
      range_: its range in words, ``at least 0``.
      least, most: its range; the ends belong to it.
      above: whether `least` does not.

    Raises:
      ValueError: if it is none, or out of its range.

    >>> import numpy as np
    >>> real('temperature', np.float32(0.5), 'at least 0', 0, math.inf)
    0.5
    """
    number = _plain(value)
    is_number = isinstance(number, (int, float)) and math.isfinite(number)
    if not is_number or not least <= number <= most or (above and number == least):
        raise ValueError(f'{name} must be {range_}, got {value!r}')
    return float(number)


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
    return seeded(name, value if _plain(value) is None else _plain(value))


def _plain(value: Any) -> Any:
    """A number of whatever kind as Python's; None for what is no number."""
    if getattr(value, 'shape', None) == () and hasattr(value, 'item'):
        value = value.item()
    return None if isinstance(value, bool) else value
