"""SIGTERM, by which a system asks a process to end: training saves first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Calls a function at the first SIGTERM; a second one ends the process at once.

    Outside of the main thread, where signals cannot be handled, nothing happens.

    Args:
      stop: what to call, between two steps of the interpreter.

    Yields:
      A list that holds the signal once it has come.
    """
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
