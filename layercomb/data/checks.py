"""Arguments that come from a config file, where nothing else looks at their types."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layercomb.data.adapted import Adapted, NoText, adapted


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


def tokenizer(tokenizer: Any, name: str = 'tokenizer', *, must_decode: bool = False) -> Adapted:
    """Returns a tokenizer as the library uses it, if it has what `data.Tokenizer` names.

    Args:
      tokenizer: what was given.
      name: what the message calls it.
      must_decode: whether it must make text of tokens, too.

    Raises:
      TypeError: if it lacks something, or gives something else for a first text.
      ValueError: if `eos_id` is none of its ids.
    """
    made = adapted(tokenizer)
    asked = ('encode', 'eos_id', 'vocab_size') + ('decode',) * must_decode
    given = made.tokenizer
    if isinstance(given, type) or not all(hasattr(given, each) for each in asked):
        raise TypeError(
            f'{name}={given!r:.60}: give one with encode, eos_id and vocab_size'
            f'{", and decode" if must_decode else ""}, e.g. data.ByteTokenizer()'
        )
    whose = type(given).__name__
    size = integer(f'{whose}.vocab_size', given.vocab_size, 1, 2**31 - 1)
    integer(f'{whose}.eos_id', given.eos_id, 0, size - 1)
    probes = _encoded(made, _PROBES if must_decode else _PROBES[:1])
    if must_decode:
        _check_decoding(made, probes)
    return made


_PROBES = ('a', 'aa', 'A', '0')  # each known, or unknown, as a whole


def _encoded(tokenizer: Adapted, texts: Sequence[str]) -> list[list[int]]:
    """The ids of those texts that the tokenizer knows."""
    made = []
    for text in texts:
        try:
            ids = tokenizer.tokenizer.encode(text)
        except Exception:  # it may be for another alphabet
            continue
        made.append(tokenizer.as_ids(ids).tolist())
    return [ids for ids in made if ids]


def _check_decoding(tokenizer: Adapted, probes: list[list[int]]) -> None:
    """Raises a TypeError unless ids of its own become text, all at once and one by one.

    One that gives the same ids for any text may know none of these letters, and its `decode` need
    not take what stands for unknown ones: then nothing is known.
    """
    whose = type(tokenizer.tokenizer).__name__
    failures: list[tuple[list[int], Exception]] = []
    for ids in probes:
        try:
            tokenizer.decode(ids)
            text = tokenizer.incremental_decoder().decode(ids, final=True)
            if not isinstance(text, str):
                raise NoText(f'the incremental_decoder of {whose} gave {text!r:.60}: text is a str')
            return
        except NoText:
            raise
        except Exception as e:
            failures.append((ids, e))
    if len({frozenset(ids) for ids in probes}) > 1:
        ids, cause = failures[0]
        raise TypeError(
            f'{whose} gave the ids {ids} and does not decode that list ({type(cause).__name__}: '
            f'{cause}): see data.Tokenizer for what decode and incremental_decoder are given'
        ) from cause
