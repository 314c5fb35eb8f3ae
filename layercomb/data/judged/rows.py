"""Rows of a table, dicts, from a file or from a sequence that is there."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.data import checks, files
from layercomb.data.finetuning.rows import rows_of
from layercomb.errors import UsageError

_SEPARATORS = {'.csv': ',', '.tsv': '\t'}
_LINES = ('.jsonl', '.jsonl.gz')
_OTHERS = ('.ndjson', '.ndjson.gz', '.json', '.json.gz', '.parquet')


def rows(owner: str, source: Any) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a source, each after the words by which messages call its place.

    Args:
      owner: what messages begin with: the function that the source was given to.
      source: the path of a .jsonl (.gz), .json or .parquet file, or of a .csv or .tsv file in
        UTF-8, whose first line names the columns; or a sequence of dicts.

    Raises:
      TypeError: if it is neither.
      ValueError: if it is an empty sequence.
      UsageError: if the file cannot be read, has no rows, or is of another kind; if a row is no
        dict.
    """
    if not isinstance(source, (str, os.PathLike)):
        given = checks.source(owner, source)
        return [(f'row {i}', _checked(owner, f'row {i}', given[i])) for i in range(len(given))]
    path = paths.local(source, 'source')
    name = path.name.lower()
    if name.endswith(_LINES):
        found = _of_lines(owner, path)
    elif name.endswith(_OTHERS):
        table = rows_of(str(path), owner)
        found = [
            (table.where(i), _checked(owner, table.where(i), table[i])) for i in range(len(table))
        ]
    elif path.suffix.lower() in _SEPARATORS:
        found = _of_table(path, _SEPARATORS[path.suffix.lower()])
    else:
        kinds = ', '.join(('.jsonl', '.jsonl.gz', '.json', '.parquet', *_SEPARATORS))
        raise UsageError(f'{owner}: {str(path)!r} is none of {kinds}: save it as one of them')
    if not found:
        raise UsageError(f'{owner}: {str(path)!r} has no rows: give a file that holds some')
    return found


def text_of(owner: str, where: str, row: Mapping[str, Any], name: str) -> str:
    """A text in a row.

    Raises:
      UsageError: if there is none, or it is empty.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UsageError(f'{owner}: {name!r} of {where} is {value!r:.40} and no text: give one')
    if not value.strip():
        raise UsageError(f'{owner}: {name!r} of {where} is empty: write a text, or leave it out')
    return value


def _of_lines(owner: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for i, line in enumerate(_text(path).split('\n')):
        if not line.strip():
            continue
        where = f'{path}:{i + 1}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f'{owner}: {where} is no JSON: give an object in each line') from None
        found.append((where, _checked(owner, where, row)))
    return found


def _of_table(path: Path, separator: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=''), delimiter=separator, strict=True)
    found = []
    try:
        for row in reader:
            where = f'{path}:{reader.line_num}'
            if None in row or None in row.values():
                raise UsageError(
                    f'{where} has not the {len(reader.fieldnames or ())} columns of the first '
                    'line: quote texts that hold the separator or an end of line'
                )
            found.append((where, row))
    except csv.Error as e:
        raise UsageError(f'{path}:{reader.line_num}: {e}: save the table anew') from None
    return found


def _text(path: Path) -> str:
    data = files.read(str(path))
    try:
        data = gzip.decompress(data) if path.name.lower().endswith('.gz') else data
        return data.decode('utf-8-sig')
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise UsageError(f'cannot read {str(path)!r} ({e}): save it as UTF-8') from None


def _checked(owner: str, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise UsageError(f'{owner}: {where} is {row!r:.40} and no object: give names with values')
    return dict(row)
