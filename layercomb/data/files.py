"""The files that a pattern matches, and those of a split."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from layercomb import paths
from layercomb.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """A kind of files, for patterns that are directories.

    Attributes:
      word: what messages call such a file.
      content: what messages say that a directory should hold.
      belongs: whether the file at a path is of this kind.
    """

    word: str
    content: str
    belongs: Callable[[str], bool]


def matching(
    pattern: str | bytes | os.PathLike[str], split: str | None, kind: Kind
) -> tuple[str, ...]:
    """The files that a pattern matches: absolute paths, sorted.

    Args:
      pattern: a glob pattern, where `**` stands for any directories and `~` for the home; or a
        directory, for all files of the kind in it, except hidden ones. A relative pattern starts
        from the working directory.
      split: None for all files, or 'train', 'valid', 'test' for about 90, 5 and 5 % of them, chosen
        by a checksum of the path below the pattern's fixed part.
      kind: which files of a directory to take.

    Raises:
      TypeError: if the pattern is no path.
      ValueError: if there is no such split.
      UsageError: if it is no path, or no file is left.
    """
    if not isinstance(pattern, (str, bytes, os.PathLike)):
        raise TypeError(f"pattern={pattern!r}: give a glob pattern, e.g. 'texts/**/*.txt'")
    if split is not None:
        check_split(split)
    where = str(paths.local(pattern, 'pattern'))
    if os.path.isdir(where):
        root, found = where, [path for path in walk(where) if kind.belongs(path)]
        if not found:
            raise UsageError(
                f'no {kind.word} in {where!r}: give a directory that holds {kind.content}'
            )
    else:
        root = os.path.dirname(where) if os.path.isfile(where) else _fixed_part(where)
        found = [where] if os.path.isfile(where) else _globbed(where)  # a name may hold brackets
        if not found:
            raise UsageError(
                f'no file matches {where!r}: check the pattern, or give an absolute path'
            )
    chosen = found if split is None else of_split(found, root, split)
    if not chosen:
        raise UsageError(
            f'none of the {len(found)} files of {where!r} is in split {split!r}: '
            'give more files, or split=None'
        )
    return tuple(chosen)


def _globbed(pattern: str) -> list[str]:
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def read(path: str) -> bytes:
    """The bytes of a file.

    Raises:
      UsageError: if it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f'cannot read {path}: {e.strerror}') from None


def walk(root: str, skip: Iterable[str] = ()) -> list[str]:
    """The files below a directory, sorted, without hidden ones and the directories in `skip`."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip and not name.startswith('.')]
        found += [os.path.join(directory, name) for name in files if not name.startswith('.')]
    return sorted(found)


def check_split(split: str) -> None:
    """Raises a ValueError unless there is such a split."""
    if split not in ('train', 'valid', 'test'):
        raise ValueError(f"split={split!r}: choose 'train', 'valid' or 'test'")


def of_split(files: Iterable[str], root: str, split: str) -> list[str]:
    """The files below `root` that belong to a split."""
    return [path for path in files if _split_of(os.path.relpath(path, root)) == split]


def is_utf8(document: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    try:
        document.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


def _split_of(relative_path: str) -> str:
    bucket = zlib.crc32(Path(relative_path).as_posix().encode('utf-8', 'surrogateescape')) % 20
    return {0: 'valid', 1: 'test'}.get(bucket, 'train')


def _fixed_part(pattern: str) -> str:
    """The directories of a pattern before its first wildcard."""
    parts = Path(pattern).parts[:-1]
    wild = (i for i, part in enumerate(parts) if glob.has_magic(part))
    return os.path.join(*parts[: next(wild, len(parts))], '')


def _looks_like_text(path: str) -> bool:
    """Whether the start of a file is UTF-8 without NUL; a character may be cut at its end."""
    try:
        with open(path, 'rb') as f:
            head = f.read(1 << 16)
    except OSError:
        return False
    return b'\0' not in head and any(is_utf8(head[: len(head) - cut]) for cut in range(4))


def _looks_like_png(path: str) -> bool:
    return path.lower().endswith('.png')


TEXT = Kind('text file', 'UTF-8 text', _looks_like_text)
PNG = Kind('PNG file', 'PNG images', _looks_like_png)
