"""enwik8: the first 100 MB of an English Wikipedia of 2006, byte by byte."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO

from layercomb.data.corpora.choice import StandIn, choose
from layercomb.data.files import check_split
from layercomb.data.sources import Mapped, tfds
from layercomb.errors import UsageError

_PERCENT = {'train': (0, 90), 'valid': (90, 95), 'test': (95, 100)}
_CURE = 'the path of enwik8 or enwik8.zip (mattmahoney.net/dc/enwik8.zip)'


def enwik8(
    path: str | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    stand_in: StandIn = None,
    *,
    name: str = 'enwik8',
) -> Sequence[bytes]:
    """Returns a split of enwik8 as one document: 90, 5 and 5 of its 100 million bytes.

    Any other file is cut in the same way, with its first 90 % for training. Without a path, TFDS is
    asked, then `stand_in` is returned, and a line on stderr says so.

    Args:
      path: of enwik8 or enwik8.zip.
      split: 'train', 'valid' or 'test'.
      data_dir: where TFDS has prepared it.
      stand_in: other documents, for machines that have no enwik8, or a function that returns them.
      name: of the data set in TFDS. TFDS has no enwik8 of its own: prepare one with a feature
        'text' and a split 'train', whose texts are joined by newlines before they are cut.

    Raises:
      TypeError: if `path` is no path.
      ValueError: if there is no such split.
      UsageError: if the path cannot be read, or there is neither data nor stand-in.

    References:
      Mahoney 2011, Large text compression benchmark, http://mattmahoney.net/dc/text.html
    """
    check_split(split)
    return choose(
        'enwik8',
        path,
        partial(_local, split=split),
        lambda: Mapped((tfds(name, 'train', data_dir),), partial(_piece_of_texts, split=split)),
        stand_in,
        _CURE,
        asked=data_dir is not None or name != 'enwik8',
    )


def _local(path: str, split: str) -> Sequence[bytes]:
    with _opened(path):  # errors show now, not in a worker
        return Mapped((path,), partial(_piece_of_file, split=split))


def _piece_of_file(path: str, split: str) -> bytes:
    with _opened(path) as (file, size):
        start, stop = _cut(size, split)
        file.seek(start)
        return file.read(stop - start)


def _piece_of_texts(texts: Sequence[bytes], split: str) -> bytes:
    text = b'\n'.join(texts)
    return text[slice(*_cut(len(text), split))]


def _cut(size: int, split: str) -> tuple[int, int]:
    """Where a split begins and ends.

    >>> _cut(100_000_000, 'valid')
    (90000000, 95000000)
    """
    start, stop = _PERCENT[split]
    return size * start // 100, size * stop // 100


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """A file, or the only one in a zip archive, and its size."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, 'rb') as file:
                yield file, os.path.getsize(path)
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) != 1:
                raise UsageError(f'{path} holds {len(members)} files, not one: give {_CURE}')
            with archive.open(members[0]) as file:
                yield file, members[0].file_size
    except (OSError, zipfile.BadZipFile) as e:
        cause = getattr(e, 'strerror', None) or e
        raise UsageError(f'cannot read {path} ({cause}): give {_CURE}') from None
