"""What the functions of this package take: sources, seeds, shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeVar

from layercomb.checks import Bound

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


def shard(owner: str, value: Shard) -> Shard:
    """Returns `value` if it is (index, count) with 0 ≤ index < count.

    Raises:
      ValueError: if it is not.
    """
    index, count = value
    if not 0 <= index < count:
        raise ValueError(
            f'{owner}: shard must be (index, count) with 0 <= index < count, got {value}'
        )
    return value
