"""Several processes that train together: what one finds out, all hear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from layercomb.errors import UsageError, one_line

_LENGTH = 8000  # bytes of a message that are sent


def is_alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def from_all(x: Any) -> np.ndarray:
    """An array of each process, (N, …); all of them have to ask.

    Args:
      x: a number or an array, of one shape and dtype in all processes.
    """
    if is_alone():
        return np.asarray(x)[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(x)))


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Ends in an error in all processes if it does in one, so that none waits for it for ever.

    What is inside must not wait for other processes.

    Raises:
      UsageError: what went wrong in the first process that had an error, in the others.
    """
    if is_alone():
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as e:
        mine = e
    failed = from_all(mine is not None)
    if not failed.any():
        return
    said = texts('' if mine is None else one_line(mine))
    if mine is not None:
        raise mine
    first = int(np.argmax(failed))
    raise UsageError(f'process {first} says: {said[first]}')


def texts(text: str) -> list[str]:
    """A text of each process; all of them have to ask.

    Args:
      text: of this process; what is beyond 8,000 bytes is cut off.
    """
    data = text.encode(errors='backslashreplace')[:_LENGTH].ljust(_LENGTH, b'\0')
    found = from_all(np.frombuffer(data, np.uint8))
    return [x.tobytes().rstrip(b'\0').decode('utf-8', 'ignore') for x in found]
