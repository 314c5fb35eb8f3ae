"""Tokenizers: what the library asks of one, and the one of bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from layercomb.data.pieces import PieceDecoder, as_list


class Tokenizer(Protocol):
    """What a tokenizer must offer. `adapted` checks it, wherever one is given.

    Data (`packed`, `bucketed`, `pairs`) and scoring need `encode`, `vocab_size` and `eos_id`.
    Generating text, serving, and an experiment's sample need `decode`, too. A tokenizer that lacks
    one of those, or returns something else, is refused when it is given.

    A tokenizer may also have ``incremental_decoder()``, for text that is shown as it is made. It
    returns a new object with ``decode(ids, final=False)``, which gives the text that the next ids
    complete, and all that is left if `final`. Without it, `PieceDecoder` makes the pieces from
    `decode`. For this, `decode` must only append: the text of some ids begins with the text of the
    first of them, except for U+FFFD at its end, which stands for an unfinished character; and what
    an id adds depends on a few ids before it only. Offer ``incremental_decoder`` if `decode`
    changes text that it gave before, as clean-up rules do that remove spaces.

    ``token_bytes(id)``, if there is one, gives the bytes that a token adds to a text, or None. A
    server names tokens by them where it tells how likely they are: half a character has no text.
    ``stop_ids``, if there are any, are tokens that end an answer as `eos_id` does.

    Attributes:
      vocab_size: the number of token ids, which are less than this; an integer, Python's or
        NumPy's. Every entrance needs it, to prove that ids fit the model.
      eos_id: the id that separates documents and ends an answer, in 0 … vocab_size − 1. Data puts
        it between documents; decoding stops at it.
    """

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""

    def encode(self, text: str | bytes) -> Sequence[int] | np.ndarray:
        """Returns the ids of `text`: (L,) integers of any type in an array, a list or a tuple.

        Data and prompts need it. `text` is a str; it is bytes only if these are not UTF-8.
        """

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`. Whatever shows text needs it."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Each byte of the UTF-8 text is a token.

    NUL, which text does not contain, separates documents and pads.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode('né')
    array([110, 195, 169], dtype=int32)
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """

    vocab_size: ClassVar[int] = 256
    eos_id: ClassVar[int] = 0
    pad_id: ClassVar[int] = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the bytes of `text`.

        Args:
          text: a str, or bytes, which are taken as they are.

        Returns:
          Token ids, (L,) int32.

        Raises:
          TypeError: if `text` is neither.
        """
        text = as_document(text)
        if isinstance(text, str):
            text = text.encode('utf-8')
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text whose bytes are `ids`; invalid UTF-8 becomes U+FFFD.

        Args:
          ids: token ids, (L,) integers in 0 … 255.

        Raises:
          ValueError: if an id is not in 0 … 255.
        """
        return _as_bytes(ids).decode('utf-8', errors='replace')

    def token_bytes(self, i: int) -> bytes:
        """The bytes of a token; none of the one that ends a document.

        Args:
          i: a token id.

        Raises:
          ValueError: if it is not in 0 … 255.
        """
        if type(self).decode is not ByteTokenizer.decode:  # a subclass with a decode of its own
            return self.decode([i]).encode()
        return b'' if i == self.eos_id else _as_bytes(i)

    def incremental_decoder(self) -> IncrementalDecoder | PieceDecoder:
        """Returns a decoder for tokens that come one by one."""
        if type(self).decode is not ByteTokenizer.decode:  # a subclass with a decode of its own
            return PieceDecoder(self.decode)
        return IncrementalDecoder()


class IncrementalDecoder:
    """Decodes bytes as they come, and holds back an unfinished character.

    >>> decoder = ByteTokenizer().incremental_decoder()
    >>> [decoder.decode(byte) for byte in 'né!'.encode()]
    ['n', '', 'é', '!']
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def decode(self, ids: int | Iterable[int] | np.ndarray, final: bool = False) -> str:
        """Returns the characters that `ids` complete.

        Args:
          ids: the next token, or the next tokens.
          final: whether no token follows; an unfinished character then becomes U+FFFD.

        Raises:
          ValueError: if an id is not in 0 … 255.
        """
        return self._decoder.decode(_as_bytes(ids), final)


def as_document(text: Any) -> str | bytes:
    """A document as plain str or bytes.

    Raises:
      TypeError: if it is neither, nor of a subclass.
    """
    if isinstance(text, str):
        return str.__str__(text)  # str() of an enumeration gives its name
    if isinstance(text, (bytes, bytearray, memoryview)):
        return memoryview(text).tobytes()
    raise TypeError(f'a document is a str or bytes, not {type(text).__name__}: {text!r:.60}')


def _as_bytes(ids: int | Iterable[int] | np.ndarray) -> bytes:
    try:
        return bytes(as_list(ids))
    except ValueError:
        raise ValueError(f'these tokens are no bytes (integers in 0 … 255): {ids!r:.60}') from None
