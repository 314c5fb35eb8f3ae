"""Text piece by piece, as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np


class PieceDecoder:
    """Decodes ids one by one, for a tokenizer that only decodes whole sequences.

    It shows what `decode` adds to the text when the next ids are appended, so `decode` may treat
    the beginning of a text in a way of its own, as SentencePiece does. It holds back U+FFFD at the
    end, which stands for a character whose last bytes are still to come. Only the last ids are
    decoded each time: a token costs the same however long the text is, unless the text of an id
    depends on ids far before it.

    Text that was shown cannot be taken back. If `decode` changes text that it gave before, the new
    text goes on after the same letters if only spaces between them have changed, and otherwise with
    the text of the new ids alone. No letter is lost or shown twice.

    Args:
      decode: a function from a list of ids to their text.

    >>> decoder = PieceDecoder(lambda ids: ' '.join('x' * i for i in ids))
    >>> [decoder.decode(i) for i in (2, 1, 3)]
    ['xx', ' x', ' xxx']
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ids
        self._shown = ''  # the part of their text that was shown
        self._n_done = 0  # how many of them there were when text was last shown
        self._limit = 2 * _CONTEXT

    def decode(self, ids: int | Iterable[int] | np.ndarray, final: bool = False) -> str:
        """Returns the characters that `ids` complete, and with `final` also an unfinished one.

        More ids may follow even then, as an answer follows a prompt.

        Args:
          ids: the next token, or the next tokens.
          final: whether the text may end here.
        """
        self._ids += as_list(ids)
        text = self._text(self._ids)
        unfinished = 0 if final else _n_unfinished(text)
        if not text.startswith(self._shown):
            if unfinished and len(self._ids) - self._n_done <= _UNFINISHED:
                return ''  # bytes of an unfinished character, which change the text before them
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
        """The text with what was shown as its beginning; only the new ids' text if it has none."""
        at = _end_in(text, self._shown)
        if at is None:
            self._ids, self._n_done, at = self._ids[self._n_done :], 0, 0
            text = self._text(self._ids)
        self._shown = text[:at]
        return text

    def _forget(self, text: str) -> None:
        """Drops ids that no later text depends on."""
        if not (self._forget_silent(text) or self._forget_first(text)):
            self._limit = 2 * len(self._ids)  # do not try again at every token

    def _forget_silent(self, text: str) -> bool:
        """Drops ids at the end that added no text, if there are many of them."""
        if len(self._ids) - self._n_done < _CONTEXT:
            return False
        kept = self._ids[: self._n_done] + self._ids[-_CONTEXT // 2 :]
        if self._decode(kept) != text:
            return False
        self._ids, self._limit = kept, len(kept) + _CONTEXT
        return True

    def _forget_first(self, text: str) -> bool:
        """Drops the first ids, if the last ids add the same text without them.

        A cut inside a character makes texts that cannot be compared, so cuts near it are tried too.
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


_CONTEXT = 16  # shown ids that are decoded again with the next ones
_UNFINISHED = 3  # the most bytes of a UTF-8 character that lacks its last


def _numbers_kept(n: int) -> Iterator[int]:
    """How many of n ids to keep: a few, twice as many, …, each with several cuts."""
    kept = _CONTEXT
    while kept + _UNFINISHED < n:
        yield from range(kept, kept + _UNFINISHED + 1)
        kept *= 2


def _end_in(text: str, shown: str) -> int | None:
    """Where `text` goes on after `shown`, apart from spaces; None if it does not."""
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
    """How many characters at the end stand for an unfinished one."""
    tail = text[-_UNFINISHED:]
    return len(tail) - len(tail.rstrip('\ufffd'))


def as_list(ids: int | Iterable[int] | np.ndarray) -> list[int]:
    """One id, or several of any integer type, as a list of Python's.

    Raises:
      ValueError: if they are no integers.
    """
    if isinstance(ids, Iterable) and not hasattr(ids, '__array__'):
        ids = list(ids)
    values = np.atleast_1d(np.asarray(ids))
    if values.size and values.dtype.kind not in 'iu':
        raise ValueError(f'token ids are integers, got {values.dtype}: {values[:8]}')
    return [int(i) for i in values]
