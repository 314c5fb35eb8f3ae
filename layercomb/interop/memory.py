"""Whether a model fits into the memory that is free, asked before any of it is made."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from layercomb.errors import UsageError

_MEMINFO = Path('/proc/meminfo')
_CONTROL_GROUP = Path('/sys/fs/cgroup')


def check_fits(n_bytes: int, what: str) -> None:
    """Checks that weights fit into the free memory of the device that will hold them.

    Args:
      n_bytes: how many they take.
      what: their name, for the message.

    Raises:
      UsageError: if they do not, with both numbers. Where the free memory is not known, nothing is
        refused.
    """
    free = free_bytes()
    if free is not None and n_bytes > free:
        raise UsageError(
            f'{what} takes {_gib(n_bytes)} of memory, and {_gib(free)} are free: take one of fewer '
            'weights or bits, or a larger machine'
        )


def is_cpu() -> bool:
    """Whether the first device computes in the memory of the host."""
    platform: str = jax.devices()[0].platform
    return platform == 'cpu'


def free_bytes() -> int | None:
    """The free memory of the first device, in bytes; None if it is not known."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        stats = device.memory_stats() or {}
        limit, used = stats.get('bytes_limit'), stats.get('bytes_in_use')
        return None if limit is None or used is None else int(limit - used)
    known = [n for n in (_of_machine(), _of_control_group()) if n is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith('MemAvailable:'))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):
        return None


def _of_control_group() -> int | None:
    """What a container's limit leaves; cached files count as free."""
    try:
        limit = int((_CONTROL_GROUP / 'memory.max').read_text())
        used = int((_CONTROL_GROUP / 'memory.current').read_text())
        lines = (_CONTROL_GROUP / 'memory.stat').read_text().splitlines()
        cached = sum(int(x.split()[1]) for x in lines if x.split()[0] == 'inactive_file')
    except (OSError, ValueError, IndexError):
        return None  # 'max' is no number: no limit
    return max(0, limit - used + cached)


def _gib(n_bytes: int) -> str:
    return f'{n_bytes / 2**30:,.2f} GiB'
