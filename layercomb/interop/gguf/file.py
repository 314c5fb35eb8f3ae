"""`File`: the metadata and tensors of a .gguf file, each checked against the file's length.

Whatever the header says (how many entries, how long a text is, where a tensor lies) is compared
with the bytes that are there before anything is made of it, so a file that is cut off or lies is
refused, and costs no memory. The tensors are views of the mapped file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from layercomb import paths
from layercomb.errors import UsageError, machine_errors
from layercomb.interop.gguf.blocks import BLOCKS, Blocks, name_of_type

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where the file says nothing
_MAX_AXES = 4
# The numbers of the format: what `struct` calls each kind of metadata.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q'}
_SCALARS |= {12: 'd'}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
      name: of the tensor.
      shape: outermost axis first; the last axis lies together.
      blocks: how its numbers are stored.
      data: its bytes, (rows, bytes of a row) uint8, a view of the file.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Blocks
    data: np.ndarray

    def forget(self) -> None:
        """Gives back the memory of what was read of the file; it is read again if it is needed."""
        mapped: Any = self.data
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        mapped = getattr(mapped, 'obj', mapped)  # of a memoryview
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, 'MADV_DONTNEED'):
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True, eq=False)
class File:
    """What is in a .gguf file.

    Attributes:
      path: of the file.
      metadata: by name: numbers, truth values, texts and lists of these.
      tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: str | Path) -> File:
    """Reads the header of a .gguf file and maps its tensors.

    Args:
      path: of the file.

    Raises:
      UsageError: if there is no such file, if it is no GGUF of a known version, is cut off or
        damaged, or holds tensors of a type that is not known.
    """
    file = paths.local(path, 'path')
    with machine_errors('check the path'), file.open('rb') as opened:
        size = file.stat().st_size
        if size < 24:
            raise UsageError(f'{str(file)!r} is no GGUF file: it has {size} bytes')
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(memoryview(mapped), str(file))
    try:
        n_tensors, n_entries = header.start()
        metadata = header.entries(n_entries)
        tensors = header.tensors(n_tensors, _alignment(header, metadata))
    except UnicodeDecodeError:
        raise header.damaged('a name or text is not UTF-8') from None
    return File(file, metadata, tensors)


