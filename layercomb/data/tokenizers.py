"""Text to token ids and back."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the library asks of a tokenizer: these four, and nothing more.

    Data needs `vocab_size`, `eos_id` and `encode`; whatever shows text needs `decode`, too. One
    that lacks what is needed, or gives something else, is refused when it is given. Optional is
    ``incremental_decoder()``, which returns a new object with ``decode(ids, final=False)``: the
    text that the next ids complete, all of it where `final`. Without it, text is made piece by
    piece from `decode`, see `PieceDecoder`. Then `decode` must only append: the text of ids begins
    with the text of the first ones, but for U+FFFD at its end, which stands for a character that is
    still to be completed; and what an id adds depends on a few ids before it. Give an
    ``incremental_decoder`` where `decode` changes what it gave before, as clean-up rules do that
    take spaces out again.

    Attributes:
      vocab_size: ids are less than this; an integer, NumPy's or Python's.
      eos_id: the id that separates documents, and ends an answer; one of the vocabulary.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""

    def encode(self, text: str | bytes) -> Sequence[int] | np.ndarray:
        """Returns the ids of `text`, (L,) integers of any type: an array, a list, a tuple.

        It is given a str, and bytes only where they are no UTF-8.
        """

    def decode(self, ids: list[int]) -> str:
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
        text = as_document(text)
        if isinstance(text, str):
            text = text.encode('utf-8')
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text whose bytes are `ids`; what is no UTF-8 becomes U+FFFD.

        Args:
          ids: token ids, (L,) integers in 0 … 255.

        Raises:
          ValueError: if an id is no byte.
        """
        return _as_bytes(ids).decode('utf-8', errors='replace')

    def incremental_decoder(self) -> IncrementalDecoder | PieceDecoder:
        """Returns a decoder for tokens that arrive one by one."""
        if type(self).decode is not ByteTokenizer.decode:  # a tokenizer made of this one
            return PieceDecoder(self.decode)
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


