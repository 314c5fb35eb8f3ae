"""Text to token ids and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the pipelines ask of a tokenizer.

    Attributes:
      vocab_size: ids are less than this.
      eos_id: the id that separates documents.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of `text`, (L,) int32."""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of `ids`."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Every byte of the UTF-8 text is a token.

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
          text: a string, or bytes that are taken as they are.

        Returns:
          Token ids, (L,) int32.

        Raises:
          TypeError: if `text` is neither.
        """
        if isinstance(text, str):
            text = text.encode('utf-8')
        if not isinstance(text, bytes):
            raise TypeError(
                f'a document is a str or bytes, not {type(text).__name__}: {text!r:.60}'
            )
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text whose bytes are `ids`; what is no UTF-8 becomes U+FFFD.

        Args:
          ids: token ids, (L,) integers in 0 … 255.

        Raises:
          ValueError: if an id is no byte.
        """
        return _as_bytes(ids).decode('utf-8', errors='replace')

    def incremental_decoder(self) -> IncrementalDecoder:
        """Returns a decoder for tokens that arrive one by one."""
        return IncrementalDecoder()


class IncrementalDecoder:
    """Decodes bytes as they come, and holds an unfinished character back.

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
          final: whether nothing follows; a character left unfinished then becomes U+FFFD.

        Raises:
          ValueError: if an id is no byte.
        """
        return self._decoder.decode(_as_bytes(ids), final)


def _as_bytes(ids: int | Iterable[int] | np.ndarray) -> bytes:
    if isinstance(ids, Iterable) and not hasattr(ids, '__array__'):
        ids = list(ids)
    values = np.atleast_1d(np.asarray(ids))
    if values.size == 0:
        return b''
    if values.dtype.kind not in 'iu' or values.min() < 0 or values.max() > 255:
        raise ValueError(f'these tokens are no bytes (integers in 0 … 255): {values[:8]}')
    return values.astype(np.uint8).tobytes()
