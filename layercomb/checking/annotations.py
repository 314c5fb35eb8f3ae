"""What a value may be, from an annotation: the fields of layers and the arguments of models.

Configurations bind values without looking at their types (``Dense.n_units = '512'``), and a wrong
one would otherwise surface far away, inside a trace. What is annotated ``int``, ``float | None``,
``Layer``, a number in a `Bound` … is checked here, so that no layer repeats such checks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bound:
    """A number's range: ``low <= value``, and ``value < below`` where there is a limit."""

    low: float
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return value >= self.low and (self.below is None or value < self.below)

    def __str__(self) -> str:
        return f'at least {self.low:g}' + (f' and below {self.below:g}' if self.below else '')


F = TypeVar('F', bound=Callable[..., Any])


def frozen(value: Any) -> Any:
    """Lists as tuples, NumPy's numbers as Python's, all the way down: fields are plain values."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def check_values(owner: str, values: Mapping[str, Any], annotated: Any) -> None:
    """Checks values against annotations of the same names.

    Args:
      owner: what messages begin with.
      values: by name.
      annotated: the class or function that has the annotations.

    Raises:
      TypeError: if a value is of another type.
      ValueError: if a number is out of its range.
    """
    hints = _hints(annotated)
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not _matches(value, hint):
            raise TypeError(f'{owner}: {name} must be {_words(hint)}, got {_got(value)}')
        bound, entries = _bound(hint), value if isinstance(value, tuple) else (value,)
        if bound and not all(bound.holds(n) for n in entries if isinstance(n, (int, float))):
            raise ValueError(f'{owner}: {name} must be {bound}, got {value!r}')


def checked(function: F) -> F:
    """Makes a function check its arguments, as given, against its annotations at each call.

    >>> @checked
    ... def double(n: int):
    ...     return 2 * n
    >>> double('6')
    Traceback (most recent call last):
      ...
    TypeError: double: n must be an int, got '6'
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(signature.parameters, args, strict=False)) | kwargs
        check_values(function.__name__, {k: frozen(v) for k, v in given.items()}, function)
        return function(*args, **kwargs)

    wrapper.__dict__['__signature__'] = signature  # by which gin knows names and defaults
    return typing.cast(F, wrapper)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:  # a class whose annotations name what only a type checker imports
        return {}


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(p for h in typing.get_args(hint) for p in _parts(h))
    return (hint,)


def _bound(hint: Any) -> Bound | None:
    """The range of a number, or of each entry of a tuple.

    >>> _bound(tuple[Annotated[int, Bound(1)], int] | None)
    Bound(low=1, below=None)
    """
    for part in _parts(hint):
        if typing.get_origin(part) is tuple:
            return _bound(typing.get_args(part)[0])
        if typing.get_origin(part) is Annotated:
            return next((m for m in typing.get_args(part)[1:] if isinstance(m, Bound)), None)
    return None


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
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _got(value: Any) -> str:
    """A value in words, and what to do where what makes one was given instead."""
    uncalled = isinstance(value, (type, types.FunctionType)) and value.__name__.isidentifier()
    kind = 'class' if isinstance(value, type) else 'function'
    return f'{value!r}' + (f', a {kind}: call it, {value.__name__}(…)' if uncalled else '')


def _words(hint: Any) -> str:
    """A hint in words.

    >>> _words(int | None)
    'an int or None'
    """
    return ' or '.join(_words_one(part) for part in _parts(hint))


def _name(hint: Any) -> str:
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
    return f'{"an" if name[0].lower() in "aeiou" else "a"} {name}'
