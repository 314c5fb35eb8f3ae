"""Where documents come from: sequences with random access, read when they are asked for."""

from __future__ import annotations

import glob
import os
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layercomb.errors import UsageError, require

# Linux distributions leave the tests out: without them the data is nearly the same everywhere.
_NOT_LIBRARY = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'}


@dataclass(frozen=True)
class TextFiles(Sequence[bytes]):
    """Files as documents, in the order of their paths.

    Attributes:
      paths: the files.
    """

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return TextFiles(self.paths[index])
        return _read(self.paths[index])


def python_stdlib(split: str = 'train') -> TextFiles:
    """Returns the sources of this Python's own standard library: real text on every machine.

    Each file is a document and belongs to one split for good: a checksum of its relative path
    sends about 90 % of the files to 'train', 5 % to 'valid' and 5 % to 'test'. The library's tests
    (which many systems do not install) and installed packages are left out.

    Args:
      split: 'train', 'valid' or 'test'.

    Raises:
      ValueError: if there is no such split.
      UsageError: if this Python keeps no sources.
    """
    _check_split(split)
    root = sysconfig.get_paths()['stdlib']
    files = [path for path in _walk(root, skip=_NOT_LIBRARY) if path.endswith('.py')]
    chosen = [path for path in _split(files, root, split) if _is_utf8(_read(path))]
    if not chosen:
        raise UsageError(
            f'no Python sources of split {split!r} in {root}: '
            'this Python keeps none, so use data.text_files() on text of your own'
        )
    return TextFiles(tuple(chosen))


def text_files(pattern: str, split: str | None = None) -> TextFiles:
    """Returns the files that match a pattern, one document each.

    Args:
      pattern: a glob pattern, where `**` stands for any directories and `~` for the home; or a
        directory, for all text files in it (UTF-8 without NUL; hidden ones are passed over).
      split: None for all files, or 'train', 'valid', 'test' for about 90, 5 and 5 % of them, which
        go by a checksum of the path below the pattern's fixed part.

    Raises:
      TypeError: if the pattern is no string.
      ValueError: if there is no such split.
      UsageError: if nothing is left to read.
    """
    if not isinstance(pattern, (str, os.PathLike)):
        raise TypeError(f"pattern={pattern!r}: give a glob pattern, e.g. 'texts/**/*.txt'")
    if split is not None:
        _check_split(split)
    where = os.path.expanduser(os.fspath(pattern))
    if os.path.isdir(where):
        root, files = where, [path for path in _walk(where) if _looks_like_text(path)]
        if not files:
            raise UsageError(f'no text file in {where!r}: give a directory that holds UTF-8 text')
    else:
        root = _fixed_part(where)
        files = sorted(path for path in glob.glob(where, recursive=True) if os.path.isfile(path))
        if not files:
            raise UsageError(
                f'no file matches {where!r}: check the pattern, or give an absolute path'
            )
    chosen = files if split is None else _split(files, root, split)
    if not chosen:
        raise UsageError(
            f'none of the {len(files)} files of {where!r} is in split {split!r}: '
            'give more files, or split=None'
        )
    if not any(os.path.getsize(path) for path in chosen):
        raise UsageError(f'the files of {where!r} are empty: give files that hold text')
    return TextFiles(tuple(chosen))


def tfds(
    name: str,
    split: str = 'train',
    data_dir: str | None = None,
    feature: str | Sequence[str] = 'text',
) -> Sequence[Any]:
    """Returns a data set of TensorFlow Datasets that was prepared as ArrayRecord.

    TensorFlow is not needed. Prepare a data set once, on a machine that has what its builder needs:
    `tfds build NAME --file_format=array_record`.

    Args:
      name: the data set, with its config if it has one: 'c4/en'.
      split: a split or a slice of one: 'train', 'train[:90%]'.
      data_dir: where it was prepared; by default ~/tensorflow_datasets.
      feature: the name of a text feature, for documents (bytes); or a pair such as
        ('image', 'label'), for examples (inputs, targets, loss_weights) that `batches` takes. uint8
        arrays become float32 in 0 … 1, integers int32; the weight is 1.

    Raises:
      TypeError: if a name is no string.
      UsageError: if tensorflow-datasets is missing, or the data set, split or feature is.
    """
    names = (feature,) if isinstance(feature, str) else tuple(feature)
    if len(names) not in (1, 2) or not all(isinstance(x, str) for x in (name, split, *names)):
        raise TypeError(
            f'name={name!r}, split={split!r}, feature={feature!r}: give strings, '
            "and for feature one name or a pair, e.g. ('image', 'label')"
        )
    records = _records(name, split, data_dir)
    if len(records) == 0:
        raise UsageError(f'split {split!r} of {name!r} is empty: give another split')
    first = records[0]
    for x in names:
        if x not in first:
            raise UsageError(
                f'{name!r} has no feature {x!r}: choose from {", ".join(sorted(first))}'
            )
    if len(names) == 2:
        return _Pairs(records, names[0], names[1])
    if not isinstance(first[names[0]], (bytes, str)):
        raise UsageError(
            f'feature {names[0]!r} of {name!r} is no text: '
            "name a text feature, or a pair such as ('image', 'label')"
        )
    return _Texts(records, names[0])


