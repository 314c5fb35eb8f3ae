"""What an argument or a field may hold: checked once, when it is given, from its annotation.

Configurations bind values without looking at their types (``Dense.n_units = '512'``), and a wrong
one would otherwise surface far away, inside a trace. Layers' fields are checked by `check_fields`,
those of other dataclasses by `take_fields`, the arguments of functions by `checked`, and a single
value by `check_value`. They read annotations such as ``int``, ``float | None``, `Layer` and `Size`,
and say the same about the same mistake: ``Dense: n_units must be an int, got '512'``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Bound:
    """The range of a number; NaN lies in none.

    Attributes:
      low: the least.
      below: what it is less than; ``math.inf`` for any finite number.
      above: what it is more than.
      high: the greatest.

    >>> str(Bound(1)), str(Bound(0, 1)), str(Bound(above=0, high=1)), str(Bound(0, math.inf))
    ('at least 1', 'at least 0 and below 1', 'above 0 and at most 1', 'at least 0 and finite')
    """

    low: float | None = None
    below: float | None = None
    above: float | None = dataclasses.field(default=None, kw_only=True)
    high: float | None = dataclasses.field(default=None, kw_only=True)

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.high is None or value <= self.high)
        )

    def __str__(self) -> str:
        ends = (
            ('at least', self.low),
            ('above', self.above),
            ('below', self.below),
            ('at most', self.high),
        )
        return ' and '.join(
            'finite'
            if end == math.inf
            else f'{words} {end if isinstance(end, int) else f"{end:g}"}'
            for words, end in ends
            if end is not None
        )


_SHOWN = 200  # characters of a wrong value

F = TypeVar('F', bound=Callable[..., Any])
Size = Annotated[int, Bound(1)]
ChunkLen = Size | Literal['auto']  # positions in a slice of `tl.Chunk`
Count = Annotated[int, Bound(0)]
Rate = Annotated[float, Bound(0, 1)]
Fraction = Annotated[float, Bound(0, high=1)]
NonNegative = Annotated[float, Bound(0)]
Positive = Annotated[float, Bound(above=0, below=math.inf)]


def frozen(value: Any) -> Any:
    """Lists as tuples, NumPy's numbers as Python's, all the way down: fields are plain values."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def plain(value: Any) -> Any:
    """Numbers of NumPy and JAX as Python's, lists and arrays as tuples of them.

    >>> plain(np.int64(3)), plain([np.array(1.5), 2]), plain(np.arange(3)), plain('3')
    (3, (1.5, 2), (0, 1, 2), '3')
    """
    if isinstance(value, (list, tuple, range)):
        return tuple(plain(v) for v in value)
    if isinstance(value, jax.core.Tracer):  # of no value yet
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) and value.ndim < 2:
        made = np.asarray(value).tolist() if value.dtype.kind in 'biuf' else value
        return tuple(made) if isinstance(made, list) else made
    return value


def fault(value: Any, hint: Any) -> tuple[type[Exception], str] | None:
    """What is wrong with a value; None if its annotation allows it.

    Args:
      value: plain.
      hint: an annotation.

    Returns:
      TypeError for another type and ValueError for a number out of its range, and what the value
      must be, in words.

    >>> fault('6', int), fault(0, Size), fault(1, Size)
    ((<class 'TypeError'>, 'an int'), (<class 'ValueError'>, 'at least 1'), None)
    """
    if not _matches(value, hint):
        return TypeError, _words(hint)
    bound, entries = _bound(hint), value if isinstance(value, tuple) else (value,)
    if bound and not all(bound.holds(n) for n in entries if isinstance(n, (int, float))):
        return ValueError, str(bound)
    return None


def check_value(owner: str, name: str, value: Any, hint: Any) -> Any:
    """A value that its annotation allows; numbers, and tuples of them, as Python's.

    An int becomes a float if the annotation allows no int.

    Args:
      owner: what messages begin with: the class or function that it is given to.
      name: of the argument or field.
      value: what was given.
      hint: its annotation.

    Raises:
      TypeError: if it is of another type.
      ValueError: if a number is out of its range.

    >>> check_value('packed', 'length', np.int64(8), Size)
    8
    >>> check_value('packed', 'length', 0, Size)
    Traceback (most recent call last):
      ...
    ValueError: packed: length must be at least 1, got 0
    """
    taken = _taken(owner, name, value, hint)
    return float(taken) if _is_int(taken) and not _allows_int(hint) else taken


def check_values(owner: str, values: Mapping[str, Any], annotated: Any) -> dict[str, Any]:
    """Values that annotations of the same names allow; numbers as Python's, ints left ints.

    Args:
      owner: what messages begin with.
      values: by name; a name that has no annotation may hold anything.
      annotated: the class or function that has the annotations.

    Raises:
      TypeError: if a value is of another type.
      ValueError: if a number is out of its range.
    """
    hints = _hints(annotated)
    return {n: _taken(owner, n, value, hints.get(n, Any)) for n, value in values.items()}


def check_fields(instance: Any) -> None:
    """Checks every field of a layer against its annotation.

    Raises:
      TypeError: if a field holds something of another type, or something unhashable.
      ValueError: if a number is out of its range.
    """
    kind: Any = type(instance)
    owner, hints = kind.__name__, _hints(kind)
    for field in dataclasses.fields(instance):
        name, value = field.name, getattr(instance, field.name)
        _refuse(owner, name, value, hints.get(name, Any))
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f'{owner}: {name} holds {type(value).__name__}, which is not hashable: '
                'a layer describes, arrays belong in its weights or state'
            ) from None


