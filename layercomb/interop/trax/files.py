"""The files of a checkpoint of Trax 1.4.1, read with bounds: lengths are checked before memory.

``model.pkl.gz`` is a pickled dict. Its ``flat_weights`` is a list of arrays, or a number: then the
arrays are in ``model.weights.npy.gz`` beside it, in the format of `numpy.save`, one after another.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from layercomb import paths
from layercomb.errors import UsageError, machine_errors
from layercomb.interop.trax import pickles

T = TypeVar('T')

# Weights are noise, which does not shrink: 2 times is much. Zeros shrink a thousand times.
SLACK, RATIO = 2**26, 100
PIECE = 2**16
N_ARRAYS = 50_000
# As `numpy.save` writes it; no other order of keys and no other blanks.
_HEADER = re.compile(
    r"\{'descr': '([^']{1,8})', 'fortran_order': (False|True), "
    r"'shape': \(((?:[0-9]{1,12}(?:, [0-9]{1,12}){0,7},?)?)\), \} *\n"
)
_DTYPES = {'<f2': 'f2', '<f4': 'f4', '<f8': 'f8', '<u2': 'u2'}


class Header(NamedTuple):
    """What a file says of an array before its bytes.

    Attributes:
      dtype: a key of `pickles.DTYPES`; u2 are the bits of bfloat16.
      shape: of the array.
      is_fortran: whether the first axis runs fastest.
    """

    dtype: str
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def n_bytes(self) -> int:
        """How many bytes follow."""
        return math.prod(self.shape) * pickles.DTYPES[self.dtype].itemsize


class Weights:
    """The flat weights of a checkpoint: their shapes, and their values one after another.

    Attributes:
      what: the name of the file, for messages.
      shapes: of the arrays, in the order of Trax.
    """

    what: str
    shapes: list[tuple[int, ...]]

    def values(self) -> Iterator[np.ndarray]:
        """The arrays, float32, in the order of `shapes`."""
        raise NotImplementedError


class Pickled(Weights):
    """Weights that are inside the pickle.

    Args:
      what: the name of the file, for messages.
      flat: what ``flat_weights`` is.

    Raises:
      UsageError: if something among them is no array of floats.
    """

    def __init__(self, what: str, flat: list[Any]):
        if not all(isinstance(x, pickles.Array) for x in flat):
            raise UsageError(f'{what}: flat_weights holds other things than arrays: it is damaged')
        self.what, self._arrays = what, flat
        self.shapes = [x.shape for x in flat]
        for n, x in enumerate(flat):
            if x.dtype not in ('f2', 'f4', 'f8', 'u2', 'bfloat16'):
                _refuse_dtype(what, n, x.dtype)

    def values(self) -> Iterator[np.ndarray]:
        return (as_floats(x.value()) for x in self._arrays)


class Saved(Weights):
    """Weights in a file of arrays; all headers are read first, and no values.

    Args:
      path: of the file.

    Raises:
      UsageError: if the file cannot be read, or is damaged.
    """

    def __init__(self, path: Path):
        self.what, self._path = path.name, path
        self._headers = list(self._walk(lambda n, header, stream: stream.skip(header)))
        self.shapes = [header.shape for header in self._headers]

    def values(self) -> Iterator[np.ndarray]:
        return self._walk(self._value)

    def _value(self, n: int, header: Header, stream: Stream) -> np.ndarray:
        if n >= len(self._headers) or header != self._headers[n]:
            raise UsageError(f'{self.what} changed while it was read: load it again')
        flat = np.frombuffer(stream.read(header.n_bytes), pickles.DTYPES[header.dtype])
        return as_floats(flat.reshape(header.shape, order='F' if header.is_fortran else 'C'))

    def _walk(self, take: Callable[[int, Header, Stream], T]) -> Iterator[T]:
        """What `take` makes of each array, its number, its header, and the stream at its bytes."""
        with unpacked(self._path) as stream:
            n = 0
            while not stream.is_at_end():
                if n == N_ARRAYS:
                    raise UsageError(f'{self.what} has more than {N_ARRAYS:,} arrays: check it')
                yield take(n, header_of(stream, self.what, n), stream)
                n += 1


class Stream:
    """The bytes of a compressed file, no more than `room` in all.

    Args:
      file: the open file.
      what: its name, for messages.
      room: how many bytes it may have, unpacked.
    """

    def __init__(self, file: gzip.GzipFile, what: str, room: int):
        self._file, self._what, self._room = file, what, room
        self._next = b''

    def read(self, n: int) -> bytes:
        """The next n bytes.

        Raises:
          UsageError: if there are less, or more than there is room for.
        """
        return b''.join(self._pieces(n))

    def skip(self, header: Header) -> Header:
        """Passes over the bytes of an array, as `read` does, and returns its header."""
        for _ in self._pieces(header.n_bytes):
            pass
        return header

    def rest(self) -> bytes:
        """All bytes that are left."""
        pieces = []
        while not self.is_at_end():
            pieces.append(self.read(len(self._next)))
        return b''.join(pieces)

    def is_at_end(self) -> bool:
        """Whether no bytes are left."""
        if not self._next:
            self._next = self._file.read(PIECE)
        return not self._next

    def _pieces(self, n: int) -> Iterator[bytes]:
        self._room -= n
        if self._room < 0:
            raise UsageError(
                f'{self._what} unpacks to more than {RATIO} times its size, as no weights do: it '
                'is damaged, or made to fill the memory: check where it is from'
            )
        while n:
            if self.is_at_end():
                raise UsageError(f'{self._what} ends in the middle of an array: copy it again')
            piece, self._next = self._next[:n], self._next[n:]
            n -= len(piece)
            yield piece


@contextmanager
def unpacked(path: Path) -> Iterator[Stream]:
    """Opens a compressed file.

    Raises:
      UsageError: if it cannot be read, or is damaged; from what is done inside, too.
    """
    with machine_errors('check the path'):
        size = path.stat().st_size
        try:
            with gzip.open(path, 'rb') as file:
                yield Stream(file, path.name, SLACK + RATIO * size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise UsageError(
                f'{path.name} is damaged, or not compressed by gzip ({e}): copy it again'
            ) from None


def header_of(stream: Stream, what: str, n: int) -> Header:
    """Reads the header that `numpy.save` writes before an array.

    Args:
      stream: at the header of array n.
      what: the name of the file, for messages.
      n: the number of the array.

    Raises:
      UsageError: if it is none, or the array holds no floats.
    """
    start = stream.read(10)
    width = {b'\x93NUMPY\x01\x00': 2, b'\x93NUMPY\x02\x00': 4}.get(start[:8])
    if width is None:
        raise UsageError(f'{what} is damaged: array {n} has no header: copy it again')
    length = int.from_bytes(start[8:] + stream.read(width - 2), 'little')
    found = _HEADER.fullmatch(stream.read(min(length, 1000)).decode('latin-1'))
    if found is None:
        raise UsageError(f'{what} is damaged: the header of array {n} is none: copy it again')
    dtype, is_fortran, shape = found.groups()
    if dtype not in _DTYPES:
        _refuse_dtype(what, n, dtype)
    sizes = tuple(int(size) for size in shape.split(',') if size.strip())
    return Header(_DTYPES[dtype], sizes, is_fortran == 'True')


def as_floats(x: np.ndarray) -> np.ndarray:
    """The array as float32; 16-bit integers are the bits of bfloat16, as Trax writes it."""
    if x.dtype == np.uint16:
        x = x.view(pickles.DTYPES['bfloat16'])
    return x.astype(np.float32, copy=False)


def weights_of(path: Path) -> Weights:
    """The weights of a checkpoint.

    Args:
      path: of ``model.pkl.gz``.

    Raises:
      UsageError: if files cannot be read, are damaged, or are no checkpoint of Trax.
    """
    with unpacked(path) as stream:
        value = pickles.read(stream.rest(), path.name)
    if not isinstance(value, dict) or 'flat_weights' not in value:
        raise UsageError(
            f'{path.name} is no checkpoint of Trax 1.4.1, which has flat_weights: give the '
            'model.pkl.gz that its Loop wrote'
        )
    flat = value['flat_weights']
    if isinstance(flat, list | tuple):
        return Pickled(path.name, list(flat))
    beside = [path.with_name(f'{path.name}.npy')]
    if path.name.endswith('.pkl.gz'):
        beside.insert(0, path.with_name(path.name.removesuffix('pkl.gz') + 'weights.npy.gz'))
    for file in beside:
        if file.exists():
            return Saved(file)
    raise UsageError(
        f'{path.name} keeps its weights in {beside[0].name}, which is not there: copy it too'
    )


def checkpoint(path: Any) -> Path:
    """The path of ``model.pkl.gz``, from that of the file or its directory."""
    file = paths.local(path, 'path')
    return file / 'model.pkl.gz' if file.is_dir() else file


def _refuse_dtype(what: str, n: int, dtype: str) -> NoReturn:
    raise UsageError(f'{what}: array {n} holds {dtype}, and weights are floats: check the file')
