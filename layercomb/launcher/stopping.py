"""SIGTERM, the system's request to end: training saves first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_sigterm(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Calls a function at the first SIGTERM; a second SIGTERM ends the process at once.

    Outside the main thread, where Python cannot handle signals, it does nothing.

    Args:
      stop: the function, called between two bytecodes of the main thread.

    Yields:
      A list, to which the signal's number is added when it comes.
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
