"""Rows of data: from files of JSON lines, JSON and Parquet, or any sequence of dicts."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from layercomb.data import checks, files
from layercomb.data.corpora.jsonlines import lines, unreadable
from layercomb.errors import UsageError

Row: TypeAlias = Mapping[str, Any]
Source: TypeAlias = str | os.PathLike[str] | checks.Source[Row]

_LINES, _COMPRESSED = ('.jsonl', '.ndjson'), ('.jsonl.gz', '.ndjson.gz', '.json.gz')
_ENDS = (*_LINES, *_COMPRESSED, '.json', '.parquet')
_CURE = 'give files of .jsonl, .jsonl.gz, .json or .parquet'


class Rows(Protocol):
    """Rows by their number, which know where they come from."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int, /) -> Row:
        """Returns a row, read when it is asked for."""

    def where(self, index: int) -> str:
        """What messages call a row, such as ``chats.jsonl:17``."""


def rows_of(source: Source, owner: str, columns: Sequence[str] = ()) -> Rows:
    """The rows of a source, each read when it is asked for.

    Args:
      source: the path of a file or directory, or a glob pattern; or a sequence of dicts, such as a
        list or a `datasets.Dataset`. Files end in .jsonl, .jsonl.gz, .json (a list of objects, or
        an object a line) or .parquet.
      owner: what messages begin with: the function that it was given to.
      columns: what the reader knows; other columns of a Parquet file are left on the disk if it has
        one of these.

    Raises:
      TypeError: if the source is neither.
      UsageError: if there are no rows, or a file cannot be read.

    >>> rows = rows_of([{'text': 'a'}], 'chat')
    >>> len(rows), rows[0], rows.where(0)
    (1, {'text': 'a'}, 'source[0]')
    """
    if isinstance(source, (str, os.PathLike)):
        return _of_files(source, columns)
    if isinstance(source, Mapping):
        raise TypeError(
            f'{owner}: source is a {type(source).__name__} of {", ".join(map(str, source))[:60]}, '
            "and no rows: choose one, e.g. source['train']"
        )
    if isinstance(source, bytes) or not all(
        hasattr(source, each) for each in ('__len__', '__getitem__')
    ):
        raise TypeError(
            f'{owner}: source must be a path or a sequence of rows, got '
            f'{type(source).__name__}: load a data set without streaming, or make a list of it'
        )
    if not len(source):
        raise UsageError(f'{owner}: source has no rows: give at least one')
    return _Given(source)


def _of_files(pattern: str | os.PathLike[str], columns: Sequence[str]) -> Rows:
    parts = [_of_file(path, tuple(columns)) for path in files.matching(pattern, None, _TABLES)]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise UsageError(f'{os.fspath(pattern)!r} has no rows: give files that hold some')
    return parts[0] if len(parts) == 1 else _Joined(tuple(parts))


def _of_file(path: str, columns: tuple[str, ...]) -> Rows:
    if path.endswith('.parquet'):
        from layercomb.data.finetuning.parquet import ParquetRows

        return ParquetRows(path, columns)
    if path.endswith((*_LINES, *_COMPRESSED)):
        return _Lines(path)
    if path.endswith('.json'):
        return _List(path) if _begins_with_bracket(path) else _Lines(path)
    raise UsageError(f'{path} is no table that can be read: {_CURE}')


@dataclass(frozen=True, eq=False)
class _Given:
    """Rows that were given.

    Attributes:
      source: a sequence of dicts.
    """

    source: checks.Source[Row]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Row:
        return _object(self.source[int(index)], self.where(index))

    def where(self, index: int) -> str:
        return f'source[{index}]'


@dataclass(frozen=True)
class _Lines:
    """A file of JSON lines. A plain one is read line by line; a gzip file is held in memory.

    Attributes:
      path: of the file.
    """

    path: str

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Row:
        where = self.where(index)
        line = self._found[1][index]
        if isinstance(line, int):
            with unreadable(self.path, _CURE), open(self.path, 'rb') as file:
                file.seek(line)
                line = file.readline()
        return _object(_parsed(line, where), where)

    def where(self, index: int) -> str:
        return f'{self.path}:{self._numbers[index]}'

    def __reduce__(self) -> Any:  # without the lines that were read
        return _Lines, (self.path,)

    @property
    def _numbers(self) -> Sequence[int]:
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[Sequence[int], Sequence[int | bytes]]:
        """Of each line its number, and its start in the file or, from gzip, its text."""
        numbers, starts, texts = array('q'), array('q'), []
        with unreadable(self.path, _CURE):
            for i, line in lines(self.path):
                numbers.append(i + 1)
                starts.append(line) if isinstance(line, int) else texts.append(line)
        return numbers, texts or starts


@dataclass(frozen=True)
class _List:
    """A JSON file of a list of objects, held in memory.

    Attributes:
      path: of the file.
    """

    path: str

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int, /) -> Row:
        return _object(self._all[index], self.where(index))

    def where(self, index: int) -> str:
        return f'{self.path}, entry {index + 1}'

    def __reduce__(self) -> Any:  # without its content
        return _List, (self.path,)

    @cached_property
    def _all(self) -> list[Any]:
        made = _parsed(files.read(self.path), self.path)
        return made if isinstance(made, list) else [made]


@dataclass(frozen=True, eq=False)
class _Joined:
    """The rows of several files, one after the other.

    Attributes:
      parts: the rows of each file.
    """

    parts: tuple[Rows, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Row:
        part, inside = self._place(index)
        return part[inside]

    def where(self, index: int) -> str:
        part, inside = self._place(index)
        return part.where(inside)

    def _place(self, index: int) -> tuple[Rows, int]:
        i = bisect.bisect_right(self._ends, index)
        return self.parts[i], index - (self._ends[i - 1] if i else 0)


def _begins_with_bracket(path: str) -> bool:
    with unreadable(path, _CURE), open(path, 'rb') as file:
        return file.read(4096).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'['


def _parsed(text: bytes | int, where: str) -> Any:
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as e:  # endless brackets
        said = e.msg if isinstance(e, json.JSONDecodeError) else type(e).__name__
        raise UsageError(f'{where} is no JSON ({said}): mend or remove it') from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise UsageError(
            f'{where} is {row!r:.40} and no object: give rows such as '
            '{"messages": [{"role": "user", "content": "Hello"}, …]}'
        )
    return row


def _is_table(path: str) -> bool:
    return path.endswith(_ENDS)


_TABLES = files.Kind('table', 'files of .jsonl, .jsonl.gz, .json or .parquet', _is_table)