def take_fields(instance: Any) -> None:
    """Checks every field of a frozen dataclass, and holds numbers as Python's.

    Raises:
      TypeError: if a field holds something of another type.
      ValueError: if a number is out of its range.
    """
    kind: Any = type(instance)
    hints = _hints(kind)
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        taken = check_value(kind.__name__, field.name, value, hints.get(field.name, Any))
        object.__setattr__(instance, field.name, taken)


def checked(function: F) -> F:
    """Makes a function check its arguments, as given, against its annotations at each call.

    It is given numbers, and tuples of them, as Python's. Defaults are not checked, and neither is
    an argument annotated with a protocol: what uses it knows what it must offer.

    >>> @checked
    ... def double(n: int):
    ...     return 2 * n
    >>> double('6')
    Traceback (most recent call last):
      ...
    TypeError: double: n must be an int, got '6'
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        placed = dict(zip(names, args, strict=False))
        placed = check_values(function.__name__, placed, function)
        named = check_values(function.__name__, kwargs, function)
        return function(*placed.values(), *args[len(names) :], **named)

    wrapper.__dict__['__signature__'] = signature  # by which gin knows names and defaults
    return typing.cast(F, wrapper)


def _taken(owner: str, name: str, value: Any, hint: Any) -> Any:
    """A value that its annotation allows, plain where that allows numbers."""
    taken = plain(value) if _has_numbers(hint) else value
    holds_many = any(typing.get_origin(part) in (tuple, Sequence) for part in _parts(hint))
    _refuse(owner, name, frozen(taken) if holds_many else taken, hint)
    return taken


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _allows_int(hint: Any) -> bool:
    """Whether a hint that allows an int says so, rather than `float`."""
    return any(
        _allows_int(typing.get_args(part)[0])
        if typing.get_origin(part) is Annotated
        else part is not float and _matches_one(0, part)
        for part in _parts(hint)
    )


def _refuse(owner: str, name: str, value: Any, hint: Any) -> None:
    if (wrong := fault(value, hint)) is not None:
        kind, words = wrong
        raise kind(f'{owner}: {name} must be {words}, got {_got(value)}')


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    """The annotations of a class, its bases' too, or of a function.

    Those that name what only a type checker imports are left out.
    """
    made: dict[str, Any] = {}
    for each in reversed(getattr(annotated, '__mro__', (annotated,))):
        for name, hint in inspect.get_annotations(each).items():
            alone = type('alone', (), {'__annotations__': {name: hint}})  # may be a ClassVar
            around = vars(sys.modules.get(each.__module__, types))
            own = dict(vars(each)) if isinstance(each, type) else around
            with contextlib.suppress(NameError):
                made |= typing.get_type_hints(alone, own, around, include_extras=True)
    return made


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(p for h in typing.get_args(hint) for p in _parts(h))
    return (hint,)


def _bound(hint: Any) -> Bound | None:
    """The range of a number, or of each entry of a tuple.

    >>> str(_bound(tuple[Size, Size] | None))
    'at least 1'
    """
    for part in _parts(hint):
        if typing.get_origin(part) in (tuple, Sequence):
            return _bound(typing.get_args(part)[0])
        if typing.get_origin(part) is Annotated:
            return next((m for m in typing.get_args(part)[1:] if isinstance(m, Bound)), None)
    return None


def _has_numbers(hint: Any) -> bool:
    """Whether a hint allows a number, a truth value, or a tuple of them."""
    inside = (tuple, Sequence, Annotated)
    return any(
        part in (int, float, bool)
        or (typing.get_origin(part) in inside and _has_numbers(typing.get_args(part)[0]))
        for part in _parts(hint)
    )


def _matches(value: Any, hint: Any) -> bool:
    return any(_matches_one(value, part) for part in _parts(hint))


def _matches_one(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _matches(value, typing.get_args(hint)[0])
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if origin is tuple:
        inner = typing.get_args(hint)
        return isinstance(value, tuple) and (
            all(_matches(v, inner[0]) for v in value)
            if inner[1:] == (Ellipsis,)
            else len(value) == len(inner) and all(map(_matches, value, inner))
        )
    if origin is Sequence:
        return isinstance(value, Sequence) and all(
            _matches(v, typing.get_args(hint)[0]) for v in value
        )
    if Callable in (hint, origin):
        return callable(value)
    if getattr(hint, '_is_protocol', False):
        return True
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _got(value: Any) -> str:
    """A value in words; where a class or function was given instead of a value, what to do."""
    uncalled = isinstance(value, (type, types.FunctionType)) and value.__name__.isidentifier()
    kind = 'class' if isinstance(value, type) else 'function'
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'
    return shown + (f', a {kind}: call it, {value.__name__}(…)' if uncalled else '')


def _words(hint: Any) -> str:
    """A hint in words.

    >>> _words(int | None)
    'an int or None'
    """
    return ' or '.join(_words_one(part) for part in _parts(hint))


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return _name(typing.get_args(hint)[0])
    return getattr(hint, '__name__', str(hint))


def _words_one(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _words(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return ' or '.join(map(repr, typing.get_args(hint)))
    if hint is None or hint is type(None):
        return 'None'
    if origin is tuple:
        inner = typing.get_args(hint)
        if inner[1:] == (Ellipsis,):
            return f'a tuple of {_name(inner[0])}'
        return f'a tuple of {len(inner)} {_name(inner[0])}'
    if origin is Sequence:
        return f'a sequence of {_name(typing.get_args(hint)[0])}'
    name = _name(hint)
    if name == 'Callable':
        return 'a function'
    if hint is float:
        return 'a number'
    return f'{"an" if name[0].lower() in "aeiou" else "a"} {name}'
