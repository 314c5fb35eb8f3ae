"""What a layer is applied for: `Mode`."""

from __future__ import annotations

import enum
from typing import Any


class Mode(enum.Enum):
    """What a layer is applied for; static under `jit`.

    ``TRAIN``: dropout is on, statistics are updated, soft decisions are sampled.
    ``EVAL``: deterministic.
    ``PREDICT``: incremental; inputs are the next positions, and the state carries caches.
    ``RECORD``: as ``TRAIN``; the new state also holds each discrete decision taken.
    ``REPLAY``: as ``TRAIN``, with the decisions that the state holds.
    """

    TRAIN = 'train'
    EVAL = 'eval'
    PREDICT = 'predict'
    RECORD = 'record'
    REPLAY = 'replay'

    @property
    def is_training(self) -> bool:
        """Whether dropout is on and statistics are updated."""
        return self in (Mode.TRAIN, Mode.RECORD, Mode.REPLAY)


def check_mode(owner: str, mode: Any) -> None:
    """Raises a TypeError unless `mode` is a `Mode`: layers would treat any other value as ``EVAL``.

    Args:
      owner: what the message begins with, such as ``'Dense.apply'``.
      mode: what was given.
    """
    if not isinstance(mode, Mode):
        known = isinstance(mode, str) and mode.upper() in Mode.__members__
        cure = f'Mode.{mode.upper()}' if known else 'one of ' + ', '.join(map(str, Mode))
        raise TypeError(f'{owner}: mode={mode!r} is no Mode: give {cure}')
