"""Docstrings, labelled by the package that they come from: a set for classification at hand."""

from __future__ import annotations

import os
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from layercomb.data.corpora.docstrings import docstrings_of
from layercomb.data.files import check_split
from layercomb.data.sources import python_stdlib
from layercomb.errors import UsageError

# Packages of every Python from 3.11 on, each with a hundred docstrings or more.
PACKAGES = (
    'asyncio', 'email', 'http', 'importlib', 'logging', 'multiprocessing', 'unittest', 'xml',
)  # fmt: skip


def python_topics(split: str = 'train') -> list[dict[str, Any]]:
    """Returns docstrings of this Python's own library with the package that each comes from.

    A set for classification that is on every machine: eight packages, about 1,100 functions and
    methods to learn from. A docstring that occurs twice is taken once, and a checksum of it sends
    it to a split for good: about 80 % to 'train', 10 % each to 'valid' and 'test'.

    Args:
      split: 'train', 'valid' or 'test'.

    Returns:
      A list of rows, {'text': …, 'label': …}, as `data.labelled` takes them.

    Raises:
      ValueError: if there is no such split.
      UsageError: if this Python keeps no sources.
    """
    check_split(split)
    found = [row for row in _rows() if _split_of(row[0]) == split]
    if not found:
        raise UsageError(
            f'no docstrings in split {split!r}: this Python keeps few sources, so give rows of '
            'your own'
        )
    return [{'text': text, 'label': label} for text, label in found]


@lru_cache(maxsize=1)
def _rows() -> tuple[tuple[str, str], ...]:
    """Each docstring once, and its package, in the order of the files."""
    root = sysconfig.get_paths()['stdlib']
    found: dict[str, str] = {}
    for split in ('train', 'valid', 'test'):
        files = python_stdlib(split)
        for i, path in enumerate(files.paths):
            package = Path(os.path.relpath(path, root)).parts[0]
            if package in PACKAGES:
                for text in docstrings_of(files[i]):
                    found.setdefault(text, package)
    return tuple(found.items())


def _split_of(text: str) -> str:
    return {0: 'valid', 1: 'test'}.get(zlib.crc32(text.encode()) % 10, 'train')
