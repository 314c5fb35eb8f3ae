"""Reads a pickle of arrays and plain containers without calling anything that it names.

A pickle is a program for a stack machine. Python's own machine imports and calls whatever the
program says. The machine here knows plain values, and the few names by which NumPy, JAX and Trax
write arrays, dtypes and signatures. Each name stands for a function of this module, and any other
one is refused. Arrays stay bytes until they are asked for.

The format: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from layercomb.errors import UsageError

# A checkpoint has some tens for each array, and five for each value of its history.
N_STEPS = 2_000_000
DTYPES = {
    **{name: np.dtype(name) for name in ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8')},
    **{name: np.dtype(name) for name in ('f2', 'f4', 'f8')},
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
}


class NotUnderstood(Exception):
    """What a pickle says that a checkpoint of Trax does not say."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that a pickle refers to, such as ``numpy.dtype``, by what it stands for here."""

    kind: str


@dataclasses.dataclass
class Dtype:
    """A dtype, by its name among `DTYPES`."""

    name: str


@dataclasses.dataclass
class Array:
    """An array as a pickle describes it; all is checked against the number of bytes."""

    dtype: str = ''
    shape: tuple[int, ...] = ()
    data: bytes = b''
    is_fortran: bool = False

    def value(self) -> np.ndarray:
        """The array: a view of its bytes, which cannot be written."""
        flat = np.frombuffer(self.data, DTYPES[self.dtype])
        return flat.reshape(self.shape, order='F' if self.is_fortran else 'C')


@dataclasses.dataclass
class ShapeDtype:
    """A ``trax.shapes.ShapeDtype``, the signature of an input; it is not read any further."""


NAMES = {
    'numpy.ndarray': 'ndarray',
    'numpy.dtype': 'dtype',
    'jax._src.array._reconstruct_array': 'jax array',
    'jax._src.device_array.reconstruct_device_array': 'jax array',
    'jaxlib.xla_extension.bfloat16': 'bfloat16',
    'ml_dtypes.bfloat16': 'bfloat16',
    'collections.OrderedDict': 'dict',
    'collections.defaultdict': 'dict',
    'builtins.list': 'list',
    'trax.shapes.ShapeDtype': 'signature',
    **{f'numpy.{kind}': 'number' for kind in ('int32', 'int64', 'float32', 'float64', 'bool_')},
}
for _core in ('core', '_core'):  # before and since NumPy 2
    NAMES[f'numpy.{_core}.multiarray._reconstruct'] = 'array'
    NAMES[f'numpy.{_core}.multiarray.scalar'] = 'scalar'
    NAMES[f'numpy.{_core}.numeric._frombuffer'] = 'buffer'


def read(data: bytes, what: str) -> Any:
    """The value of a pickle: plain containers, numbers, texts, `Array` and `ShapeDtype`.

    Args:
      data: the pickle.
      what: the name of the file, for messages.

    Raises:
      UsageError: if the pickle is damaged, names anything but arrays and plain values, or is too
        long. Nothing that it names was called.
    """
    machine = Machine()
    try:
        for n, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if n > N_STEPS:
                raise NotUnderstood(f'has more than {N_STEPS:,} steps')
            machine.step(opcode.name, argument)
        return machine.result()
    except NotUnderstood as e:
        raise UsageError(
            f'{what}: the pickle {e}, which checkpoints of Trax 1.4.1 do not: nothing of it was '
            'run; check where the file is from'
        ) from None
    except (ValueError, IndexError, KeyError, OverflowError) as e:
        raise UsageError(
            f'{what} is damaged: its pickle cannot be followed ({_first_line(e)}): copy it again'
        ) from None


