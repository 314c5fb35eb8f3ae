"""Where a published data set is read from: a local path, TFDS, or a stand-in."""

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
    """Returns the data at a path if one is given, else that of TFDS, else the stand-in.

    Args:
      what: the data set's name, for messages.
      path: where it is, or None. Errors of a given path are raised; there is no stand-in for it.
      local: a function that reads the data from an absolute path.
      prepared: a function that reads it from TFDS, or raises a UsageError.
      stand_in: other data of the same kind, for machines that have neither, or a function that
        returns it. A line on stderr says that it is used.
      cure: what path to give, for messages.
      asked: whether the user told where TFDS has it. Then there is no stand-in, either.

    Raises:
      TypeError: if `path` is no path.
      UsageError: if there is no data.
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
