"""Rows of a Parquet file, a group of rows at a time."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

from layercomb.errors import UsageError, one_line, require

_HELD = 256 << 20  # bytes of row groups that are kept


@dataclass(frozen=True)
class ParquetRows:
    """The rows of a Parquet file as dicts, each read when it is asked for.

    Row groups are read as they are needed, and the latest of them kept, up to 256 MiB. Rows of a
    larger file in random order read whole groups again and again: open such a file by the library
    datasets, which maps it into memory, and give its rows.

    Attributes:
      path: of the file.
      columns: which to read, if the file has one of them; otherwise all.

    Raises:
      UsageError: if pyarrow is not installed, or cannot read the file.
    """

    path: str
    columns: tuple[str, ...] = ()
    _kept: OrderedDict[int, Any] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )
    _alone: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        with self._alone:  # a thread reads ahead
            table = self._group(group)
        rows: list[dict[str, Any]] = table.slice(index - start, 1).to_pylist()
        return rows[0]

    def where(self, index: int) -> str:
        """What messages call a row: they are counted from 1, as lines are."""
        return f'{self.path}, row {index + 1}'

    def __reduce__(self) -> Any:  # without the groups that were read
        return ParquetRows, (self.path, self.columns)

    @cached_property
    def _file(self) -> Any:
        parquet = require('pyarrow.parquet', 'tables')
        return self._guarded(lambda: parquet.ParquetFile(self.path, memory_map=True))

    @cached_property
    def _ends(self) -> list[int]:
        meta = self._file.metadata
        sizes = (meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        return list(itertools.accumulate(sizes))

    @cached_property
    def _columns(self) -> list[str] | None:
        found = [name for name in self._file.schema_arrow.names if name in self.columns]
        return found or None

    def _group(self, i: int) -> Any:
        """A row group as an Arrow table."""
        if i in self._kept:
            self._kept.move_to_end(i)
            return self._kept[i]
        table = self._guarded(lambda: self._file.read_row_group(i, columns=self._columns))
        self._kept[i] = table
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > _HELD:
            self._kept.popitem(last=False)
        return table

    def _guarded(self, read: Any) -> Any:
        try:
            return read()
        except UsageError:
            raise
        except Exception as e:
            raise UsageError(
                f'{self.path} cannot be read as Parquet ({one_line(e):.120}): give another file'
            ) from None
