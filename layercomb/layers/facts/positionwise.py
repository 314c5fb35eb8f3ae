"""Whether a layer works on each position by itself, and the error if a layer does not say.

`Layer` uses this module, so layers are `Any` here.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def of_sublayers(layer: Any) -> bool | None:
    """`position_wise` of a layer that only passes values between its sublayers.

    Returns:
      False if one sublayer says False, else None if one says None, else True.

    >>> from layercomb import tl
    >>> of_sublayers(tl.Serial(tl.Dense(4), tl.Relu())), of_sublayers(tl.Serial(tl.Mean()))
    (True, False)
    """
    said = [each.position_wise for each in layer.sublayers]
    return False if False in said else None if None in said else True


def forget_if_overridden(cls: Any) -> None:
    """Forgets what is declared of positions in a class that overrides `apply` and says no more.

    That is `position_wise`, `sees_segments` and `spans_devices`.

    The methods that count as `apply` are those in `cls.computes_in`.

    Raises:
      TypeError: if the class says something else than True, False or None.
    """
    value = vars(cls).get('position_wise')
    if not (value is None or isinstance(value, (bool, dataclasses.Field)) or _is_computed(value)):
        raise TypeError(f'{cls.__name__}: position_wise is True, False or None, got {value!r}')
    unsaid = {'position_wise': None, 'sees_segments': False, 'spans_devices': False}
    for name, unknown in unsaid.items():
        if getattr(cls, name) is unknown:  # nothing to forget, and no mixin hides what others say
            continue
        said = _first(cls, name)
        if any(_first(cls, method) < said for method in cls.computes_in):
            setattr(cls, name, unknown)


def _is_computed(value: Any) -> bool:
    return hasattr(value, '__get__')  # a property, or its like


def _first(cls: Any, name: str) -> int:
    """Which of a class and those it inherits from, in order, has an attribute first."""
    classes = [vars(c) for c in cls.__mro__]
    has = [name in c or name in c.get('__annotations__', {}) for c in classes]
    return has.index(True) if True in has else len(has)


def reason(layer: Any) -> Any:
    """The innermost layer because of which `layer` is not known to be position-wise."""
    wanted = (layer.position_wise, False)
    inside = [each for each in layer.sublayers if each.position_wise is not True]
    found = next((each for each in inside if each.position_wise in wanted), None)
    return layer if found is None else reason(found)


def unsaid(layer: Any) -> str:
    """The error text for a layer whose `position_wise` is None, with the line to add."""
    name = type(layer).__name__
    if any(field.name == 'position_wise' for field in dataclasses.fields(layer)):
        who, line = ' '.join(repr(layer).split()), f'{name}(…, position_wise=True)'
    else:
        who, line = name, 'position_wise = True in the class'
    return (
        f'{who} does not say whether it works on each position by itself: write {line} if it does'
    )
