"""The fields of a layer: what they may hold, checked once when the layer is made."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from layercomb.checking.annotations import Bound, check_values

Size = Annotated[int, Bound(1)]
Rate = Annotated[float, Bound(0, 1)]


def check_fields(instance: Any) -> None:
    """Checks every field of a layer against its annotation.

    Raises:
      TypeError: if a field holds something of another type, or something unhashable.
      ValueError: if a number is out of its range.
    """
    owner = type(instance).__name__
    fields = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    check_values(owner, fields, type(instance))
    for name, value in fields.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f'{owner}: {name} holds {type(value).__name__}, which is not hashable: '
                'a layer describes, arrays belong in its weights or state'
            ) from None


def nearest_divisor(n: int, to: int) -> int:
    """The divisor of `n` nearest to a number.

    >>> nearest_divisor(96, 30)
    32
    """
    return min((i for i in range(1, n + 1) if n % i == 0), key=lambda i: abs(i - to))


def nearest_multiple(n: int, of: int) -> int:
    """The positive multiple of a number nearest to `n`.

    >>> nearest_multiple(100, 64)
    128
    """
    return max(1, round(n / of)) * of
