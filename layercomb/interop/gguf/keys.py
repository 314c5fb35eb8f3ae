"""`Keys`: the metadata of an architecture, which knows what of it has been understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layercomb.errors import UsageError

_MISSING = object()
_MOST = 2**31 - 1


class Keys:
    """The entries ``ARCHITECTURE.…`` of a file's metadata.

    An entry that nobody asked for is refused by `check_read`: a model that leaves it out computes
    something else, silently.

    Args:
      metadata: of the file.
      architecture: what the names begin with.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.architecture = architecture
        start = f'{architecture}.'
        self._entries = {k[len(start) :]: v for k, v in metadata.items() if k.startswith(start)}
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """An entry as it is, or the default."""
        self._read.add(name)
        return self._entries.get(name, default)

    def count(self, name: str, default: Any = _MISSING) -> int:
        """An entry that is a positive integer; a list of equal ones, one for each layer, is one.

        Args:
          name: of the entry.
          default: its value where it is missing; by default it must be there.

        Raises:
          UsageError: if it is missing without default, or is something else.
        """
        value = self.get(name, default)
        if value is _MISSING:
            raise UsageError(
                f'the file has no {self.architecture}.{name}: convert the model again with a '
                'recent llama.cpp'
            )
        if isinstance(value, list) and value:
            if any(each != value[0] for each in value):
                raise UsageError(
                    f'{self.architecture}.{name} differs from layer to layer, and models here have '
                    'equal layers: this file cannot be loaded'
                )
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise self._wrong(name, value, 'positive integer')
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """An entry that is a finite number: of float32 the shortest decimal that means it.

        Args:
          name: of the entry.
          default: its value where it is missing; by default it must be there.

        Raises:
          UsageError: if it is missing without default, or is something else.
        """
        value = self.get(name, default)
        if value is _MISSING:
            return float(self.count(name))  # which says that it is missing
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not np.isfinite(value):
            raise self._wrong(name, value, 'finite number')
        return shortest(value)

    def must_be(self, name: str, *allowed: Any) -> None:
        """Checks an entry that may say one thing only; a missing one is right.

        Args:
          name: of the entry.
          *allowed: values that are understood.

        Raises:
          UsageError: if it is another value.
        """
        value = self.get(name)
        if value is not None and value not in allowed:
            raise UsageError(
                f'{self.architecture}.{name} is {value!r:.60}, and only {allowed[0]!r} is '
                'understood: this file cannot be loaded'
            )

    def check_read(self) -> None:
        """Checks that every entry was asked for, or is 0, false or empty.

        Raises:
          UsageError: for others, naming them.
        """
        left = [
            f'{self.architecture}.{name} = {value!r:.40}'
            for name, value in self._entries.items()
            if name not in self._read and value not in (0, '', [])
        ]
        if left:
            raise UsageError(
                f'the metadata say {", ".join(left[:8])}, which is not understood: this file '
                'cannot be loaded'
            )

    def _wrong(self, name: str, value: Any, what: str) -> UsageError:
        return UsageError(
            f'{self.architecture}.{name} is {value!r:.60} and no {what}: download the file again'
        )


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32.

    >>> shortest(9.999999747378752e-06), shortest(100000.0)
    (1e-05, 100000.0)
    """
    with np.errstate(over='ignore'):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)
