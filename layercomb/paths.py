"""Paths that the user gives: each is read here, once, before anything is written.

The result is absolute, so a later `os.chdir` does not change what a relative path means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layercomb.errors import UsageError

# One slash is enough: pathlib makes 'gs:/bucket' of 'gs://bucket'. 'C:/' is a drive.
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/')


def local(path: Any, what: str, folder: Path | None = None) -> Path:
    """A path on this machine, absolute, with `~` and `~user` expanded; no file is read or made.

    Args:
      path: a path or a glob pattern, as str, bytes or `os.PathLike`.
      what: the name of the argument, for messages.
      folder: what a relative path starts from; by default the working directory.

    Raises:
      TypeError: if it is no path.
      UsageError: if it is empty or a URL (``gs://…``, ``file://…``), if it starts from a home
        directory that does not exist, or if the working directory does not exist any more.

    >>> local('/data/../texts', 'pattern').as_posix()
    '/data/../texts'
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f'{what}={path!r}: give a path, a str or os.PathLike') from None
    if not text:
        raise UsageError(f"{what} is empty: give a path, '.' for the current directory")
    if '\0' in text:
        raise UsageError(f'{what}={text!r} holds a NUL, which no path can: check it')
    if (url := _URL.match(text)) is not None:
        cure = 'give the path alone' if url[1].lower() == 'file' else 'copy it here, or mount it'
        raise UsageError(
            f'{what}={text!r} is a URL, and only files of this machine are read and written: {cure}'
        )
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(
            f'{what}={text!a} has letters that names of files do not have here (they are in '
            f'{sys.getfilesystemencoding()}): set PYTHONUTF8=1'
        ) from None
    try:
        return Path(folder or '', _at_home(text, what)).absolute()
    except FileNotFoundError:
        raise UsageError(
            f'{what}={text!r} is relative to a working directory that is no longer there: '
            'change to another, or give an absolute path'
        ) from None


def check_can_hold(directory: Path) -> None:
    """Raises the OSError that writing into a directory would raise, as far as that can be known.

    Args:
      directory: absolute; it and its parents need not exist yet. Nothing is made.

    Raises:
      NotADirectoryError, PermissionError: if it, or its nearest existing parent, is a file or may
        not be written.
    """
    there = next(path for path in (directory, *directory.parents) if _exists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path to write a directory to: it becomes `out` at the end, or is removed after an error.

    Args:
      out: absolute; an empty directory, or one that does not exist yet.
    """
    made = [parent for parent in out.parents if not _exists(parent)]
    folder = out.parent
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
        yield folder / out.name
        if out.exists():
            out.rmdir()
        (folder / out.name).rename(out)
        folder.rmdir()
    except BaseException:
        if folder != out.parent:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have written there
            for parent in made:
                parent.rmdir()
        raise


def check_for_arrays(path: Path) -> None:
    """Raises a UsageError if TensorStore, which writes checkpoints, cannot use a path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f'the path {str(path)!r} is no UTF-8, and checkpoints need one that is: rename it, or '
            'set PYTHONUTF8=1 where the system names files otherwise'
        ) from None
    for name in path.parts:
        if _URL.fullmatch(f'{name}/'):
            raise UsageError(
                f'the path {str(path)!r} has a directory {name!r}, which checkpoints would take '
                'for the beginning of a URL: rename it'
            )


def shown(path: str | os.PathLike[str]) -> str:
    """A path as valid UTF-8 text: other bytes of its name become U+FFFD.

    >>> shown('run\\udcff')
    'run\ufffd'
    """
    return os.fsencode(path).decode('utf-8', 'replace')


def _at_home(text: str, what: str) -> str:
    """The path with `~` or `~user` expanded, if it begins so."""
    if not text.startswith('~'):
        return text
    user = text.partition('/')[0]
    expanded = os.path.expanduser(text)
    if expanded == text or (user == '~' and os.environ.get('HOME') == ''):
        raise UsageError(
            f'{what}={text!r}: there is no home directory of {user!r}: give an absolute path, or '
            f"'./{user}…' for a name that begins so"
        )
    return expanded


def _exists(path: Path) -> bool:
    """Whether the path exists; a broken link does."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
