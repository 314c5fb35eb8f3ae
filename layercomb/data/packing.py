"""Documents as one stream of tokens, and the stream as windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercomb.data.adapted import adapted
from layercomb.data.checks import Source
from layercomb.data.tokenizers import Tokenizer

Arrays = tuple[np.ndarray, ...]


def token_stream(source: Source[str | bytes], tokenizer: Tokenizer) -> np.ndarray:
    """Returns all documents of `source` as one array: eos, document, eos, document, …, eos.

    It starts with a separator, from which the first token of the first document is predicted.

    Args:
      source: documents.
      tokenizer: what encodes them.

    Returns:
      Token ids in the smallest unsigned type that holds the vocabulary, (N,).

    Raises:
      TypeError: if a document is no text, or the tokenizer is refused, see `adapted`.
      ValueError: if the tokenizer gives ids outside its vocabulary.

    >>> from layercomb.data.tokenizers import ByteTokenizer
    >>> token_stream(['a', 'bc'], ByteTokenizer())
    array([ 0, 97,  0, 98, 99,  0], dtype=uint8)
    """
    tokenizer = adapted(tokenizer)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    eos = np.array([tokenizer.eos_id], dtype)
    pieces = [eos]
    for i in range(len(source)):
        pieces += [tokenizer.encode(source[i]).astype(dtype), eos]
    return np.concatenate(pieces)


def window(tokens: np.ndarray, length: int) -> Arrays:
    """Returns tokens as (inputs, targets, loss_weights), padded at the end.

    Args:
      tokens: at most length + 1 token ids.
      length: L, of each array that is returned.

    Returns:
      (L,) int32, int32 and float32; padding is token 0 with weight 0.
    """
    n = tokens.size - 1
    inputs, targets = np.zeros((2, length), np.int32)
    weights = np.zeros(length, np.float32)
    inputs[:n], targets[:n], weights[:n] = tokens[:-1], tokens[1:], 1
    return inputs, targets, weights


@dataclass(frozen=True, eq=False)
class Windows(Sequence[Arrays]):
    """All windows of a token stream, as examples (inputs, targets, loss_weights).

    The last token of a window is the first of the next one, so every token but the stream's first
    is a target once. The last window is padded with weight 0.

    Attributes:
      stream: token ids, (N,), N > 1.
      length: of a window.
    """

    stream: np.ndarray
    length: int

    def __len__(self) -> int:
        return -(-(self.stream.size - 1) // self.length)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f'window {index} of {len(self)}')
        start = index * self.length
        return window(self.stream[start : start + self.length + 1], self.length)
