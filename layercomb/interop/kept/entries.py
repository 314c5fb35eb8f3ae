"""The folder of weights that are kept: whether it is private, what is deleted, and room for more.

Only files that were written here are deleted: entries by name and magic word, and parts of entries
by name. The name of a part says which process writes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

MAGIC = b'LCWEIGHT'
LARGEST = 20_000_000_000  # bytes of all entries of a folder
UNUSED = 30 * 24 * 3600  # seconds after which an entry that nobody used is deleted
_ABANDONED = 24 * 3600  # seconds after which a part is deleted, whoever wrote it
_ENTRY = re.compile(r'layercomb-[0-9a-f]{32}\.weights')
_PART = re.compile(r'layercomb-([0-9a-f]{8})-([0-9]{1,10})-[a-z0-9_]{8}\.part')
_OTHERS_WRITE = 0o022


def entry_of(folder: Path, name: str) -> Path:
    """The path of an entry.

    Args:
      folder: of entries.
      name: what it is of; other names have other entries.
    """
    return folder / f'layercomb-{hashlib.sha256(name.encode()).hexdigest()[:32]}.weights'


def is_private(folder: Path) -> bool:
    """Whether nobody else may write into a folder; also if it is not there yet."""
    if os.name != 'posix':  # modes tell nothing elsewhere
        return True
    try:
        return not folder.stat().st_mode & _OTHERS_WRITE
    except OSError:
        return True


def is_own(entry: Path) -> bool:
    """Whether an entry is there, and was written by this user or root."""
    try:
        owner = entry.stat().st_uid
    except OSError:
        return False
    return not hasattr(os, 'getuid') or owner in (0, os.getuid())


def make_room(folder: Path, entry: Path, size: int) -> None:
    """Makes the folder, deletes what is old there, and looks whether an entry has room.

    Args:
      folder: of entries.
      entry: that will be written, or replaced.
      size: of it, in bytes.

    Raises:
      OSError: if the folder cannot be made, or the entry would take more than half of what is free.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tidy(folder, entry, size)
    if 2 * size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def part_of(entry: Path) -> Iterator[IO[bytes]]:
    """A file that becomes the entry at the end, and is removed after an error."""
    prefix = f'layercomb-{_machine()}-{os.getpid()}-'
    made, name = tempfile.mkstemp('.part', prefix, entry.parent)
    try:
        with os.fdopen(made, 'w+b') as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            if hasattr(os, 'posix_fadvise'):  # what was written in parts is cached in small pages
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(name, entry)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def tidy(folder: Path, used: Path, size: int | None = None) -> None:
    """Deletes entries unused for 30 days, then the longest unused beyond 20 GB; and dead parts.

    Args:
      folder: of entries.
      used: an entry that stays, and is noted as used.
      size: what `used` will have; None for what it has.
    """
    now, total = time.time(), 0
    with contextlib.suppress(OSError):  # not there yet, or in a folder that can only be read
        os.utime(used)
        total = used.stat().st_size
    total = total if size is None else size
    known = []
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have deleted it
                told = file.lstat()
                known.append((told.st_mtime, told.st_size, file))
    for last, n_bytes, file in sorted(known, reverse=True):
        part = _PART.fullmatch(file.name)
        if part is not None:
            old = now - last > _ABANDONED or _is_dead(part[1], int(part[2]))
        elif file != used and _ENTRY.fullmatch(file.name) and _is_entry(file):
            old = now - last > UNUSED or total + n_bytes > LARGEST
        else:
            continue
        if old:
            with contextlib.suppress(OSError):
                file.unlink()
        else:
            total += n_bytes


def _is_entry(file: Path) -> bool:
    try:
        with file.open('rb') as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _machine() -> str:
    """What tells this machine, or container, from others that may share the folder."""
    space = ''
    with contextlib.suppress(OSError):
        space = os.readlink('/proc/self/ns/pid')
    return hashlib.sha256(f'{platform.node()} {space}'.encode()).hexdigest()[:8]


def _is_dead(machine: str, process: int) -> bool:
    """Whether a process is known to have ended; of other machines nothing is known."""
    if os.name != 'posix' or machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user, or no number of a process
        return False
    return False
