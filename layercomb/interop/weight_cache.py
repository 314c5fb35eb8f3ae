"""Weights as they are laid out here, in a folder of files that later loads map.

To lay out the blocks of a file, or to round a wide model, takes longer than anything else at a
start, and its result is always the same. `weights_of` keeps it, and maps it at the next start:
nothing is computed or copied, processes share the pages, and the system can drop these pages when
memory is short, and read them again.

An entry is a magic word, the length of a header, a digest, the header in JSON, and the arrays, each
at a multiple of 64 bytes. It says what it was made of; if that has changed, if the entry is cut
off, or if its header is damaged, it is made anew. Of the arrays themselves parts are checked, at
most 1 MiB, or else starts would not be quick. It is written under another name and then renamed, so
it is whole or not there. Nothing in it is run, but its numbers are believed: the folder must be
private. One that others may write is not used, and entries must be owned by this user or by root.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError, UsageWarning
from layercomb.interop.kept import entries, sources
from layercomb.interop.kept.entries import MAGIC
from layercomb.interop.kept.sources import Seen
from layercomb.interop.memory import free_bytes, is_cpu
from layercomb.interop.stored import are_sizes, parse_json
from layercomb.layers.quantized.panels import LAYOUT
from layercomb.transforms import buffers
from layercomb.trees import Tree
from layercomb.version import __version__

_START = len(MAGIC) + 8 + hashlib.sha256().digest_size  # bytes before the header
_LONGEST = 1 << 26  # bytes of a header
_SAMPLES, _SAMPLE = 16, 1 << 16  # parts that the digest is of, besides the header, and their bytes

Flat = dict[str, jax.Array]


def look(cache: str | Path | None, path: Path) -> Seen | None:
    """What weights will be made of, for `weights_of`: to be asked before anything of it is read.

    Args:
      cache: as of `weights_of`.
      path: of the file or directory.
    """
    return None if cache is None else sources.look(path)


def weights_of(
    cache: str | Path | None,
    source: Seen | None,
    options: Mapping[str, Any],
    model: Any,
    make: Callable[[], Flat],
) -> Flat:
    """Weights from the cache; or made, put there, and mapped.

    A cache that cannot be used is no error: a warning says so, and the weights are made.

    Args:
      cache: a folder, which is made if it is not there, and must be private; None makes the weights
        and writes nothing.
      source: what they are made of, by `look`; None makes them and writes nothing.
      options: what else they depend on, for JSON. Versions of the library and of its layout count
        by themselves.
      model: what the model has to get, such as `described` shapes, for JSON. An entry of another
        model is made anew.
      make: makes the weights by path.

    Returns:
      The weights by path. What is mapped can only be read: JAX copies it where it is donated.

    Raises:
      UsageError: if the cache is no path of this machine.
    """
    if cache is None:
        return make()
    folder = paths.local(cache, 'cache')
    if not entries.is_private(folder):
        _warn(
            f'the weights are not kept in {str(folder)!r}, where others may write, so each start '
            'makes them anew: take that away (chmod go-w), or choose another folder, or none'
        )
        return make()
    # What was read so far is of the files as they are, or nothing of the cache fits it.
    if source is None or not source.is_unchanged():
        return make()
    name = json.dumps([str(source.path.resolve()), options], sort_keys=True)
    entry = entries.entry_of(folder, name)
    key = _key(source, options, model)
    found = _found(entry, key)
    if found is None:
        return _made(entry, key, source, make)
    entries.tidy(folder, entry)
    return found


def described(shapes: Tree) -> dict[str, list[Any]]:
    """Shapes and dtypes by path, for JSON.

    Args:
      shapes: arrays, or `jax.ShapeDtypeStruct`.
    """
    flat = trees.flatten(shapes)
    return {path: [str(x.dtype), *x.shape] for path, x in flat.items()}


def _key(source: Seen, options: Mapping[str, Any], model: Any) -> str:
    """All that the weights depend on, in JSON: so tuples, and numbers that are none, are equal."""
    known = {
        'files': source.files,
        'options': options,
        'model': model,
        'version': __version__,
        'layout': LAYOUT,
        'byte order': sys.byteorder,
    }
    return json.dumps(known, sort_keys=True)


def _made(entry: Path, key: str, source: Seen, make: Callable[[], Flat]) -> Flat:
    """Makes weights, and puts them into the cache if nothing stands in the way."""
    made = make()
    if not source.is_unchanged():  # it was written to, replaced or deleted in the meantime
        return made
    try:
        _write(entry, key, made)
    except OSError as e:
        if e.errno == errno.EFBIG:
            return made  # nothing can be done about it
        cure = 'choose another folder, or none'
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            n_bytes = 2 * sum(x.nbytes for x in made.values())  # no more than half is taken
            cure = f'see that {n_bytes / 1e6:,.0f} MB are free there, or {cure}'
        _warn(
            f'the weights are not kept in {str(entry.parent)!r} ({e.strerror or e}), so each start '
            f'makes them anew: {cure}'
        )
        return made
    if not is_cpu():  # to map the entry would put all weights on the device once more
        return made
    found = _found(entry, key)
    if found is None:  # another process has replaced or deleted it
        return made
    made.clear()
    buffers.give_back()
    return found


def _warn(message: str) -> None:
    warnings.warn(message, UsageWarning, stacklevel=3)


def _found(entry: Path, key: str) -> Flat | None:
    """The weights of an entry, mapped; None if it is not there, damaged, or of something else."""
    if not entries.is_own(entry):
        return None
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
    """A mapped entry, or a copy in memory if that is read more quickly and there is room.

    Off a CPU all goes to the device once, so the file is as good.
    """
    if not is_cpu():
        return data
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
    n = int.from_bytes(bytes(data[len(MAGIC) : len(MAGIC) + 8]), 'little')
    if bytes(data[: len(MAGIC)]) != MAGIC or n > min(_LONGEST, len(data) - _START):
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


def _write(entry: Path, key: str, weights: Flat) -> None:
    """Writes an entry, whole or not at all.

    Raises:
      OSError: if it cannot be written, or would take more than half of what is free.
    """
    header, size = _described(key, weights)
    if size > entries.LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    entries.make_room(entry.parent, entry, size)
    with entries.part_of(entry) as part:
        part.seek(_START)
        part.write(header)
        for x in weights.values():
            part.seek(-part.tell() % buffers.ALIGNMENT, os.SEEK_CUR)
            # Off a CPU, JAX would keep what it brings to the host as long as the array: of a copy.
            x = x if is_cpu() else jnp.copy(x)
            part.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        part.truncate(size)
        part.flush()
        with mmap.mmap(part.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            digest = _digest(np.frombuffer(mapped, np.uint8), len(header))
        part.seek(0)  # last, so that what was not finished is no entry
        part.write(MAGIC + len(header).to_bytes(8, 'little') + digest)


def _described(key: str, weights: Flat) -> tuple[bytes, int]:
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
