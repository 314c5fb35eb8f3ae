"""What a layer is applied for: `Mode`."""

from __future__ import annotations

import enum
from typing import Any


class Mode(enum.Enum):
    """What a layer is applied for. Static: a description trains, evaluates and decodes.

    ``TRAIN``: dropout on, statistics updated, soft decisions sampled. ``EVAL``: deterministic.
    ``PREDICT``: incremental, inputs are the next positions and state carries caches. ``RECORD``:
    as ``TRAIN``, and the returned state also holds each discrete decision taken. ``REPLAY``: as
    ``TRAIN``, taking the decisions found in the state.
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
    """Raises a TypeError unless `mode` is a `Mode`: any other value would count as ``EVAL``."""
    if not isinstance(mode, Mode):
        known = isinstance(mode, str) and mode.upper() in Mode.__members__
        cure = f'Mode.{mode.upper()}' if known else 'one of ' + ', '.join(map(str, Mode))
        raise TypeError(f'{owner}: mode={mode!r} is no Mode: give {cure}')
