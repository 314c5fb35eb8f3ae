"""A published data set: from a local path, else from TFDS, else something that stands in for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError

StandIn = Sequence[Any] | Callable[[], Sequence[Any]] | None


def choose(
    what: str,
    path: Any,
    local: Callable[[str], Sequence[Any]],
    prepared: Callable[[], Sequence[Any]],
    stand_in: StandIn,
    cure: str,
    asked: bool = False,
) -> Sequence[Any]:
    """Returns the data at a path if one is given, else what is prepared, else the stand-in.

    Args:
      what: the data set's name, for messages.
      path: where it is, or None. What is wrong with a given path is an error, whatever could stand
        in.
      local: reads it from a path, which is absolute.
      prepared: reads it from TFDS, or raises a UsageError.
      stand_in: other data of the same kind, for machines that have neither, or a function that
        returns it. One line on stderr says that it is used.
      cure: what path to give.
      asked: whether TFDS was told where to look: then nothing stands in, either.

    Raises:
      TypeError: if the path is no string.
      UsageError: if nothing is there.
    """
    if path is not None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise TypeError(f'path={path!r}: give {cure}')
        return local(str(paths.local(path, 'path')))
    try:
        return prepared()
    except UsageError as e:
        if asked:
            raise
        if stand_in is None:
            raise UsageError(f'no {what} here ({e}): give path={cure}, or a stand_in=') from None
        print(f'layercomb: no {what} here ({e}): using its stand-in', file=sys.stderr)
        return stand_in() if callable(stand_in) else stand_in
