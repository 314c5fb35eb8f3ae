"""Weights as they are laid out here, in a folder of files that later loads map.

To lay out the blocks of a file, or to round a wide model, takes longer than anything else at a
start, and its result is always the same. `weights_of` keeps it, and maps it at the next start:
nothing is computed or copied, processes share the pages, and the system may drop those that it
needs otherwise, since they are in the file.

An entry is a magic word, the length of a header, a digest, the header in JSON, and the arrays, each
at a multiple of 64 bytes. It says what it was made of; if that has changed, or the entry is cut off
or damaged, it is made anew. It is written under another name and then renamed, so it is whole or
not there. Nothing in it is run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths
from layercomb.errors import UsageError, UsageWarning, machine_errors
from layercomb.interop.memory import free_bytes
from layercomb.interop.stored import are_sizes, parse_json
from layercomb.layers.quantized.panels import LAYOUT
from layercomb.transforms import buffers
from layercomb.version import __version__

LARGEST = 20_000_000_000  # bytes of all entries of a folder
UNUSED = 30 * 24 * 3600  # seconds after which an entry that nobody used is deleted
_NAME, _SUFFIX, _PART = 'layercomb-', '.weights', '.part'  # no other file is ever deleted
_ABANDONED = 24 * 3600  # seconds after which a file that was not finished is deleted
_MAGIC = b'LCWEIGHT'
_START = len(_MAGIC) + 8 + hashlib.sha256().digest_size  # bytes before the header
_LONGEST = 1 << 26  # bytes of a header
_FILES = ('*.json', '*.safetensors', '*.bin', '*/*.json')  # of a directory
_SAMPLES, _SAMPLE = 16, 1 << 16  # parts that the digest is of, besides the header, and their bytes

Flat = dict[str, jax.Array]


def weights_of(
    cache: str | Path | None, source: Path, options: Mapping[str, Any], make: Callable[[], Flat]
) -> Flat:
    """Weights from the cache; or made, put there, and mapped.

    A cache that cannot be used is no error: a warning says so, and the weights are made.

    Args:
      cache: a folder, which is made if it is not there; None makes the weights and writes nothing.
      source: the file or directory that they are made of.
      options: what else they depend on, for JSON. Versions of the library and of its layout count
        by themselves.
      make: makes the weights by path.

    Returns:
      The weights by path. What is mapped can only be read: JAX copies it where it is donated.

    Raises:
      UsageError: if the cache is no path of this machine.
    """
    if cache is None:
        return make()
    folder = paths.local(cache, 'cache')
    key = _key(source, options)
    name = hashlib.sha256(json.dumps([str(source.resolve()), dict(options)]).encode()).hexdigest()
    entry = folder / f'{_NAME}{name[:32]}{_SUFFIX}'
    found = _found(entry, key)
    if found is None:
        made = make()
        if key != _key(source, options):  # it was written to in the meantime
            return made
        try:
            _write(entry, key, made)
        except OSError as e:
            warnings.warn(
                f'the weights are not kept in {str(folder)!r} ({e.strerror or e}), so each start '
                'makes them anew: free some space there, or choose another folder, or none',
                UsageWarning,
                stacklevel=2,
            )
            return made
        found = _found(entry, key)
        if found is None:  # another process has replaced or deleted it
            return made
        made.clear()
        buffers.give_back()
    _tidy(folder, entry)
    return found


def _key(source: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that the weights depend on, as JSON gives it back."""
    if source.is_dir():
        found = (x for pattern in _FILES for x in source.glob(pattern))
        files = sorted(x for x in found if x.is_file())
    else:
        files = [source]
    with machine_errors('check the path'):
        known = [(file.resolve(), file.stat()) for file in files]
    return {
        'files': [[os.fsencode(x).hex(), it.st_size, it.st_mtime_ns] for x, it in known],
        'options': dict(options),
        'version': __version__,
        'layout': LAYOUT,
        'byte order': sys.byteorder,
    }


def _found(entry: Path, key: Mapping[str, Any]) -> Flat | None:
    """The weights of an entry, mapped; None if it is not there, damaged, or of something else."""
    try:
        data = buffers.mapped(entry)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    with contextlib.suppress(UsageError, LookupError, TypeError, ValueError):
        header = _header(data)
        if header['key'] == key and header['size'] == len(data):
            data = _quick(data)
            arrays = {name: _array(data, *it) for name, it in header['arrays'].items()}
            return {name: buffers.taken(x) for name, x in arrays.items()}
    return None


def _quick(data: np.ndarray) -> np.ndarray:
    """A mapped entry, or a copy in memory if that is read more quickly and there is room."""
    free = free_bytes()
    if buffers.is_quick(data) or free is None or free < 2 * len(data):
        return data
    copy = buffers.empty(data.shape, data.dtype)
    copy[:] = data
    return copy


