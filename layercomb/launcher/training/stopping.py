"""SIGTERM, the system's request to end, and the end of the time: training saves first."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from layercomb.layers.facts import processes

if TYPE_CHECKING:
    from layercomb.supervised import Loop


def run(loop: Loop, n_steps: int, until: float | None = None) -> dict[str, Any] | None:
    """Trains; a SIGTERM ends it after the step at hand, and a line on standard error says so.

    Args:
      loop: what trains.
      n_steps: where to stop, as of `Loop.run`.
      until: when the time is over, as `time.monotonic` counts, and training ends likewise; None for
        never.

    Returns:
      The metrics of the last step; None if it was stopped before.
    """
    with on_sigterm(loop.stop) as asked, on_time(until, loop.stop) as over:
        row = loop.run(n_steps)
    if _any(bool(asked or over)) and loop.step < n_steps:
        why = 'the time of --max_hours is over: ' if over and not asked else ''
        saved = f'after step {loop.step}, which is saved' if loop.step else 'before any step'
        if jax.process_index() == 0:
            print(f'layercomb: {why}stopped {saved}; the same command goes on', file=sys.stderr)
        return None
    return row


def _any(asked: bool) -> bool:
    """Whether this process was asked to end, or another one of the run: all end alike."""
    return bool(processes.from_all(asked).any())


@contextlib.contextmanager
def on_time(until: float | None, stop: Callable[[], None]) -> Iterator[list[float]]:
    """Calls a function when the time is over.

    Args:
      until: when that is, as `time.monotonic` counts; None for never.
      stop: the function, called in another thread.

    Yields:
      A list, to which the time is added when it comes.
    """
    came: list[float] = []
    if until is None:
        yield came
        return

    def end() -> None:
        came.append(time.monotonic())
        stop()

    left = min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
    timer = threading.Timer(left, end)
    timer.daemon = True
    timer.start()
    try:
        yield came
    finally:
        timer.cancel()


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
