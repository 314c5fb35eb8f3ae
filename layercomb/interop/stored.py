"""`Stored`: a tensor in a mapped file, of which nothing is read until it is asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError, machine_errors
from layercomb.transforms import buffers

_LONGEST = 1 << 28  # bytes of a file of JSON


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
      name: of the tensor.
      shape: outermost axis first.
      dtype: of its numbers.
      data: the bytes of all numbers that it is a view of, (n,) uint8, mapped.
      strides: how many numbers lie between neighbours along each axis; None if they lie in order.
      first: the number that it begins with.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: np.ndarray
    strides: tuple[int, ...] | None = None
    first: int = 0

    @property
    def n_bytes(self) -> int:
        """How many bytes its numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers, a view of the file.

        Raises:
          UsageError: if they are no floating ones, as those of quantized models.
        """
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise UsageError(
                f'the tensor {self.name!r} holds {self.dtype}, which is a way of quantizing that '
                'is unknown: take the model as it was before, or as .gguf'
            )
        numbers = self.data[self.first * self.dtype.itemsize :]
        if self.strides is None:
            return numbers[: self.n_bytes].view(self.dtype).reshape(self.shape)
        numbers = numbers[: len(numbers) // self.dtype.itemsize * self.dtype.itemsize]
        steps = [n * self.dtype.itemsize for n in self.strides]
        return np.lib.stride_tricks.as_strided(
            numbers.view(self.dtype), self.shape, steps, writeable=False
        )


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, (n,) uint8, mapped and read only; none of an empty file.

    Raises:
      UsageError: if it cannot be read.
    """
    with machine_errors('check the path'):
        if not path.is_file():
            raise UsageError(f'{str(path)!r} is not there: download the whole model')
        if not path.stat().st_size:
            return np.zeros(0, np.uint8)
        return buffers.mapped(path)


def is_size(value: Any) -> bool:
    """Whether a value in a header is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def are_sizes(values: Any) -> bool:
    """Whether a value in a header is a list, or a tuple, of integers of at least 0."""
    return isinstance(values, list | tuple) and all(map(is_size, values))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
      UsageError: if it is not there, is too long, or holds something else.
    """
    data = mapped(path)
    if len(data) > _LONGEST:
        raise UsageError(f'{path.name} has {len(data):,} bytes, which is no JSON of a model')
    return parse_json(bytes(data), path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """An object from its JSON; a name that is there twice is refused.

    Args:
      data: in UTF-8.
      name: of the file, for messages.

    Raises:
      UsageError: if it is something else.
    """
    try:
        made = json.loads(data.decode('utf-8'), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise UsageError(f'{name} is damaged ({str(e)[:80]}): download it again') from None
    if not isinstance(made, dict):
        raise UsageError(f'{name} holds no object: download it again')
    return made


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names are checked to be different."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f'{name!r:.60} is there twice')
        made[name] = value
    return made
