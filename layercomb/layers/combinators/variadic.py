"""`Variadic`: what combinators of any number of layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.printing import call_text, set_field, show


class Variadic(Combinator, init=False):
    """A combinator that is made of any number of layers: ``Serial(layer, layer, …)``.

    In series, lists of layers are flattened and None is left out. In `Branch` and `Parallel`, whose
    layers stand side by side, each argument is one layer: a list is a `Serial` of its layers, and
    None or an empty list is ``Serial()``, which passes one value on as it is.
    """

    layers: tuple[Layer, ...] = ()

    def __init_subclass__(cls, *, init: bool | None = None, **kwargs: Any) -> None:
        """A subclass without fields of its own takes ``*layers`` too, without ``init=False``."""
        has_fields = bool(vars(cls).get('__annotations__'))
        super().__init_subclass__(init=has_fields if init is None else init, **kwargs)

    def __init__(self, *layers: Any, name: str | None = None):
        self._hold(layers=layers, name=name)

    def _hold(self, layers: Any, **values: Any) -> None:
        set_field(self, 'layers', self._arranged(layers))
        for field, value in values.items():
            set_field(self, field, value)
        self.__post_init__()

    @property
    def runs_short_inside(self) -> bool:
        """True, unless there are no layers."""
        return bool(self.layers)

    def _arranged(self, layers: Any) -> tuple[Layer, ...]:
        """The layers, of the constructor's arguments."""
        return tuple(flattened(type(self).__name__, layers))

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        unknown = sorted(changes.keys() - values.keys())
        if unknown:
            raise TypeError(
                f'{type(self).__name__} has no field {unknown[0]!r}: there are {", ".join(values)}'
            )
        values |= changes
        made = object.__new__(type(self))
        for field, value in values.items():
            set_field(made, field, value)
        made.__post_init__()
        return made

    def __repr__(self) -> str:
        parts = [show(layer) for layer in self.layers]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != 'layers' and value != field.default:
                parts.append(f'{field.name}={show(value)}')
        return call_text(type(self).__name__, parts)


def flattened(owner: str, layers: Any) -> Iterator[Layer]:
    """The layers of a constructor's arguments: lists opened, None left out."""
    for layer in layers:
        if isinstance(layer, (list, tuple)):
            yield from flattened(owner, layer)
        elif isinstance(layer, Layer):
            yield layer
        elif layer is not None:
            cure = (
                f'call it, {layer.__name__}(…)'
                if isinstance(layer, type)
                else 'wrap a function in Fn(label, f)'
            )
            raise TypeError(f'{owner} is made of layers, got {show(layer)}: {cure}')
