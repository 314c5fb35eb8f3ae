"""The tensors in a ``pytorch_model.bin``, without running what is in it.

Such a file is a zip whose ``data.pkl`` is a program for the pickle machine. It is read here by a
machine of our own, which knows the instructions that make tuples, lists, dicts, texts and numbers,
and three functions of torch, all of which only describe tensors. Nothing is ever imported or
called; what the program asks for beside these is refused by name.

The format: https://github.com/pytorch/pytorch/blob/main/torch/serialization.py and
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError, machine_errors
from layercomb.interop.stored import Stored, are_sizes, is_size, mapped

_STORAGES = {
    'DoubleStorage': 'float64', 'FloatStorage': 'float32', 'HalfStorage': 'float16',
    'BFloat16Storage': 'bfloat16', 'LongStorage': 'int64', 'IntStorage': 'int32',
    'ShortStorage': 'int16', 'CharStorage': 'int8', 'ByteStorage': 'uint8', 'BoolStorage': 'bool',
}  # fmt: skip
_CURE = (
    'save the model again by save_pretrained(directory, safe_serialization=True), where you trust '
    'the file'
)
_LOCAL = struct.Struct('<4s5H3L2H')  # the header before each record of a zip
_MOST = 1 << 26  # bytes of data.pkl
_DEEPEST = 32  # axes of a tensor


@dataclasses.dataclass(frozen=True)
class _Named:
    """A function or class that the program names; it is never imported."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A record of numbers."""

    key: str
    dtype: str
    n: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as the program describes it."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file that ``torch.save`` wrote, mapped.

    Args:
      path: of the file, absolute.

    Returns:
      The tensors by name.

    Raises:
      UsageError: if it is no such file, is of the format before torch 1.6, is cut off or damaged,
        or asks for anything but tensors.
    """
    data = mapped(path)
    with machine_errors('check the path'), path.open('rb') as opened:
        try:
            archive = zipfile.ZipFile(opened)
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError):
            raise UsageError(
                f'{path.name} is no file of torch 1.6 or later, or is damaged: {_CURE}'
            ) from None
        records = _records(archive, data, path.name)
    program = records.get('data.pkl')
    if program is None or len(program) > _MOST:
        raise UsageError(f'{path.name} holds no data.pkl as torch writes it: {_CURE}')
    if bytes(records.get('byteorder', np.zeros(0, np.uint8))) not in (b'', b'little'):
        raise UsageError(f'{path.name} was written on a big-endian machine: {_CURE}')
    try:
        found = _run(bytes(program))
    except UsageError as e:
        raise UsageError(f'{path.name} {e}: {_CURE}') from None
    except Exception:  # whatever a damaged program does to the stack
        raise UsageError(f'{path.name} is damaged: {_CURE}') from None
    if not isinstance(found, dict):
        raise UsageError(f'{path.name} holds no dict of tensors: {_CURE}')
    return {name: _stored(name, view, records, path.name) for name, view in found.items()}


def _records(archive: zipfile.ZipFile, data: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The bytes of each record, by its name in the archive's one directory."""
    made: dict[str, np.ndarray] = {}
    for info in archive.infolist():
        start = info.header_offset
        header = bytes(data[start : start + _LOCAL.size]) if start >= 0 else b''
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 0x1
        if not stored or info.compress_size != info.file_size or len(header) < _LOCAL.size:
            raise UsageError(f'{name} is compressed or damaged: {_CURE}')
        magic, *_, n_name, n_extra = _LOCAL.unpack(header)
        first = start + _LOCAL.size + n_name + n_extra
        if magic != b'PK\x03\x04' or first + info.file_size > len(data):
            raise UsageError(f'{name} is damaged or cut off: {_CURE}')
        key = info.filename.partition('/')[2]
        if key in made:
            raise UsageError(f'{name} holds {key!r:.40} twice: {_CURE}')
        made[key] = data[first : first + info.file_size]
    return made


def _stored(name: str, view: Any, records: dict[str, np.ndarray], file: str) -> Stored:
    """A tensor, once what the program says of it is right."""
    if not isinstance(view, _View):
        raise UsageError(f'{file}: {name!r:.80} is no tensor: {_CURE}')
    dtype = jnp.dtype(view.storage.dtype)
    record = records.get(f'data/{view.storage.key}')
    if record is None or len(record) != view.storage.n * dtype.itemsize:
        raise UsageError(f'{file} is damaged (the numbers of {name!r:.80}): {_CURE}')
    n = math.prod(view.shape)
    reach = sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
    if n > view.storage.n or (n and view.first + reach >= view.storage.n):
        raise UsageError(f'{file} is damaged ({name!r:.80} goes past its numbers): {_CURE}')
    return Stored(name, view.shape, dtype, record, view.strides if n else None, view.first)


