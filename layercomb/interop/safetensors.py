"""Weights as safetensors: one file, each array under its path; reading it runs no code.

The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError, machine_errors, require
from layercomb.interop.stored import Stored, are_sizes, mapped, parse_json

# The names of the format, and those of NumPy with ml_dtypes.
_DTYPES = {
    'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
    'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2', 'BOOL': 'bool',
    'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8',
    'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
}  # fmt: skip


def save_weights(path: str | Path, weights: Mapping[str, Any]) -> None:
    """Writes a tree of arrays, each of its own dtype (bfloat16 too), as one file.

    Args:
      path: of the file, ``….safetensors``; an existing file is replaced.
      weights: a nested dict of arrays, none of which may be a random key.

    Raises:
      UsageError: if safetensors is not installed, or the file cannot be written.
    """
    file = paths.local(path, 'path')
    arrays = {  # the format has no strides, so a view would be written in the wrong order
        name: np.array(jax.device_get(x), order='C') for name, x in trees.flatten(weights).items()
    }
    write_tensors(file, arrays, {'format': 'layercomb'})


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], about: dict[str, str]) -> None:
    """Writes arrays as one file.

    Args:
      path: absolute; an existing file is replaced.
      arrays: by name, in C order.
      about: the metadata of the file.

    Raises:
      UsageError: if safetensors is not installed, or the file cannot be written.
    """
    numpy = require('safetensors.numpy', 'export')
    from safetensors import SafetensorError

    # Arrays may be views of the file that is replaced, so it is not written to.
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    with machine_errors('free some space, or write elsewhere'):
        try:
            numpy.save_file(dict(arrays), part, about)
            part.replace(path)
        except SafetensorError as e:
            raise _of_the_system(e, path) from None
        finally:
            part.unlink(missing_ok=True)


def load_weights(path: str | Path) -> dict[str, Any]:
    """Reads a safetensors file as a tree.

    Args:
      path: of the file; a ``/`` in the name of an array separates levels of the tree.

    Returns:
      A nested dict of JAX arrays.

    Raises:
      UsageError: if safetensors is not installed, or the file does not exist, is damaged, or is
        no safetensors file.
    """
    numpy = require('safetensors.numpy', 'export')
    from safetensors import SafetensorError

    file = paths.local(path, 'path')
    with machine_errors('check the path'):
        try:
            return jax.tree.map(jnp.asarray, trees.unflatten(numpy.load_file(file)))
        except SafetensorError as e:
            raise UsageError(f'{str(file)!r} is no file of safetensors ({e})') from None


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, mapped; its header is compared with the file's length.

    Args:
      path: of the file, absolute.

    Returns:
      The tensors by name. Their numbers are read when they are asked for.

    Raises:
      UsageError: if it is no such file, is cut off, or its header lies: tensors that overlap, leave
        bytes out, go on past the end or are not as long as their shape says.
    """
    data = mapped(path)

    def damaged(what: str) -> UsageError:
        return UsageError(
            f'{path.name} is damaged or cut off ({what}; it has {len(data):,} bytes): download it '
            'again'
        )

    start = 8 + (int.from_bytes(bytes(data[:8]), 'little') if len(data) >= 8 else 0)
    if len(data) < 10 or start > len(data):
        raise damaged(f'its header would end at byte {start:,}')
    header = parse_json(bytes(data[8:start]), path.name)
    header.pop('__metadata__', None)
    made: dict[str, Stored] = {}
    end = start
    for name, entry in sorted(header.items(), key=_offset):
        dtype = _dtype(name, entry, path)
        shape, (first, last) = entry['shape'], entry['data_offsets']
        if start + first != end:
            raise damaged(f'the bytes of {name!r:.80} do not begin where those before it end')
        if last < first or start + last > len(data):
            raise damaged(f'{name!r:.80} would end at byte {start + last:,}')
        end = start + last
        made[name] = Stored(name, tuple(shape), dtype, data[start + first : end])
        if made[name].n_bytes != last - first:
            raise damaged(
                f'{name!r:.80} has {last - first:,} bytes, and its shape is {shape!r:.60}'
            )
    if end != len(data):
        raise damaged(f'the last {len(data) - end:,} bytes belong to no tensor')
    return made


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    """What tensors are sorted by; entries of another form come first, and are refused then."""
    offsets: Any = item[1].get('data_offsets') if isinstance(item[1], dict) else None
    if not are_sizes(offsets) or len(offsets) != 2:
        return -1, -1
    return offsets[0], offsets[1]


def _dtype(name: str, entry: Any, path: Path) -> np.dtype[Any]:
    """The dtype of an entry of the header, whose form is checked."""
    if _offset((name, entry))[0] < 0 or not are_sizes(entry.get('shape')):
        raise UsageError(f'{path.name}: the entry of {name!r:.80} is damaged: download it again')
    known = _DTYPES.get(entry['dtype']) if isinstance(entry.get('dtype'), str) else None
    if known is None:
        raise UsageError(
            f'{path.name}: {name!r:.80} is of type {entry.get("dtype")!r:.40}, and known are '
            f'{", ".join(_DTYPES)}: take the model in one of those'
        )
    return jnp.dtype(known)


def _of_the_system(error: Exception, file: Path) -> Exception:
    """The OSError behind an error of the library, or the error itself."""
    code = re.search(r'\(os error (\d+)\)', str(error))
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])), str(file))
