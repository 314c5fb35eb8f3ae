"""Tasks made on the fly: example i depends on the seed and on i alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from layercomb.checks import Bound, Size, check_value, checked
from layercomb.data.checks import Seed
from layercomb.data.packing import Arrays, window

Example = tuple[np.ndarray, np.ndarray, np.ndarray]


@checked
def duplication(
    length: Annotated[int, Bound(4)] = 1024,
    vocab_size: Annotated[int, Bound(2)] = 128,
    n_examples: Size = 1_000_000,
    seed: Seed = 0,
) -> Sequence[Example]:
    """Returns examples `0 w 0 w` of Reformer's duplication task.

    The word w has length / 2 − 1 symbols, each uniform in 1 … vocab_size − 1. Targets are the
    inputs one position later (and 0 after the last); the weight is 1 where the target lies in the
    second half, which can be predicted from the first, and 0 elsewhere.

    Args:
      length: of the whole sequence, even, at least 4.
      vocab_size: number of symbols, 0 included.
      n_examples: how many there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (inputs, targets, loss_weights), each (length,), int32, int32 and float32.

    Raises:
      TypeError: if an argument is no integer.
      ValueError: if one is out of range.

    References:
      Kitaev, Kaiser and Levskaya 2020, Reformer, section 5, https://arxiv.org/abs/2001.04451

    >>> inputs, targets, loss_weights = duplication(length=8, vocab_size=4)[0]
    >>> bool((inputs[:4] == inputs[4:]).all()), loss_weights
    (True, array([0., 0., 0., 1., 1., 1., 1., 0.], dtype=float32))
    """
    if length % 2:
        raise ValueError(f'duplication: length must be even, for two equal halves, got {length}')
    return Generated(_duplicate, (length // 2, vocab_size), n_examples, seed)


@checked
def copy(
    max_length: Size = 64,
    vocab_size: Annotated[int, Bound(3)] = 128,
    min_length: Size = 1,
    n_examples: Size = 1_000_000,
    seed: Seed = 0,
) -> Sequence[Example]:
    """Returns examples `w 1 w` of copying words of many lengths.

    The length of w is uniform in min_length … max_length, its symbols in 2 … vocab_size − 1; 1 ends
    the word to be copied, 0 pads. The weight is 1 where the target lies in the copy.

    Args:
      max_length: of a word.
      vocab_size: number of symbols, 0 and 1 included.
      min_length: of a word.
      n_examples: how many there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (inputs, targets, loss_weights), each (2 max_length,), int32, int32 and float32.

    Raises:
      TypeError: if an argument is no integer.
      ValueError: if one is out of range.

    >>> inputs, targets, loss_weights = copy(max_length=3, min_length=3)[0]
    >>> int(inputs[3]), bool((targets[3:] == inputs[:3]).all()), loss_weights
    (1, True, array([0., 0., 0., 1., 1., 1.], dtype=float32))
    """
    _check_lengths('copy', min_length, max_length)
    return Generated(_copy, (min_length, max_length, vocab_size), n_examples, seed)


@checked
def copy_pairs(
    max_length: Size = 64,
    vocab_size: Annotated[int, Bound(2)] = 128,
    min_length: Size = 1,
    n_examples: Size = 1_000_000,
    seed: Seed = 0,
) -> Sequence[Arrays]:
    """Returns examples of copying words, for encoder-decoders.

    The source is a word w, the decoder's inputs are `0 w`, its targets `w 0`. The length of w is
    uniform in min_length … max_length, its symbols in 1 … vocab_size − 1. 0 ends the copy, unless
    w has the greatest length, and pads. All arrays have the length of the longest word.

    Args:
      max_length: L, of a word.
      vocab_size: number of symbols, 0 included.
      min_length: of a word.
      n_examples: how many there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (source, inputs, mask, targets, loss_weights), each (L,): int32, int32, bool,
      int32 and float32, as `pairs` gives them.

    Raises:
      TypeError: if an argument is no integer.
      ValueError: if one is out of range.

    >>> source, inputs, mask, targets, loss_weights = copy_pairs(max_length=3, min_length=3)[0]
    >>> bool((targets == source).all()), bool((inputs[1:] == source[:2]).all()), int(inputs[0])
    (True, True, 0)
    """
    _check_lengths('copy_pairs', min_length, max_length)
    return Generated(_copy_pair, (min_length, max_length, vocab_size), n_examples, seed)


def sequence_pair(
    source: np.ndarray, target: np.ndarray, eos: int, source_length: int, target_length: int
) -> Arrays:
    """Returns tokens to read and tokens to produce, cut and padded, as encoder-decoders take them.

    Args:
      source: any number of token ids.
      target: any number of token ids.
      eos: the id before the target and after it.
      source_length: M.
      target_length: L.

    Returns:
      (source, inputs, mask, targets, loss_weights), (M,) or (L,).
    """
    read = np.zeros(source_length, np.int32)
    read[: source.size] = source[:source_length]
    mask = np.arange(source_length) < max(1, source.size)  # attention needs a position
    said = np.concatenate([[eos], target, [eos]])[: target_length + 1]
    inputs, targets, weights = window(said, target_length)
    return read, inputs, mask, targets, weights


@dataclass(frozen=True)
class Generated(Sequence[Any]):
    """Examples that are made when they are asked for.

    Attributes:
      make: a function of the sizes and a random generator.
      sizes: what `make` is given.
      n_examples: how many there are.
      seed: example i depends on the seed and on i alone.
    """

    make: Callable[..., Arrays]
    sizes: tuple[int, ...]
    n_examples: int
    seed: int

    def __len__(self) -> int:
        return self.n_examples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n_examples))]
        index = operator.index(index)
        if not -self.n_examples <= index < self.n_examples:
            raise IndexError(f'example {index} of {self.n_examples}')
        rng = np.random.default_rng((self.seed, index % self.n_examples))
        return self.make(*self.sizes, rng)


def _check_lengths(owner: str, min_length: int, max_length: int) -> None:
    check_value(owner, 'min_length', min_length, Annotated[int, Bound(1, high=max_length)])


def _duplicate(half: int, vocab_size: int, rng: np.random.Generator) -> Example:
    tokens = np.zeros(2 * half + 1, np.int32)
    tokens[1:half] = tokens[half + 1 : -1] = rng.integers(1, vocab_size, half - 1)
    weights = np.zeros(2 * half, np.float32)
    weights[half - 1 : -1] = 1
    return tokens[:-1], tokens[1:], weights


def _copy(shortest: int, longest: int, vocab_size: int, rng: np.random.Generator) -> Example:
    n = int(rng.integers(shortest, longest + 1))
    tokens = np.zeros(2 * longest + 1, np.int32)
    tokens[:n] = tokens[n + 1 : 2 * n + 1] = rng.integers(2, vocab_size, n)
    tokens[n] = 1
    weights = np.zeros(2 * longest, np.float32)
    weights[n : 2 * n] = 1
    return tokens[:-1], tokens[1:], weights


def _copy_pair(shortest: int, longest: int, vocab_size: int, rng: np.random.Generator) -> Arrays:
    word = rng.integers(1, vocab_size, int(rng.integers(shortest, longest + 1)))
    return sequence_pair(word, word, 0, longest, longest)