def _run(program: bytes) -> Any:
    """What the program leaves on the stack."""
    machine = _Machine()
    for code, value, _ in pickletools.genops(program):
        if code.name == 'STOP':
            return machine.pop()
        machine.do(code.name, value)
    raise UsageError('is cut off')


class _Machine:
    """A stack, a memo, and instructions that only make values.

    Each costs as much as it is long, so the whole costs as much as the program is long: nothing is
    copied, and what is shown in a message or hashed is a text.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """The top of the stack, which goes."""
        return self.stack.pop()

    def do(self, name: str, value: Any) -> None:
        """One instruction.

        Args:
          name: as of `pickletools`.
          value: what is written behind it.

        Raises:
          UsageError: if it is not among those that torch writes for tensors.
        """
        if name in _NOTHING:
            return
        if name in _VALUES:
            self.stack.append(value)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            n = _TUPLES[name]
            self.stack[len(self.stack) - n :] = [tuple(self.stack[len(self.stack) - n :])]
        elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
            self.memo[value] = self.stack[-1]
        elif name in ('BINGET', 'LONG_BINGET', 'GET'):
            self.stack.append(self.memo[value])
        else:
            method = getattr(self, f'do_{name.lower()}', None)
            if method is None:
                raise UsageError(f'asks for what no tensor needs ({name})')
            method(value)

    def since_mark(self) -> list[Any]:
        """What lies above the last mark, which goes too."""
        made, self.stack = self.stack, self.below.pop()
        return made

    def do_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def do_tuple(self, _: Any) -> None:
        values = tuple(self.since_mark())
        self.stack.append(values)

    def do_append(self, _: Any) -> None:
        value = self.pop()
        self._list().append(value)

    def do_appends(self, _: Any) -> None:
        values = self.since_mark()
        self._list().extend(values)

    def do_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._put([key, value])

    def do_setitems(self, _: Any) -> None:
        self._put(self.since_mark())

    def do_global(self, value: str) -> None:
        self.stack.append(_Named(value.replace(' ', '.')))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(_Named(f'{module}.{name}'))

    def do_build(self, _: Any) -> None:
        """The attributes of a state_dict, such as the versions of its modules, are not needed."""
        self.pop()
        self._dict()

    def do_binpersid(self, _: Any) -> None:
        kind, storage, key, _where, n = self.pop()
        dtype = None
        if isinstance(storage, _Named):
            module, _, name = storage.name.rpartition('.')
            dtype = _STORAGES.get(name) if module in ('torch', 'torch.storage') else None
        if kind != 'storage' or dtype is None or not isinstance(key, str) or not is_size(n):
            raise UsageError(f'holds numbers of an unknown kind ({_name(storage)})')
        self.stack.append(_Storage(key, dtype, n))

    def do_reduce(self, _: Any) -> None:
        given, function = self.pop(), self.pop()
        name = _name(function)
        if name == 'collections.OrderedDict' and isinstance(given, tuple) and not given:
            self.stack.append({})
        elif name == 'torch._utils._rebuild_parameter':
            self.stack.append(given[0])
        elif name == 'torch._utils._rebuild_tensor_v2':
            self.stack.append(_view(*given[:4]))
        else:
            raise UsageError(f'asks to run {name}, which is not done')

    def _list(self) -> list[Any]:
        """The list on the stack."""
        made = self.stack[-1]
        if not isinstance(made, list):
            raise UsageError('appends to what is no list')
        return made

    def _dict(self) -> dict[str, Any]:
        """The dict on the stack."""
        made = self.stack[-1]
        if not isinstance(made, dict):
            raise UsageError('sets attributes of what is no dict')
        return made

    def _put(self, pairs: list[Any]) -> None:
        made = self._dict()
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str) or key in made:
                raise UsageError('has a name twice, or one that is no text')
            made[key] = value


def _name(asked: Any) -> str:
    return asked.name[:80] if isinstance(asked, _Named) else f'a {type(asked).__name__}'


def _view(storage: Any, first: Any, shape: Any, strides: Any) -> _View:
    """A tensor as its function is given it.

    Raises:
      UsageError: if this is no description of one.
    """
    deep = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) <= _DEEPEST
    right = deep and len(shape) == len(strides) and are_sizes(shape) and are_sizes(strides)
    if not right or not isinstance(storage, _Storage) or not is_size(first):
        raise UsageError('describes a tensor in an unknown way')
    return _View(storage, first, shape, strides)


_NOTHING = frozenset(('PROTO', 'FRAME'))
_VALUES = frozenset((
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE',
    'BINUNICODE8', 'BINSTRING', 'SHORT_BINSTRING',
))  # fmt: skip
_CONSTANTS: dict[str, Any] = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list,
    'EMPTY_DICT': dict,
}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
