"""Tasks that ask for what was said long before: `recall` among pairs, `needles` in text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from layercomb.checks import Bound, Size, checked
from layercomb.data.adapted import adapted
from layercomb.data.checks import Seed, Source
from layercomb.data.packing import token_stream
from layercomb.data.tasks import Example, Generated
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer

_CONSONANTS, _VOWELS = 'bdfgklmnprstvz', 'aeiou'


@checked
def recall(
    n_pairs: Size = 64,
    n_keys: Size = 4096,
    n_values: Annotated[int, Bound(2)] = 64,
    n_examples: Size = 1_000_000,
    seed: Seed = 0,
) -> Sequence[Example]:
    """Returns examples `k v k v …` of pairs, and then the same pairs in another order.

    Keys are different symbols, 1 … n_keys, and values any of the next n_values. Targets are the
    inputs one position later (and 0 after the last); the weight is 1 where a key is asked for the
    second time, and 0 elsewhere. Attention that sees near positions alone guesses one in n_values.

    Args:
      n_pairs: how many pairs; the length is four times as much.
      n_keys: how many keys there are, at least `n_pairs`.
      n_values: how many values there are. The vocabulary has 1 + n_keys + n_values symbols.
      n_examples: how many examples there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (inputs, targets, loss_weights), each (4·n_pairs,), int32, int32 and float32.

    Raises:
      TypeError: if an argument is no integer.
      ValueError: if one is out of range.

    References:
      Multi-query associative recall, Arora et al. 2023, Zoology, https://arxiv.org/abs/2312.04927

    >>> inputs, targets, weights = recall(n_pairs=2, n_keys=5, n_values=3)[0]
    >>> sorted(inputs[[0, 2]]) == sorted(inputs[[4, 6]]), weights
    (True, array([0., 0., 0., 0., 1., 0., 1., 0.], dtype=float32))
    """
    if n_keys < n_pairs:
        raise ValueError(f'recall: {n_pairs} pairs need as many keys, got n_keys={n_keys}')
    return Generated(_recall, (n_pairs, n_keys, n_values), n_examples, seed)


@checked
def needles(
    source: Source[str | bytes],
    length: Annotated[int, Bound(128)] = 4096,
    n_needles: Annotated[int, Bound(1, high=10_000)] = 8,
    n_asked: Size = 4,
    tokenizer: Tokenizer = ByteTokenizer(),
    n_examples: Size = 1_000_000,
    seed: Seed = 0,
) -> Sequence[Example]:
    """Returns windows of text in which codes are hidden, some of which are asked for at the end.

    Sentences like ``The code of bafile is 4821.`` stand at random places between tokens of the
    text. The window ends with some of the same sentences, in another order. The weight is 1 on the
    tokens of their codes, and 0 elsewhere.

    Args:
      source: documents of the text.
      length: L, of a window.
      n_needles: how many codes are hidden.
      n_asked: how many are asked for, at most `n_needles`.
      tokenizer: what encodes text and sentences.
      n_examples: how many examples there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (inputs, targets, loss_weights), each (L,), int32, int32 and float32.

    Raises:
      TypeError: if a number is no integer, or a document is no text.
      ValueError: if a number is out of range, there is too little text, or sentences leave no room.

    >>> inputs, targets, weights = needles(['def f(): pass\\n' * 100], 256, 2, 1)[0]
    >>> bytes(targets[weights > 0].tolist()).decode().isdigit(), int(weights.sum())
    (True, 4)
    """
    if n_asked > n_needles:
        raise ValueError(f'needles: n_asked={n_asked} is more than n_needles={n_needles}')
    tokenizer = adapted(tokenizer)
    stream = token_stream(source, tokenizer)
    made = functools.partial(_needles, stream, tokenizer, length, n_needles, n_asked)
    made(np.random.default_rng(0))  # a window without room is refused now
    return Generated(made, (), n_examples, seed)


def _recall(n_pairs: int, n_keys: int, n_values: int, rng: np.random.Generator) -> Example:
    keys = 1 + rng.choice(n_keys, n_pairs, replace=False)
    pairs = np.stack([keys, 1 + n_keys + rng.integers(0, n_values, n_pairs)], 1)
    tokens = np.concatenate([pairs, pairs[rng.permutation(n_pairs)]]).reshape(-1)
    place = np.arange(4 * n_pairs + 1)
    return _example(np.append(tokens, 0), (place > 2 * n_pairs) & (place % 2 == 1))


def _needles(
    stream: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
    n_needles: int,
    n_asked: int,
    rng: np.random.Generator,
) -> Example:
    said = [(_encoded(tokenizer, q), _encoded(tokenizer, a)) for q, a in _sentences(n_needles, rng)]
    end = _encoded(tokenizer, '.\n')
    whole = [np.concatenate([question, answer, end]) for question, answer in said]
    asked = rng.permutation(n_needles)[:n_asked]
    room = length + 1 - sum(map(len, whole)) - sum(len(whole[i]) for i in asked)
    if room < n_needles or stream.size <= room:
        raise ValueError(
            f'needles: {n_needles} sentences and {n_asked} questions leave {room} of {length} '
            f'tokens for text, of which there are {stream.size}: take a greater length, fewer '
            'needles, or more text'
        )
    start = rng.integers(0, stream.size - room)
    places = np.sort(rng.integers(0, room + 1, n_needles))
    pieces = np.split(stream[start : start + room].astype(np.int32), places)
    parts = [pieces[0]]
    for needle, piece in zip(whole, pieces[1:], strict=True):
        parts += [needle, piece]
    counted = [np.zeros(sum(map(len, parts)), bool)]
    for i in asked:
        parts.append(whole[i])
        counted.append(np.arange(len(whole[i])) >= len(said[i][0]))
        counted[-1][len(said[i][0]) + len(said[i][1]) :] = False
    return _example(np.concatenate(parts), np.concatenate(counted))


def _sentences(n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Different questions, each with its code."""
    made: dict[str, str] = {}
    while len(made) < n:
        word = ''.join(rng.choice(list(letters)) for letters in (_CONSONANTS, _VOWELS) * 3)
        made[f'\nThe code of {word} is '] = str(rng.integers(1000, 10000))
    return list(made.items())


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text), np.int32)


def _example(tokens: np.ndarray, counted: np.ndarray) -> Example:
    """Inputs, targets and weights from L + 1 tokens, of which some are to be predicted."""
    tokens = tokens.astype(np.int32)
    return tokens[:-1], tokens[1:], counted[1:].astype(np.float32)
