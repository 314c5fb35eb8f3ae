"""What a model's files were when a load began: so weights that are kept are of these files alone.

It is looked at before the first byte is read, and again when all has been made. If a file was
replaced in between, what was made of one is not kept as that of the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

_PATTERNS = ('*.json', '*.safetensors', '*.bin', '*/*.json')  # of a directory
_START = 1 << 16  # bytes at the start of a file that its digest is of, where headers are
_SAMPLES, _SAMPLE = 16, 1 << 14  # parts of the rest, and their bytes


@dataclasses.dataclass(frozen=True)
class Seen:
    """A file or directory as it was.

    Attributes:
      path: of it.
      files: of each file its name, place on the disk, size, times and a digest of parts of it.
    """

    path: Path
    files: tuple[tuple[Any, ...], ...]

    def is_unchanged(self) -> bool:
        """Whether it is still so; not if it is gone."""
        return look(self.path) == self


def look(path: Path) -> Seen | None:
    """What is there now; None if nothing can be read, of which the reader will say more.

    Args:
      path: of a file, or of a directory of Hugging Face.
    """
    try:
        found = [path]
        if path.is_dir():
            found = sorted({x for pattern in _PATTERNS for x in path.glob(pattern)})
        files = [x for x in found if x.is_file()]  # to open a pipe would wait
        if not files:
            return None
        return Seen(path, tuple(_of_file(file) for file in files))
    except (OSError, RuntimeError):  # a loop of links is a RuntimeError of some Pythons
        return None


def _of_file(file: Path) -> tuple[Any, ...]:
    """All that tells a file from another, of the same size and time too, for JSON.

    Raises:
      OSError: if it cannot be read.
    """
    made = hashlib.sha256()
    with file.open('rb', buffering=0) as opened:
        told = os.fstat(opened.fileno())
        made.update(opened.read(_START))
        for i in range(_SAMPLES):
            opened.seek(_START + i * max(told.st_size - _START - _SAMPLE, 0) // (_SAMPLES - 1))
            made.update(opened.read(_SAMPLE))
    name = os.fsencode(file.resolve()).hex()
    times = told.st_mtime_ns, told.st_ctime_ns
    return name, told.st_dev, told.st_ino, told.st_size, *times, made.hexdigest()
