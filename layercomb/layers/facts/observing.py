"""Reports to an observer each layer that is initialised, with its weights and state."""

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
    """In the block, calls `observer` after each layer's `init`, sublayers first.

    A layer whose `init` calls that of its base class is reported twice.

    Args:
      observer: ``observer(layer, signature, mode, (weights, state))``, the signature that of the
        layer's inputs.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def tell(layer: Any, signature: Any, mode: Any, made: Any) -> None:
    """Reports one initialised layer to the observer of the block, if there is one."""
    observer = _observer.get()
    if observer is not None:
        observer(layer, signature, mode, made)
