"""What the functions of this package take: sources, seeds, shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import jax

from layercomb.checks import Bound
from layercomb.shapes import nearest_multiple

T_co = TypeVar('T_co', covariant=True)

Seed = Annotated[int, Bound(0, high=2**32 - 1)]  # Grain's shuffle takes 32 bits
Shard = tuple[int, int]


class Source(Protocol[T_co]):
    """A sequence of documents or examples; it needs a length and elements, and nothing more."""

    def __len__(self) -> int:
        """How many elements there are."""

    def __getitem__(self, index: int, /) -> T_co:
        """Returns an element."""


def source(owner: str, value: Any, name: str = 'source') -> Sequence[Any]:
    """Returns `value` if it is a non-empty sequence, and not a single string.

    Args:
      owner: what messages begin with: the function that it was given to.
      value: what was given.
      name: of the argument.

    Raises:
      TypeError: if it is no sequence.
      ValueError: if it is empty.
    """
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not all(
        hasattr(value, each) for each in ('__len__', '__getitem__')
    ):
        raise TypeError(
            f'{owner}: {name} must be a sequence of documents or examples, got {value!r:.60}: '
            "give e.g. data.python_stdlib() or data.text_files('*.txt')"
        )
    if len(value) == 0:
        raise ValueError(f'{owner}: {name} is empty: give at least one document or example')
    return value


def split(owner: str, shard: Shard | None, batch_size: int) -> tuple[Shard, int]:
    """The part of each batch that this process makes.

    Args:
      owner: what messages begin with: the function that was given them.
      shard: (index, count); None for that of `jax.distributed`, or (0, 1) without it.
      batch_size: rows of this process's part; with None, of all processes' together.

    Returns:
      (index, count), and the rows of this process.

    Raises:
      ValueError: if the index is not below the count, or the processes do not divide the rows.
    """
    if shard is None:
        if not jax.distributed.is_initialized():
            return (0, 1), batch_size
        shard = jax.process_index(), jax.process_count()
        if batch_size % shard[1]:
            raise ValueError(
                f'{owner}: {shard[1]} processes cannot share {batch_size} rows: use a batch size '
                f'of {nearest_multiple(batch_size, shard[1])}'
            )
        return shard, batch_size // shard[1]
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(
            f'{owner}: shard must be (index, count) with 0 <= index < count, got {shard}'
        )
    return shard, batch_size
