"""Tokenizers of anybody's own as the library uses them: ids that are proven, and text in pieces."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercomb.data.tokenizers import ByteTokenizer, PieceDecoder, Tokenizer, as_document, as_list


class NoText(TypeError):
    """What a tokenizer gave is no str, whatever the ids were."""


@dataclass(frozen=True)
class Adapted:
    """A tokenizer whose ids are (L,) int32 of its vocabulary, and that decodes as ids come.

    Attributes:
      tokenizer: with what `Tokenizer` names.
    """

    tokenizer: Any

    @functools.cached_property  # which some tokenizers count anew each time
    def vocab_size(self) -> int:
        """Number of token ids, as it was when it was first asked for."""
        return operator.index(self.tokenizer.vocab_size)

    @functools.cached_property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return operator.index(self.tokenizer.eos_id)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, (L,) int32.

        Raises:
          TypeError: if `text` is no document, or what the tokenizer gives are no ids.
          ValueError: if an id is outside the vocabulary.
        """
        ids = self.as_ids(self.tokenizer.encode(self._as_given(text)))
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = ids.max() if ids.min() >= 0 else ids.min()
            raise ValueError(
                f'{self._name} gave the id {bad}, but its vocab_size is {self.vocab_size}: ids '
                f'must be in 0 … {self.vocab_size - 1}'
            )
        return ids.astype(np.int32)

    def as_ids(self, made: Any) -> np.ndarray:
        """What `encode` gave, as an array (L,) of integers.

        Raises:
          TypeError: if that is something else.
        """
        try:
            ids = np.asarray(made)
        except Exception:  # ragged lists; an array on another device
            ids = np.asarray(None)
        if ids.ndim == 1 and (not ids.size or ids.dtype.kind in 'iu'):
            return ids if ids.size else np.zeros(0, np.int32)
        kind = f'{ids.dtype} of shape {ids.shape}' if ids.dtype != object else repr(made)[:60]
        raise TypeError(
            f'{self._name}.encode gave {kind}: token ids are a sequence of integers, e.g. [5, 7]'
        )

    def decode(self, ids: Any) -> str:
        """The text of ids of any integer type; halves of surrogate pairs are U+FFFD.

        Raises:
          NoText: if the tokenizer gives none.
        """
        text = self.tokenizer.decode(as_list(ids))
        if not isinstance(text, str):
            raise NoText(f'{self._name}.decode gave {type(text).__name__}: text is a str')
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        return text

    def incremental_decoder(self) -> Any:
        """The tokenizer's own decoder for ids that come one by one, or one made of `decode`."""
        make = getattr(self.tokenizer, 'incremental_decoder', None)
        return PieceDecoder(self.decode) if make is None else make()

    def _as_given(self, text: str | bytes) -> str | bytes:
        text = as_document(text)
        if isinstance(text, str) or isinstance(self.tokenizer, ByteTokenizer):
            return text
        try:
            return text.decode('utf-8')
        except UnicodeDecodeError:
            return text

    @property
    def _name(self) -> str:
        return type(self.tokenizer).__name__


def adapted(tokenizer: Tokenizer) -> Adapted:
    """A tokenizer as the library uses it."""
    return tokenizer if isinstance(tokenizer, Adapted) else Adapted(tokenizer)
