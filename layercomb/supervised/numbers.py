"""The numbers that people give to decoding: Python's, NumPy's or JAX's, as Python's."""

from __future__ import annotations

import math
from typing import Any


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


def _plain(value: Any) -> Any:
    """A number of whatever kind as Python's; None for what is no number."""
    if getattr(value, 'shape', None) == () and hasattr(value, 'item'):
        value = value.item()
    return None if isinstance(value, bool) else value
