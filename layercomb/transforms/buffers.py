"""Memory of the host: arrays that JAX takes without a copy, and what is given back.

On a CPU, JAX uses memory of NumPy as it is if it begins at a multiple of 64 bytes, and so weights
need not be there twice while they are read or unstacked. Elsewhere, and where the memory begins at
another place, JAX copies by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

ALIGNMENT = 64  # bytes, of XLA's on a CPU
_PAGES = Path('/proc/self/statm')
_MAPPINGS = Path('/proc/self/smaps')
_HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')
_SMALL = 1 << 24  # bytes, of arrays whose pages do not matter
_TOUCHED = 1 << 26  # bytes, of which it is seen in what pages an array lies


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


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, (n,) uint8, mapped and read only, in large pages if the system has them.

    Args:
      path: of a file that is not empty.

    Raises:
      OSError, ValueError: if it cannot be mapped.
    """
    with path.open('rb') as opened:
        made = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, 'MADV_HUGEPAGE'):
        with contextlib.suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(made, np.uint8)


def is_quick(x: np.ndarray) -> bool:
    """Whether a mapped array is read as quickly as memory: it is small, or in large pages.

    Small pages cost a decoding step a third of its speed. New memory is in large ones, and files
    are where the file system caches them so, as ext4 does in Linux 6.18.

    Args:
      x: an array in C order, of which some is read.
    """
    if x.nbytes < _SMALL:
        return True
    try:
        if '[never]' in _HUGE.read_text():
            return True
        x.reshape(-1).view(np.uint8)[: _TOUCHED : mmap.PAGESIZE].max()
        said = _MAPPINGS.read_text()
    except OSError:  # another system
        return True
    for one in re.split(r'(?m)^(?=[0-9a-f]+-[0-9a-f]+ )', said):
        first, _, rest = one.partition('-')
        if first and int(first, 16) <= x.ctypes.data < int(rest.split(' ', 1)[0], 16):
            large, there = (_kib(one, name) for name in ('FilePmdMapped', 'Rss'))
            return 2 * large >= there
    return True


def _kib(mapping: str, name: str) -> int:
    """A number of a mapping as the system tells of it; 0 if it does not."""
    found = re.search(rf'(?m)^{name}: +(\d+) kB', mapping)
    return 0 if found is None else int(found[1])


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