@dataclass(frozen=True)
class _Texts(Sequence[bytes]):
    records: Any
    feature: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        text = self.records[index][self.feature]
        return text.encode() if isinstance(text, str) else text


@dataclass(frozen=True)
class _Pairs(Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    records: Any
    inputs: str
    targets: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index]
        return _plain(record[self.inputs]), _plain(record[self.targets]), np.float32(1)


def _plain(x: Any) -> np.ndarray:
    """`x` in a type that models compute in."""
    x = np.asarray(x)
    if x.dtype == np.uint8 and x.ndim:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.int32 if x.dtype.kind in 'iub' else np.float32)


def _records(name: str, split: str, data_dir: str | None) -> Any:
    library = require('tensorflow_datasets', 'tfds')
    build = f'tfds build {name} --file_format=array_record'
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
        build += f' --data_dir={data_dir}'
    try:
        builder = library.builder(name, data_dir=data_dir)
    except ValueError as e:
        raise UsageError(
            f'{_first_line(e)} Check name={name!r} and data_dir={data_dir!r}, '
            'or see the list at tensorflow.org/datasets'
        ) from None
    if not builder.info.splits:
        raise UsageError(f'{name!r} is not prepared in {builder.data_dir}: run {build}')
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:
        raise UsageError(
            f'{name!r} in {builder.data_dir} is no ArrayRecord: remove it and run {build}'
        ) from None
    except ValueError:
        raise UsageError(
            f'{name!r} has no split {split!r}: '
            f'give one of {", ".join(builder.info.splits)}, or a slice of it'
        ) from None


def _first_line(error: Exception) -> str:
    line = str(error).strip().split('\n', 1)[0]
    return line if line.endswith('.') else line + '.'


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UsageError(f'cannot read {path}: {e.strerror}') from None


def _walk(root: str, skip: Iterable[str] = ()) -> list[str]:
    """The files below a directory, sorted; hidden ones and the directories in `skip` left out."""
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip and not name.startswith('.')]
        found += [os.path.join(directory, name) for name in files if not name.startswith('.')]
    return sorted(found)


def _check_split(split: str) -> None:
    if split not in ('train', 'valid', 'test'):
        raise ValueError(f"split={split!r}: choose 'train', 'valid' or 'test'")


def _split(files: Iterable[str], root: str, split: str) -> list[str]:
    return [path for path in files if _split_of(os.path.relpath(path, root)) == split]


def _split_of(relative_path: str) -> str:
    bucket = zlib.crc32(Path(relative_path).as_posix().encode('utf-8', 'surrogateescape')) % 20
    return {0: 'valid', 1: 'test'}.get(bucket, 'train')


def _fixed_part(pattern: str) -> str:
    """The directories of a pattern before its first wildcard."""
    parts = Path(pattern).parts[:-1]
    wild = (i for i, part in enumerate(parts) if glob.has_magic(part))
    return os.path.join(*parts[: next(wild, len(parts))], '')


def _is_utf8(document: bytes) -> bool:
    try:
        document.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


def _looks_like_text(path: str) -> bool:
    """Whether the start of a file is UTF-8 without NUL; a character may be cut at its end."""
    try:
        with open(path, 'rb') as f:
            head = f.read(1 << 16)
    except OSError:
        return False
    return b'\0' not in head and any(_is_utf8(head[: len(head) - cut]) for cut in range(4))
