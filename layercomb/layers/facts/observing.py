"""Telling an observer which layers of a model are initialised, and with what."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

# (layer, signature, mode, (weights, state)); `Layer` itself uses this module.
Observer = Callable[[Any, Any, Any, Any], None]

_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    'observer', default=None
)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Calls `observer` in the block after each layer's `init`, of sublayers before the whole's.

    It is given the layer, its inputs' signature, the mode, and the weights and state made. A layer
    whose `init` calls that of its base class is told of twice.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def tell(layer: Any, signature: Any, mode: Any, made: Any) -> None:
    """Tells of one layer that has been initialised."""
    observer = _observer.get()
    if observer is not None:
        observer(layer, signature, mode, made)