class Machine:
    """The stack machine: each step takes one instruction of `pickletools`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follows one instruction.

        Raises:
          NotUnderstood: for an instruction that writes no plain value.
          ValueError, IndexError, KeyError: if the pickle is damaged.
        """
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif name not in _IGNORED:
            raise NotUnderstood(f'has the instruction {name}')

    def result(self) -> Any:
        """The one value that is left."""
        if len(self.stack) != 1 or self.marks:
            raise ValueError('it leaves no single value')
        return self.stack[0]

    def since_mark(self) -> list[Any]:
        """Takes the values since the last mark off the stack."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def last(self, n: int) -> list[Any]:
        """Takes the last n values off the stack."""
        if len(self.stack) < n:
            raise IndexError('a value is missing')
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def top(self, kind: type) -> Any:
        """The last value, which stays, of the given type."""
        value = self.stack[-1]
        if type(value) is not kind:
            _refuse('adds to', value)
        return value

    def mark(self, _: Any) -> None:
        """Begins a group of values."""
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: Any) -> None:
        """Remembers the last value; without an index, under the next one."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Recalls a value."""
        self.stack.append(self.memo[index])

    def tuple_of(self, n: int | None) -> None:
        """A tuple of the last n values, or of those since the mark."""
        values = self.since_mark() if n is None else self.last(n)
        self.stack.append(tuple(values))

    def add_items(self, items: list[Any]) -> None:
        """Adds to the list on the stack."""
        self.top(list).extend(items)

    def add_pairs(self, pairs: list[Any]) -> None:
        """Adds to the dict on the stack: keys and values by turns."""
        if len(pairs) % 2:
            raise ValueError('a dict has a key without a value')
        into = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            is_number = isinstance(key, int) and abs(key) < 2**63  # a longer one is slow to look up
            if not is_number and not isinstance(key, str):
                _refuse('has as a key of a dict', key)
            into[key] = value

    def look_up(self, module: Any, name: Any) -> None:
        """A name, if it is one of `NAMES`; nothing is imported."""
        if not isinstance(module, str) or not isinstance(name, str):
            _refuse('takes for a name', module)
        kind = NAMES.get(f'{module}.{name}')
        if kind is None:
            raise NotUnderstood(f'names {f"{module}.{name}"[:60]!r}')
        self.stack.append(Name(kind))

    def call(self, _: Any) -> None:
        """What NumPy, JAX or Trax would make of a name and its arguments."""
        callee, arguments = self.last(2)
        self.stack.append(made(callee, arguments))

    def fill(self, _: Any) -> None:
        """Gives the value under the last one its state."""
        (state,) = self.last(1)
        fill(self.stack[-1], state)


def made(callee: Any, arguments: Any) -> Any:
    """The value that a name, called with a tuple of arguments, stands for.

    Raises:
      NotUnderstood: for another callee, or other arguments than a checkpoint has.
    """
    make = _MAKERS.get(callee.kind) if isinstance(callee, Name) else None
    if make is None or not isinstance(arguments, tuple):
        _refuse('calls', callee)
    value = make(*arguments) if len(arguments) <= 4 else None
    if value is None:
        raise NotUnderstood(f'makes a {callee.kind} of unknown arguments')
    return value


def fill(value: Any, state: Any) -> None:
    """Gives a value its state, as ``__setstate__`` does.

    Raises:
      NotUnderstood: for a value that has none here.
      ValueError: for an array whose bytes are not as many as its shape says.
    """
    if isinstance(value, ShapeDtype):
        return
    if not isinstance(state, tuple):
        _refuse('gives a state to', value)
    if isinstance(value, Dtype):
        if len(state) < 2 or state[1] not in ('<', '|', '='):
            raise NotUnderstood('has numbers in an order of bytes that is not little-endian')
    elif isinstance(value, Array) and len(state) == 5:
        _, shape, dtype, is_fortran, data = state
        given = _array(data, dtype, shape, is_fortran is True)
        for field in dataclasses.fields(given):
            setattr(value, field.name, getattr(given, field.name))
    else:
        _refuse('gives a state to', value)


