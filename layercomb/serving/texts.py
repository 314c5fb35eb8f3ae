"""The text of one choice, as its tokens come: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """Turns tokens into text that may be shown, and says when the text is done.

    What might be the beginning of a stop text is held back until it is known not to be.

    Args:
      tokenizer: what decodes the tokens.
      stop: texts that end it, and are no part of it.
      max_tokens: how many tokens it has at most.

    >>> from layercomb.data import ByteTokenizer
    >>> text = Text(ByteTokenizer(), ['END'], 9)
    >>> [text.add(byte) for byte in b'a, En END more']
    ['a', ',', ' ', '', 'En', ' ', '', '', '', '', '', '', '', '']
    >>> text.finish_reason, text.n_tokens
    ('stop', 9)
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_tokens: int) -> None:
        self._decoder = tokenizer.incremental_decoder()
        self._eos_id = tokenizer.eos_id
        self._stop = tuple(stop)
        self._max_tokens = max_tokens
        self._held = ''
        self.finish_reason: str | None = None
        self.n_tokens = 0

    def add(self, token: int) -> str:
        """Takes the next token, and returns what may be shown now; nothing once it is done."""
        if self.finish_reason is not None:
            return ''
        self.n_tokens += 1
        ended = token == self._eos_id
        last = ended or self.n_tokens == self._max_tokens
        self._held += self._decoder.decode([] if ended else [token], final=last)
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            shown, self.finish_reason = self._held[: min(found)], 'stop'
        elif last:
            shown, self.finish_reason = self._held, 'stop' if ended else 'length'
        else:
            shown = self._held[: len(self._held) - self._unsure()]
        self._held = self._held[len(shown) :]
        return shown

    def _unsure(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        beginnings = (text[:n] for text in self._stop for n in range(1, len(text)))
        return max((len(b) for b in beginnings if self._held.endswith(b)), default=0)