class PieceDecoder:
    """Decodes ids as they come, for a tokenizer that can only decode sequences.

    What is shown is what `decode` adds to the text when it is given the ids so far, so that it may
    treat the beginning of a text apart, as SentencePiece does. Held back is what U+FFFD at the end
    stands for: a character whose last bytes are still to come. Only the last ids are decoded each
    time, so that a token costs the same however long the text is, unless what it adds depends on
    ids far before it.

    What was shown cannot be taken back. Where `decode` does not append, but changes what it gave
    before, text goes on at once: after the same letters if only the spaces between them have
    changed, and else with the text of the new ids alone. So no letter is lost, or shown twice.

    Args:
      decode: from a list of ids to their text.

    >>> decoder = PieceDecoder(lambda ids: ' '.join('x' * i for i in ids))
    >>> [decoder.decode(i) for i in (2, 1, 3)]
    ['xx', ' x', ' xxx']
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ones
        self._shown = ''  # of their text
        self._n_done = 0  # how many of them there were when something was shown last
        self._limit = 2 * _CONTEXT

    def decode(self, ids: int | Iterable[int] | np.ndarray, final: bool = False) -> str:
        """Returns the characters that `ids` complete; all that is left where `final`.

        More may follow even then, as an answer follows a prompt.
        """
        self._ids += as_list(ids)
        text = self._text(self._ids)
        unfinished = 0 if final else _n_unfinished(text)
        if not text.startswith(self._shown):
            if unfinished and len(self._ids) - self._n_done <= _UNFINISHED:
                return ''  # bytes that are no character yet, and hide those before them
            text = self._resumed(text)
            unfinished = 0 if final else _n_unfinished(text)
        until = max(len(self._shown), len(text) - unfinished)
        piece = text[len(self._shown) : until]
        if piece:
            self._shown, self._n_done = text[:until], len(self._ids)
        if len(self._ids) >= self._limit:
            self._forget(text)
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._decode(ids) if ids else ''

    def _resumed(self, text: str) -> str:
        """The text that goes on after what was shown, which is made the beginning of it."""
        at = _end_in(text, self._shown)
        if at is None:
            self._ids, self._n_done, at = self._ids[self._n_done :], 0, 0
            text = self._text(self._ids)
        self._shown = text[:at]
        return text

    def _forget(self, text: str) -> None:
        """Drops ids that no later text depends on, if there are some."""
        if not (self._forget_silent(text) or self._forget_first(text)):
            self._limit = 2 * len(self._ids)  # not at every token

    def _forget_silent(self, text: str) -> bool:
        """Drops ids that have added nothing, if there are many at the end."""
        if len(self._ids) - self._n_done < _CONTEXT:
            return False
        kept = self._ids[: self._n_done] + self._ids[-_CONTEXT // 2 :]
        if self._decode(kept) != text:
            return False
        self._ids, self._limit = kept, len(kept) + _CONTEXT
        return True

    def _forget_first(self, text: str) -> bool:
        """Drops all but the last ids, if what the last ones add is the same after fewer.

        Where a character is cut in two, nothing can be compared; so near cuts are tried, too.
        """
        n, pending = len(self._ids), len(text) - len(self._shown)
        for last in range(_CONTEXT // 2, _CONTEXT // 2 + _UNFINISHED + 1):
            at = _end_in(text, self._text(self._ids[:-last]))
            if at is None or len(text) - at < pending:
                continue
            for kept in _numbers_kept(n):
                head, rest = self._text(self._ids[-kept:-last]), self._text(self._ids[-kept:])
                start = _end_in(rest, head) if head else None
                if start is not None and rest[start:] == text[at:]:
                    self._ids, self._shown = self._ids[-kept:], rest[: len(rest) - pending]
                    self._n_done = max(0, self._n_done - (n - kept))
                    self._limit = max(2 * _CONTEXT, kept + _CONTEXT)
                    return True
        return False


_CONTEXT = 16  # ids of what was shown that are decoded again with what comes
_UNFINISHED = 3  # bytes, at most, of a character of UTF-8 that lacks one


def _numbers_kept(n: int) -> Iterator[int]:
    """How many of n ids may be enough: a few, twice as many …, each cut at several bytes."""
    kept = _CONTEXT
    while kept + _UNFINISHED < n:
        yield from range(kept, kept + _UNFINISHED + 1)
        kept *= 2


def _end_in(text: str, shown: str) -> int | None:
    """Where a text goes on after what was shown of it, which may differ in spaces."""
    if text.startswith(shown):
        return len(shown)
    at = 0
    for letter in shown:
        if letter.isspace():
            continue
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text) or text[at] != letter:
            return None
        at += 1
    while shown[-1:].isspace() and at < len(text) and text[at].isspace():
        at += 1
    return at


def _n_unfinished(text: str) -> int:
    """How many characters at the end stand for one that is not there yet."""
    tail = text[-_UNFINISHED:]
    return len(tail) - len(tail.rstrip('\ufffd'))


def as_document(text: Any) -> str | bytes:
    """A document as plain str or bytes.

    Raises:
      TypeError: if it is neither, nor of a kind of them.
    """
    if isinstance(text, str):
        return str.__str__(text)  # not what an enumeration, for one, prints
    if isinstance(text, (bytes, bytearray, memoryview)):
        return memoryview(text).tobytes()
    raise TypeError(f'a document is a str or bytes, not {type(text).__name__}: {text!r:.60}')


def as_list(ids: int | Iterable[int] | np.ndarray) -> list[int]:
    """One id, or several of any kind, as Python's."""
    if isinstance(ids, Iterable) and not hasattr(ids, '__array__'):
        ids = list(ids)
    values = np.atleast_1d(np.asarray(ids))
    if values.size and values.dtype.kind not in 'iu':
        raise ValueError(f'token ids are integers, got {values.dtype}: {values[:8]}')
    return [int(i) for i in values]


def _as_bytes(ids: int | Iterable[int] | np.ndarray) -> bytes:
    if isinstance(ids, Iterable) and not hasattr(ids, '__array__'):
        ids = list(ids)
    values = np.atleast_1d(np.asarray(ids))
    if values.size == 0:
        return b''
    if values.dtype.kind not in 'iu' or values.min() < 0 or values.max() > 255:
        raise ValueError(f'these tokens are no bytes (integers in 0 … 255): {values[:8]}')
    return values.astype(np.uint8).tobytes()