def _header(data: np.ndarray) -> dict[str, Any]:
    """The header of an entry.

    Raises:
      ValueError: if it, or what is sampled of the arrays, is not as it was written.
      UsageError: if it is no JSON.
    """
    n = int.from_bytes(bytes(data[len(_MAGIC) : len(_MAGIC) + 8]), 'little')
    if bytes(data[: len(_MAGIC)]) != _MAGIC or n > min(_LONGEST, len(data) - _START):
        raise ValueError('no entry')
    if bytes(data[_START - hashlib.sha256().digest_size : _START]) != _digest(data, n):
        raise ValueError('damaged')
    return parse_json(bytes(data[_START : _START + n]), 'the header')


def _digest(data: np.ndarray, n: int) -> bytes:
    """Of a header of `n` bytes, and of parts of what is behind it."""
    made, size = hashlib.sha256(data[_START : _START + n].data), len(data)
    rest = data[_START + n :]
    for i in range(_SAMPLES):
        first = i * max(len(rest) - _SAMPLE, 0) // (_SAMPLES - 1)
        made.update(rest[first : first + _SAMPLE].data)
    made.update(size.to_bytes(8, 'little'))
    return made.digest()


def _array(data: np.ndarray, dtype: str, shape: list[int], first: int) -> np.ndarray:
    """An array of an entry, a view of it.

    Raises:
      ValueError, TypeError: if it does not lie in the entry.
    """
    if not are_sizes([*shape, first]) or first % buffers.ALIGNMENT:
        raise ValueError('damaged')
    kind = jnp.dtype(dtype)
    n = int(np.prod(shape, dtype=object)) * kind.itemsize
    if first + n > len(data):
        raise ValueError('cut off')
    return data[first : first + n].view(kind).reshape(shape)


def _write(entry: Path, key: Mapping[str, Any], weights: Flat) -> None:
    """Writes an entry, whole or not at all.

    Raises:
      OSError: if it cannot be written, or would take more than half of what is free.
    """
    header, size = _described(key, weights)
    if size > LARGEST:
        raise OSError(errno.EFBIG, f'{size:,} bytes are more than the {LARGEST:,} of the folder')
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if 2 * size > shutil.disk_usage(entry.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with _part(entry) as part:
        part.seek(_START)
        part.write(header)
        for x in weights.values():
            part.seek(-part.tell() % buffers.ALIGNMENT, os.SEEK_CUR)
            part.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        part.truncate(size)
        part.flush()
        with mmap.mmap(part.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            digest = _digest(np.frombuffer(mapped, np.uint8), len(header))
        part.seek(0)  # last, so that what was not finished is no entry
        part.write(_MAGIC + len(header).to_bytes(8, 'little') + digest)


def _described(key: Mapping[str, Any], weights: Flat) -> tuple[bytes, int]:
    """The header of an entry, and the size of the whole."""

    def header(start: int) -> tuple[bytes, int]:
        arrays, end = {}, start
        for name, x in weights.items():
            first = end + -end % buffers.ALIGNMENT
            arrays[name] = [str(x.dtype), list(x.shape), first]
            end = first + x.nbytes
        made = {'key': key, 'size': end, 'arrays': arrays}
        return json.dumps(made).encode(), end

    # Room for the numbers, which are longer when the header is counted.
    room = len(header(1 << 60)[0])
    made, size = header(_START + room)
    return made.ljust(room), size


@contextlib.contextmanager
def _part(entry: Path) -> Iterator[IO[bytes]]:
    """A file that becomes the entry at the end, and is removed after an error."""
    made, name = tempfile.mkstemp(_PART, _NAME, entry.parent)
    try:
        with os.fdopen(made, 'w+b') as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            if hasattr(os, 'posix_fadvise'):  # what was written in parts is cached in small pages
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(name, entry)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _tidy(folder: Path, used: Path) -> None:
    """Notes that an entry was used; deletes others that were not for long, and those too many."""
    now, total = time.time(), 0
    with contextlib.suppress(OSError):  # a folder that can only be read
        os.utime(used)
    known = []
    for file in folder.glob(f'{_NAME}*'):
        with contextlib.suppress(OSError):  # another process may have deleted it
            known.append((file.stat().st_mtime, file.stat().st_size, file))
    for last, size, file in sorted(known, reverse=True):
        if file.suffix == _PART:
            old = now - last > _ABANDONED
        elif file.suffix == _SUFFIX:
            total += size
            old = file != used and (now - last > UNUSED or total > LARGEST)
        else:
            continue
        if old:
            with contextlib.suppress(OSError):
                file.unlink()
