"""Steps that are dispatched, and whose metrics have not been read yet."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from layercomb.supervised import steps
from layercomb.supervised.batches import Batch

# How many steps may be dispatched and unread. The device then never waits for Python. The batches
# of these steps are kept, since an error names what is wrong in its batch.
AHEAD = 8


class Finished(NamedTuple):
    """A step that was computed.

    Attributes:
      step: its number, from 1.
      values: its metrics by name: those of `steps.METRICS` that it has, in that order.
      batch: what it was computed from.
    """

    step: int
    values: dict[str, float]
    batch: Batch


class InFlight:
    """A queue of steps, oldest first; their metrics come to the host while later steps run."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, steps.Metrics, Batch]] = deque()

    def add(self, step: int, metrics: steps.Metrics, batch: Batch) -> None:
        """Adds a dispatched step, and starts to copy its metrics to the host.

        Args:
          step: its number.
          metrics: arrays () by name, which may still be computed.
          batch: what it is computed from.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        self._steps.append((step, metrics, batch))

    def finished(self, wait: bool) -> list[Finished]:
        """The oldest steps. They stay in the queue until `drop` is called.

        Args:
          wait: True waits for all steps. False returns those that are ready, after waiting until
            at most `AHEAD` are unread.
        """
        n = len(self._steps) if wait else max(0, len(self._steps) - AHEAD)
        while n < len(self._steps) and _is_ready(self._steps[n][1]['loss']):
            n += 1
        return [_read(*self._steps[i]) for i in range(n)]

    def drop(self) -> None:
        """Removes the oldest step from the queue."""
        self._steps.popleft()


def _is_ready(x: Any) -> bool:  # which JAX's stubs do not know
    return x.is_ready()


def _read(step: int, metrics: steps.Metrics, batch: Batch) -> Finished:
    values = {name: np.asarray(metrics[name]).item() for name in steps.METRICS if name in metrics}
    return Finished(step, values, batch)
