"""Arguments that come from a config file, where nothing else looks at their types."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layercomb.data.adapted import Adapted, adapted


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
    try:
        is_truth = isinstance(value, bool) or getattr(value, 'dtype', None) == np.bool_
        number = None if is_truth else operator.index(value)
    except TypeError:  # arrays of several, or of something else, have an __index__ that raises
        number = None
    if number is None:
        raise TypeError(f'{name}={value!r:.60}: give {wanted}')
    if number < low or (high is not None and number > high):
        raise ValueError(f'{name}={value!r}: give {wanted}')
    return number


def seed(value: Any) -> int:
    """Returns `value` if it can seed a shuffle, an integer in 0 … 2³² − 1."""
    return integer('seed', value, 0, 2**32 - 1)


def epochs(value: Any) -> int | None:
    """Returns `value` if it is a positive integer, or None for no end."""
    return None if value is None else integer('num_epochs', value, 1)


def flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name}={value!r}: give True or False')
    return bool(value)


def shard(value: Any) -> tuple[int, int]:
    """Returns `value` if it is (index, count) with 0 ≤ index < count."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f'shard={value!r}: give (index, count), e.g. (0, 1)')
    count = integer('shard count', value[1], 1)
    return integer('shard index', value[0], 0, count - 1), count


def source(value: Any, name: str = 'source') -> Sequence[Any]:
    """Returns `value` if it is a non-empty sequence that is not one string."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not all(
        hasattr(value, name) for name in ('__len__', '__getitem__')
    ):
        raise TypeError(
            f'{name}={value!r:.60}: give a sequence of documents or examples, '
            "e.g. data.python_stdlib() or data.text_files('*.txt')"
        )
    if len(value) == 0:
        raise ValueError(f'the {name} is empty: give at least one document or example')
    return value


def tokenizer(tokenizer: Any, name: str = 'tokenizer', *, decodes: bool = False) -> Adapted:
    """Returns a tokenizer as the library uses it, if it has what `data.Tokenizer` names.

    Args:
      tokenizer: what was given.
      name: what the message calls it.
      decodes: whether it must make text of tokens, too.

    Raises:
      TypeError: if it lacks something, or gives something else for a first text.
      ValueError: if `eos_id` is none of its ids.
    """
    made = adapted(tokenizer)
    asked = ('encode', 'eos_id', 'vocab_size') + ('decode',) * decodes
    given = made.tokenizer
    if isinstance(given, type) or not all(hasattr(given, each) for each in asked):
        raise TypeError(
            f'{name}={given!r:.60}: give one with encode, eos_id and vocab_size'
            f'{", and decode" if decodes else ""}, e.g. data.ByteTokenizer()'
        )
    whose = type(given).__name__
    size = integer(f'{whose}.vocab_size', given.vocab_size, 1, 2**31 - 1)
    integer(f'{whose}.eos_id', given.eos_id, 0, size - 1)
    try:
        ids = given.encode('a')
    except Exception:  # it may not know this text
        return made
    ids = made.as_ids(ids)
    if decodes:
        _check_decoding(made, ids.tolist())
    return made


def _check_decoding(tokenizer: Adapted, ids: list[int]) -> None:
    """Raises a TypeError unless ids of its own become text, all at once and one by one."""
    whose = type(tokenizer.tokenizer).__name__
    try:
        made = tokenizer.decode(ids), tokenizer.incremental_decoder().decode(ids, final=True)
    except Exception as e:
        raise TypeError(
            f'{whose} gave the ids {ids} and does not decode that list ({type(e).__name__}: {e}): '
            'see data.Tokenizer for what decode and incremental_decoder are given'
        ) from e
    if not isinstance(made[1], str):
        raise TypeError(f'the incremental_decoder of {whose} gave {made[1]!r:.60}: text is a str')
