"""Texts from files of JSON lines, plain or compressed by gzip."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layercomb.data.sources import Mapped
from layercomb.errors import UsageError

_OF = 20
ALL = frozenset(range(_OF))
_LINES = {'valid': 19, 'test': 18}  # the last lines, so that the first are for 'train'


@dataclass(frozen=True)
class JsonLines(Sequence[tuple[bytes, ...]]):
    """Some fields of each line of some files, as tuples of bytes.

    The files are read when the first line is asked for. Then the lines of plain files are found
    once, and each is read from its file when it is asked for. A gzip file has no random access, so
    its lines in the share are held in memory.

    Attributes:
      paths: the files; those that end in '.gz' are decompressed.
      fields: tuples of field names, e.g. (('text',),); a line must have all fields of one of them.
        A field is a string, or a list of strings, which are joined by newlines.
      share: which lines of each twenty, counted from 0; the others belong to other splits.
      cure: what to give instead, for messages.
    """

    paths: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...]
    share: frozenset[int]
    cure: str

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(range(len(self))[index], self.__getitem__)
        path, number, line = self._lines[index]
        try:
            if isinstance(line, int):
                with open(path, 'rb') as file:
                    file.seek(line)
                    line = file.readline()
            record = json.loads(line)
        except OSError as e:
            raise UsageError(f'cannot read {path} ({e.strerror}): give {self.cure}') from None
        except (ValueError, RecursionError):  # endless brackets
            raise UsageError(f'{path}:{number} is no JSON: give {self.cure}') from None
        return self._chosen(record, f'{path}:{number}')

    def __reduce__(self) -> Any:  # without the lines that were read
        return JsonLines, (self.paths, self.fields, self.share, self.cure)

    @cached_property
    def _lines(self) -> list[tuple[str, int, int | bytes]]:
        """Of each line the file, its number, and its start in the file or, from gzip, its text."""
        found = []
        for path in self.paths:
            with unreadable(path, f'give {self.cure}'):
                for i, line in lines(path):
                    if i % _OF in self.share:
                        found.append((path, i + 1, line))
        if not found:
            more = f' and {len(self.paths) - 1} more' if len(self.paths) > 1 else ''
            raise UsageError(
                f'{self.paths[0]}{more} has no line for this split: '
                f'give files of more lines, {self.cure}'
            )
        return found

    def _chosen(self, record: Any, where: str) -> tuple[bytes, ...]:
        for names in self.fields:
            if isinstance(record, dict) and all(name in record for name in names):
                return tuple(self._text(record[name], f'{name!r} of {where}') for name in names)
        wanted = ' or '.join(' and '.join(map(repr, names)) for names in self.fields)
        raise UsageError(f'{where} has no {wanted}: give {self.cure}')

    def _text(self, value: Any, where: str) -> bytes:
        strings = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) for x in strings):
            raise UsageError(f'{where} is neither a string nor a list of them: give {self.cure}')
        return '\n'.join(strings).encode('utf-8', 'replace')  # half a surrogate pair becomes '?'


def share_of(split: str, splits: Sequence[str]) -> frozenset[int]:
    """The lines of each twenty that a split has: one each for other splits, the rest for 'train'.

    >>> sorted(share_of('valid', ('train', 'valid'))), len(share_of('train', ('train', 'valid')))
    ([19], 19)
    """
    if split != 'train':
        return frozenset({_LINES[split]})
    return ALL - {_LINES[other] for other in splits if other != 'train'}


@contextlib.contextmanager
def unreadable(path: str, cure: str) -> Iterator[None]:
    """Turns errors of reading a file into a UsageError.

    Args:
      path: of the file, for the message.
      cure: what to do about it.

    Raises:
      UsageError: for errors of the operating system, and for damaged gzip files.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        cause = getattr(e, 'strerror', None) or e
        raise UsageError(f'cannot read {path} ({cause}): {cure}') from None


def lines(path: str) -> Iterator[tuple[int, int | bytes]]:
    """The number of each line that is not blank, and its text (gzip) or its start in the file.

    Args:
      path: of a file; one that ends in '.gz' is decompressed.
    """
    compressed = path.endswith('.gz')
    at = 0
    with gzip.open(path) if compressed else open(path, 'rb') as file:
        for i, line in enumerate(file):
            if not line.isspace():
                yield i, line if compressed else at
            at += len(line)