def _array(data: Any, dtype: Any, shape: Any, is_fortran: bool) -> Array:
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray):
        raise NotUnderstood('has an array of other things than numbers')
    if not _is_shape(shape):
        raise ValueError('the shape of an array is none')
    if math.prod(shape) * DTYPES[dtype.name].itemsize != len(data):
        raise ValueError(f'an array of shape {shape} has {len(data)} bytes')
    return Array(dtype.name, shape, bytes(data), is_fortran)


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, tuple)
        and len(shape) <= 8
        and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    )


def _make_dtype(kind: Any = None, *_: Any) -> Dtype | None:
    if isinstance(kind, Name) and kind.kind == 'bfloat16':
        return Dtype('bfloat16')
    return Dtype(kind) if isinstance(kind, str) and kind in DTYPES else None


def _make_array(*_: Any) -> Array:
    return Array()


def _make_scalar(dtype: Any = None, data: Any = None) -> Array:
    return _array(data, dtype, (), False)


def _make_buffer(
    data: Any = None, dtype: Any = None, shape: Any = None, order: Any = 'C'
) -> Array | None:
    return _array(data, dtype, shape, order == 'F') if order in ('C', 'F') else None


def _make_jax_array(maker: Any = None, arguments: Any = None, state: Any = None, *_: Any) -> Any:
    """JAX says how NumPy would make the array, and adds what concerns JAX alone."""
    value = made(maker, arguments)
    fill(value, state)
    return value if isinstance(value, Array) else None


def _make_dict(*arguments: Any) -> dict[Any, Any] | None:
    plain = all(isinstance(a, Name) and a.kind == 'list' for a in arguments)
    return {} if plain else None


def _make_signature(*arguments: Any) -> ShapeDtype | None:
    return None if arguments else ShapeDtype()


_MAKERS: dict[str, Callable[..., Any]] = {
    'array': _make_array,
    'buffer': _make_buffer,
    'dict': _make_dict,
    'dtype': _make_dtype,
    'jax array': _make_jax_array,
    'scalar': _make_scalar,
    'signature': _make_signature,
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_LITERALS = {
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
    *('SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
}
_IGNORED = {'PROTO', 'FRAME', 'STOP'}
_INSTRUCTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    'MARK': Machine.mark,
    'POP': lambda machine, _: machine.last(1),
    'POP_MARK': lambda machine, _: machine.since_mark(),
    'EMPTY_LIST': lambda machine, _: machine.stack.append([]),
    'EMPTY_DICT': lambda machine, _: machine.stack.append({}),
    'TUPLE': lambda machine, _: machine.tuple_of(None),
    'TUPLE1': lambda machine, _: machine.tuple_of(1),
    'TUPLE2': lambda machine, _: machine.tuple_of(2),
    'TUPLE3': lambda machine, _: machine.tuple_of(3),
    'APPEND': lambda machine, _: machine.add_items(machine.last(1)),
    'APPENDS': lambda machine, _: machine.add_items(machine.since_mark()),
    'SETITEM': lambda machine, _: machine.add_pairs(machine.last(2)),
    'SETITEMS': lambda machine, _: machine.add_pairs(machine.since_mark()),
    'MEMOIZE': Machine.put,
    'BINPUT': Machine.put,
    'LONG_BINPUT': Machine.put,
    'BINGET': Machine.get,
    'LONG_BINGET': Machine.get,
    'GLOBAL': lambda machine, named: machine.look_up(*named.split(' ', 1)),
    'STACK_GLOBAL': lambda machine, _: machine.look_up(*machine.last(2)),
    'REDUCE': Machine.call,
    'NEWOBJ': Machine.call,
    'BUILD': Machine.fill,
}


def _refuse(does: str, value: Any) -> NoReturn:
    shown = value.kind if isinstance(value, Name) else type(value).__name__
    raise NotUnderstood(f'{does} a {shown}')


def _first_line(error: Exception) -> str:
    return (str(error.args[0] if error.args else error).splitlines() or [''])[0][:80]
