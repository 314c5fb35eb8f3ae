"""``layercomb`` and ``python -m layercomb``: the launcher as a process of its own."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from layercomb.cli import main

HUGE_PAGES = 'glibc.malloc.hugetlb=1'
_KERNEL = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def wants_huge_pages(environment: dict[str, str], arguments: list[str]) -> bool:
    """Whether training would gain from starting again with huge pages.

    XLA gives a step's temporaries back to the kernel and faults them in again at the next step:
    on a CPU a fifth of the time and more. glibc reads its tunables only when a process starts. A
    value that is already set, an empty one too, is left alone.
    """
    if arguments[:1] != ['train'] or 'GLIBC_TUNABLES' in environment:
        return False
    if platform.libc_ver()[0] != 'glibc':
        return False
    try:
        return '[madvise]' in _KERNEL.read_text('utf-8')
    except OSError:
        return False


def hold_descriptors() -> None:
    """Opens what of standard input, output and error is closed (``>&-``), to nowhere.

    The next file to be opened would get its number, and what libraries print there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def launch() -> None:
    """Runs the launcher, with huge pages where they help, and exits with its code."""
    hold_descriptors()
    if wants_huge_pages(dict(os.environ), sys.argv[1:]):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, 'GLIBC_TUNABLES': HUGE_PAGES})
    sys.exit(main())


if __name__ == '__main__':
    launch()
