"""Memory of the host: arrays that JAX takes without a copy, and what is given back.

On a CPU, JAX uses memory of NumPy as it is if it begins at a multiple of 64 bytes, and so weights
need not be there twice while they are read or unstacked. Elsewhere, and where the memory begins at
another place, JAX copies by itself.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

ALIGNMENT = 64  # bytes, of XLA's on a CPU
_PAGES = Path('/proc/self/statm')


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to be filled, and then given to JAX by `taken`.

    Args:
      shape: of the array.
      dtype: of the array.
    """
    kind = np.dtype(dtype)
    n_bytes = math.prod(shape) * kind.itemsize
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + n_bytes].view(kind).reshape(shape)


def taken(x: np.ndarray) -> jax.Array:
    """The same numbers as an array of JAX, which may use this very memory.

    Args:
      x: an array that nobody writes to any more.
    """
    return jax.device_put(x)


def is_ready(x: np.ndarray, dtype: Any) -> bool:
    """Whether JAX on a CPU takes the memory of an array as it is.

    Args:
      x: an array, such as a view of a mapped file.
      dtype: that it is to have.
    """
    return x.dtype == dtype and x.flags.c_contiguous and x.ctypes.data % ALIGNMENT == 0


def is_shareable(x: Any) -> bool:
    """Whether slices of an array may share its memory: it is in that of a CPU, in one piece.

    Args:
      x: a leaf of a tree.
    """
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or x.is_deleted():
        return False
    devices: list[Any] = list(x.sharding.device_set)
    is_plain = not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return is_plain and len(devices) == 1 and devices[0].platform == 'cpu'


def shared_slice(x: jax.Array, i: int) -> jax.Array:
    """Slice `i` of the leading axis, in the memory of the whole where its place allows.

    Neither array changes if the other is deleted or donated: JAX copies what it may not overwrite.

    Args:
      x: an array that `is_shareable`.
      i: from 0.
    """
    return jax.device_put(np.asarray(x)[i], x.sharding if x.committed else None)


def give_back() -> None:
    """Gives freed memory back to the system, where the allocator would keep it, as glibc's does."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another system, or another allocator
        return


def resident_bytes() -> int | None:
    """How many bytes of memory this process has now; None where the system does not tell."""
    try:
        pages = int(_PAGES.read_text().split()[1])
        return pages * os.sysconf('SC_PAGE_SIZE')
    except (OSError, ValueError, IndexError, AttributeError):
        return None
