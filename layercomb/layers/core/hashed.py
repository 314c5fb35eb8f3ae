"""`frozen_dataclass`: values that keep their hash, since that of a deep model takes long."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

_HASH = '_kept_hash'


class KeepsHash:
    """A value whose hash is kept, though not where it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        """All but the hash, since hashes of strings are others in each process."""
        return {name: value for name, value in vars(self).items() if name != _HASH}


def frozen_dataclass(cls: type[KeepsHash], init: bool) -> None:
    """Makes a class a frozen dataclass whose hash is computed once.

    Args:
      cls: the class, which is changed.
      init: whether it gets a constructor.
    """
    dataclasses.dataclass(frozen=True, repr=False, init=init)(cls)
    cls.__hash__ = _hashed_once(cls.__hash__)  # type: ignore[assignment]


def _hashed_once(hashed: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(hashed)
    def kept(self: Any) -> int:
        known: int | None = vars(self).get(_HASH)
        if known is None:
            known = hashed(self)
            object.__setattr__(self, _HASH, known)
        return known

    return kept
