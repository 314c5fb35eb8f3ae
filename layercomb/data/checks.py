"""Arguments that come from a config file, where nothing else looks at their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns `value` if it is an integer in low … high.

    Args:
      name: what the message calls it.
      value: what was given.
      low: the least that is right.
      high: the greatest that is right, if there is one.

    Raises:
      TypeError: if it is no integer.
      ValueError: if it is out of range.
    """
    wanted = f'an integer of at least {low}' if high is None else f'an integer in {low} … {high}'
    if isinstance(value, bool) or not hasattr(value, '__index__'):
        raise TypeError(f'{name}={value!r}: give {wanted}')
    if value < low or (high is not None and value > high):
        raise ValueError(f'{name}={value!r}: give {wanted}')
    return int(value)


def seed(value: Any) -> int:
    """Returns `value` if it can seed a shuffle, an integer in 0 … 2³² − 1."""
    return integer('seed', value, 0, 2**32 - 1)


def epochs(value: Any) -> int | None:
    """Returns `value` if it is a positive integer, or None for no end."""
    return None if value is None else integer('num_epochs', value, 1)


def flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name}={value!r}: give True or False')
    return value


def shard(value: Any) -> tuple[int, int]:
    """Returns `value` if it is (index, count) with 0 ≤ index < count."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f'shard={value!r}: give (index, count), e.g. (0, 1)')
    count = integer('shard count', value[1], 1)
    return integer('shard index', value[0], 0, count - 1), count


def source(value: Any, name: str = 'source') -> Sequence[Any]:
    """Returns `value` if it is a non-empty sequence that is not one string."""
    if isinstance(value, (str, bytes)) or not all(
        hasattr(value, name) for name in ('__len__', '__getitem__')
    ):
        raise TypeError(
            f'{name}={value!r:.60}: give a sequence of documents or examples, '
            "e.g. data.python_stdlib() or data.text_files('*.txt')"
        )
    if len(value) == 0:
        raise ValueError(f'the {name} is empty: give at least one document or example')
    return value


def tokenizer(tokenizer: Any) -> None:
    """Raises a TypeError unless it is one."""
    asked = ('encode', 'eos_id', 'vocab_size')
    if isinstance(tokenizer, type) or not all(hasattr(tokenizer, name) for name in asked):
        raise TypeError(
            f'tokenizer={tokenizer!r}: give one with encode, eos_id and vocab_size, '
            'e.g. data.ByteTokenizer()'
        )
