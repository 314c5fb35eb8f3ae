"""How a description is printed: as the code that makes it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax.numpy as jnp


def set_field(layer: Any, field: str, value: Any) -> None:
    """Sets a field of a layer under construction; its class is frozen."""
    object.__setattr__(layer, field, value)


def named(layer: Any) -> list[str]:
    """The argument `name=…` as code, in a list; an empty list if the layer has no name."""
    return [] if layer.name is None else [f'name={layer.name!r}']


def _is_layer(value: Any) -> bool:
    # `Layer` itself is printed by this module, and cannot be imported here.
    return hasattr(value, 'with_sublayers') and not isinstance(value, type)


def show(value: Any) -> str:
    """The value of a field as code; a function is shown by its name.

    >>> show(('a', 1)), show(len)
    ("('a', 1)", 'len')
    """
    if isinstance(value, tuple) and any(map(_is_layer, value)):
        parts = [show(v) for v in value]
        return f'({parts[0]},)' if len(parts) == 1 else call_text('', parts)
    if inspect.isfunction(value) or isinstance(value, (jnp.ufunc, functools.partial)):
        return getattr(value, '__qualname__', getattr(value, '__name__', repr(value)))
    if not _is_layer(value) and callable(value):
        return getattr(value, '__name__', repr(value))
    return repr(value)


def call_text(function: str, parts: list[str]) -> str:
    """A call as code: on one line if it fits into 80 characters, else one argument a line.

    >>> call_text('Serial', ['Dense(4)', 'Relu()'])
    'Serial(Dense(4), Relu())'
    """
    one_line = f'{function}({", ".join(parts)})'
    if len(one_line) <= 80 and '\n' not in one_line:
        return one_line
    inside = ',\n'.join(parts).replace('\n', '\n    ')
    return f'{function}(\n    {inside},\n)'


def code_of(layer: Any) -> str:
    """The code that makes a layer: its class, and the fields that differ from their defaults.

    >>> from layercomb import tl
    >>> code_of(tl.Dense(4, use_bias=False))
    'Dense(4, use_bias=False)'
    """
    parts, positional = [], True
    for field in _shown_fields(layer):
        value = getattr(layer, field.name)
        if _shows(layer, field, value):
            bare = positional and not field.kw_only
            parts.append(show(value) if bare else f'{field.name}={show(value)}')
        positional = positional and field.default is dataclasses.MISSING
    return call_text(type(layer).__name__, parts)


def _shown_fields(layer: Any) -> list[dataclasses.Field[Any]]:
    """The fields as a call gives them: by place, then keywords, and the name last."""
    name, *own = dataclasses.fields(layer)
    own.sort(key=lambda field: bool(field.kw_only))  # or those of a base class would stand first
    for moved, other in layer.shown_before.items():
        names = [field.name for field in own]
        field = own.pop(names.index(moved))
        names.remove(moved)
        own.insert(names.index(other), field)
    return [*own, name]


def _shows(layer: Any, field: dataclasses.Field[Any], value: Any) -> bool:
    """A field is worth showing if leaving it out would make another layer."""
    if field.default is dataclasses.MISSING:
        return True
    if value == field.default:
        return False
    if field.name == 'name':
        return True
    try:
        return bool(layer.replace(**{field.name: field.default}) != layer)
    except (TypeError, ValueError):  # the default does not go with the other fields
        return True
