"""Steps that were set off and whose metrics were not looked at yet."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from layercomb.supervised import steps
from layercomb.supervised.batches import Batch

# How many steps may wait to be looked at. A device that is faster than Python never waits for it,
# and batches are kept for so many steps, to be named in an error.
AHEAD = 8


class Finished(NamedTuple):
    """A step that was computed.

    Attributes:
      step: its number.
      values: its metrics, of `steps.METRICS`, in that order.
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
        """Takes a step that was set off, and starts to copy its metrics to the host."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._steps.append((step, metrics, batch))

    def finished(self, wait: bool) -> list[Finished]:
        """The oldest steps, which stay in the queue until they are `drop`ped.

        Args:
          wait: whether to wait for all; else only steps that are ready are given, after waiting
            until no more than `AHEAD` are not.
        """
        n = len(self._steps) if wait else max(0, len(self._steps) - AHEAD)
        while n < len(self._steps) and _is_ready(self._steps[n][1]['loss']):
            n += 1
        return [_read(*self._steps[i]) for i in range(n)]

    def drop(self) -> None:
        """Takes the oldest step out of the queue."""
        self._steps.popleft()


def _is_ready(x: Any) -> bool:  # which JAX's stubs do not know
    return x.is_ready()


def _read(step: int, metrics: steps.Metrics, batch: Batch) -> Finished:
    values = {name: np.asarray(metrics[name]).item() for name in steps.METRICS if name in metrics}
    return Finished(step, values, batch)
