"""The library of kernels that is used: compiled here, or else one that the wheel brought."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

from layercomb_kernels import build, packaged


@dataclasses.dataclass(frozen=True)
class Library:
    """Compiled kernels.

    Attributes:
      handlers: the loaded library.
      path: its file.
      origin: where it is from, and for which processors.
    """

    handlers: ctypes.CDLL
    path: Path
    origin: str


def load() -> Library:
    """What a compiler makes for this very processor; without one, what the wheel has for its kind.

    Raises:
      Unavailable: if there is neither, or the kernels are switched off.
    """
    build.check_switch()
    try:
        return Library(build.load(), build.library_path(), 'compiled here for this processor')
    except build.Unavailable as e:
        if not packaged.there():
            raise
        reason = str(e)
    try:
        handlers, level = packaged.load()
    except build.Unavailable as e:
        raise build.Unavailable(f'{reason}; {e}') from None
    return Library(handlers, level.path(packaged.FOLDER), f'packaged for {level.name} ({reason})')