class _Header:
    """A cursor in the bytes of a file, which never goes past their end."""

    def __init__(self, view: memoryview, path: str) -> None:
        self.view, self.path, self.at = view, path, 0

    def damaged(self, what: str) -> UsageError:
        return UsageError(
            f'{self.path!r} is damaged or cut off ({what}; it has {len(self.view):,} bytes): '
            'download it again'
        )

    def take(self, code: str) -> Any:
        """The next number."""
        size = struct.calcsize(f'<{code}')
        self.room(size, 'the header goes on past the end')
        (value,) = struct.unpack_from(f'<{code}', self.view, self.at)
        self.at += size
        return value

    def room(self, n_bytes: int, what: str) -> None:
        """Raises if there are fewer bytes left."""
        if n_bytes > len(self.view) - self.at:
            raise self.damaged(what)

    def text(self) -> str:
        n = self.take('Q')
        self.room(n, f'a text of {n:,} bytes is announced at byte {self.at:,}')
        made = str(self.view[self.at : self.at + n], 'utf-8')
        self.at += n
        return made

    def texts(self, n: int) -> list[str]:
        """The next texts, such as the tokens of a vocabulary, quickly."""
        made, view, length = [], self.view, struct.Struct('<Q')
        for _ in range(n):
            first = self.at + length.size
            end = first + length.unpack_from(view, self.at)[0] if first <= len(view) else first
            if end > len(view):
                self.text()  # raises, and says what is wrong
            made.append(str(view[first:end], 'utf-8'))
            self.at = end
        return made

    def start(self) -> tuple[int, int]:
        """Checks magic and version; returns how many tensors and entries are announced."""
        if bytes(self.view[:4]) != _MAGIC:
            raise UsageError(f'{self.path!r} is no GGUF file: it does not begin with "GGUF"')
        self.at = 4
        version = self.take('I')
        if version not in _VERSIONS:
            kind = 'for big-endian machines' if not version & 0xFFFF else f'of version {version}'
            raise UsageError(
                f'{self.path!r} is a GGUF file {kind}, and known are versions 2 and 3: convert the '
                'model again with a recent llama.cpp'
            )
        n_tensors, n_entries = self.take('Q'), self.take('Q')
        # An entry takes 13 bytes at least (the length of a name, a type, a byte); a tensor 32.
        self.room(13 * n_entries + 32 * n_tensors, f'{n_tensors:,} tensors are announced')
        return n_tensors, n_entries

    def entries(self, n: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(n):
            name = self.text()
            if name in made:
                raise self.damaged(f'{name[:80]!r} is there twice')
            made[name] = self.value(self.take('I'))
        return made

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.take('I'), self.take('Q'))
        if kind not in _SCALARS:
            raise self.damaged(f'metadata of the unknown kind {kind}')
        return self.take(_SCALARS[kind])

    def array(self, kind: int, n: int) -> list[Any]:
        what = f'a list of {n:,} values is announced at byte {self.at:,}'
        if kind == _STRING:
            self.room(8 * n, what)
            return self.texts(n)
        if kind not in _SCALARS:
            raise self.damaged(f'a list of the unknown kind {kind}')
        code = '<' + _SCALARS[kind]
        self.room(n * struct.calcsize(code), what)
        dtype = np.dtype(code)
        values = np.frombuffer(self.view, dtype, n, self.at)
        self.at += values.nbytes
        return list(values.tolist())

    def tensors(self, n: int, alignment: int) -> dict[str, Stored]:
        """The tensors, each within the file and none over another."""
        found: dict[str, tuple[tuple[int, ...], Blocks, int]] = {}
        for _ in range(n):
            name = self.text()
            if name in found:
                raise self.damaged(f'the tensor {name[:80]!r} is there twice')
            found[name] = self.tensor(name, alignment)
        start = -(-self.at // alignment) * alignment
        made, places = {}, []
        for name, (shape, blocks, offset) in found.items():
            rows = math.prod(shape[:-1])
            n_bytes = rows * blocks.row_bytes(shape[-1])
            first, end = start + offset, start + offset + n_bytes
            if end > len(self.view):
                raise self.damaged(f'the tensor {name[:80]!r} ends at byte {end:,}')
            places.append((first, end, name))
            data = np.frombuffer(self.view, np.uint8, n_bytes, first)
            made[name] = Stored(name, shape, blocks, data.reshape(rows, -1))
        places.sort()
        for (_, end, name), (first, _, other) in itertools.pairwise(places):
            if first < end:
                raise self.damaged(f'the tensors {name[:80]!r} and {other[:80]!r} overlap')
        return made

    def tensor(self, name: str, alignment: int) -> tuple[tuple[int, ...], Blocks, int]:
        """The shape, type and offset of the next tensor."""
        n_axes = self.take('I')
        if not 0 < n_axes <= _MAX_AXES:
            raise self.damaged(f'the tensor {name[:80]!r} has {n_axes} axes')
        shape = tuple(self.take('Q') for _ in range(n_axes))[::-1]
        kind, offset = self.take('I'), self.take('Q')
        if 0 in shape or math.prod(shape) >= 2**63:
            raise self.damaged(f'the tensor {name[:80]!r} is {shape}')
        if kind not in BLOCKS:
            raise UsageError(
                f'{self.path!r}: the tensor {name[:80]!r} is of type {name_of_type(kind)}, and '
                f'known are {", ".join(b.name for b in BLOCKS.values())}: take the model in one of '
                'those'
            )
        blocks = BLOCKS[kind]
        if shape[-1] % blocks.size:
            raise self.damaged(f'rows of {shape[-1]} in the {blocks.name} tensor {name[:80]!r}')
        if offset % alignment:
            raise self.damaged(f'the tensor {name[:80]!r} is not aligned')
        return shape, blocks, offset


def _alignment(header: _Header, metadata: dict[str, Any]) -> int:
    """To how many bytes tensors are aligned."""
    value = metadata.get('general.alignment', _ALIGNMENT)
    known = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**20
    if not known or value & (value - 1):
        raise header.damaged(f'tensors are aligned to {value!r:.40} bytes')
    return int(value)
