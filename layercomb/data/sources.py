"""Sources of documents: sequences with random access, read when they are asked for."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from layercomb import paths
from layercomb.data import files
from layercomb.errors import UsageError, require

# Linux distributions leave out the tests; without them the data is nearly the same everywhere.
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
        return files.read(self.paths[index])


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
    files.check_split(split)
    root = sysconfig.get_paths()['stdlib']
    found = [path for path in files.walk(root, skip=_NOT_LIBRARY) if path.endswith('.py')]
    chosen = [
        path for path in files.of_split(found, root, split) if files.is_utf8(files.read(path))
    ]
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
        directory, for all text files in it (UTF-8 without NUL), except hidden ones.
      split: None for all files, or 'train', 'valid', 'test' for about 90, 5 and 5 % of them, chosen
        by a checksum of the path below the pattern's fixed part.

    Raises:
      TypeError: if the pattern is no path.
      ValueError: if there is no such split.
      UsageError: if nothing is left to read.
    """
    chosen = files.matching(pattern, split, files.TEXT)
    if not any(os.path.getsize(path) for path in chosen):
        raise UsageError(
            f'the files of {os.fsdecode(pattern)!r} are empty: give files that hold text'
        )
    return TextFiles(chosen)


def tfds(
    name: str,
    split: str = 'train',
    data_dir: str | None = None,
    feature: str | Sequence[str] = 'text',
) -> Sequence[Any]:
    """Returns a data set of TensorFlow Datasets that was prepared as ArrayRecord.

    TensorFlow is not needed to read it. Prepare the data set once, on a machine where its builder
    runs: `tfds build NAME --file_format=array_record`.

    Args:
      name: the data set, with its config if it has one, e.g. 'c4/en'.
      split: a split or a slice of one, e.g. 'train' or 'train[:90%]'.
      data_dir: where it was prepared; by default ~/tensorflow_datasets.
      feature: the name of a text feature, for documents (bytes); or a pair such as
        ('image', 'label'), for examples (inputs, targets, loss_weights) that `batches` takes. uint8
        arrays become float32 in 0 … 1, integers int32; the weight is 1.

    Raises:
      TypeError: if a name is no string.
      UsageError: if tensorflow-datasets, the data set, the split or the feature is missing.
    """
    names = (feature,) if isinstance(feature, str) else tuple(feature)
    if len(names) not in (1, 2) or not all(isinstance(x, str) for x in (name, split, *names)):
        raise TypeError(
            f'name={name!r}, split={split!r}, feature={feature!r}: give strings, '
            "and for feature one name or a pair, e.g. ('image', 'label')"
        )
    records = tfds_records(name, split, data_dir, names)
    if len(names) == 2:
        return Mapped(records, partial(_example, inputs=names[0], targets=names[1]))
    if not isinstance(records[0][names[0]], (bytes, str)):
        raise UsageError(
            f'feature {names[0]!r} of {name!r} is no text: '
            "name a text feature, or a pair such as ('image', 'label')"
        )
    return Mapped(records, partial(_text, feature=names[0]))


@dataclass(frozen=True, eq=False)
class Mapped(Sequence[Any]):
    """f(x) for each x of a source, each computed when it is asked for.

    Attributes:
      source: a sequence.
      f: a function of one element.
    """

    source: Any
    f: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(self.source[index], self.f)
        return self.f(self.source[index])


def labelled(x: Any, label: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An example (inputs, targets, loss_weights) for a classifier.

    Args:
      x: inputs; arrays of uint8 become float32 in 0 … 1.
      label: a class, which becomes int32.

    Returns:
      (inputs, targets, loss_weights), of weight 1.
    """
    return _plain(x), _plain(label), np.ones((), np.float32)


def tfds_records(name: str, split: str, data_dir: str | None, features: Sequence[str]) -> Any:
    """The records of a prepared data set; each has all of `features`.

    Raises:
      UsageError: as `tfds`.
    """
    records = _records(name, split, data_dir)
    if len(records) == 0:
        raise UsageError(f'split {split!r} of {name!r} is empty: give another split')
    first = records[0]
    for x in features:
        if x not in first:
            raise UsageError(
                f'{name!r} has no feature {x!r}: choose from {", ".join(sorted(first))}'
            )
    return records


def _text(record: Any, feature: str) -> bytes:
    text = record[feature]
    return text.encode() if isinstance(text, str) else text


def _example(record: Any, inputs: str, targets: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return labelled(record[inputs], record[targets])


def _plain(x: Any) -> np.ndarray:
    """`x` as float32 or int32, the types that models take."""
    x = np.asarray(x)
    if x.dtype == np.uint8 and x.ndim:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.int32 if x.dtype.kind in 'iub' else np.float32)


def _records(name: str, split: str, data_dir: str | None) -> Any:
    if data_dir is not None:
        data_dir = str(paths.local(data_dir, 'data_dir'))
    library = require('tensorflow_datasets', 'tfds')
    build = f'tfds build {name} --file_format=array_record'
    if data_dir is not None:
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
