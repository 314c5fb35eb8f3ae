"""The text of one choice, as its tokens come: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb.data.adapted import adapted
from layercomb.data.pieces import PieceDecoder


class Text:
    """Turns tokens into text that may be shown, and says when the text is done.

    Prompt and answer are one stream: the answer is what its tokens add to the text of the prompt,
    a character that the prompt began included. Stop texts are looked for in the answer alone, and
    the one whose end comes first ends it, however the text is cut into tokens. What might be the
    beginning of one is held back until it is known not to be. A character that is unfinished at the
    end becomes U+FFFD.

    Args:
      tokenizer: what decodes the tokens.
      stop: texts that end it, and are no part of it.
      max_tokens: how many tokens it has at most.
      prompt: the tokens before it.
      whole: whether the prompt was given as a text, and so ends with a whole character: a U+FFFD
        there is its own, and not of a character that the answer goes on with.

    Attributes:
      prompt: the characters that the prompt has whole.
      finish_reason: 'stop' or 'length' once it is done.
      n_tokens: how many tokens it has, the one that ended it included.

    >>> from layercomb.data import ByteTokenizer
    >>> text = Text(ByteTokenizer(), ['END'], 9)
    >>> [text.add(byte) for byte in b'a, En END more']
    ['a', ',', ' ', '', 'En', ' ', '', '', '', '', '', '', '', '']
    >>> text.finish_reason, text.n_tokens
    ('stop', 9)
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        max_tokens: int,
        prompt: Sequence[int] = (),
        whole: bool = False,
    ) -> None:
        tokenizer = adapted(tokenizer, 'Text', must_decode=True)
        self._decoder = tokenizer.incremental_decoder()
        self._eos_id = tokenizer.eos_id
        self._stop = tuple(stop)
        self._max_tokens = max_tokens
        self._held = ''
        # A tokenizer's own decoder ends with `final`, and may know the one from the other.
        final = whole and isinstance(self._decoder, PieceDecoder)
        self.prompt: str = self._decoder.decode(list(prompt), final=final) if prompt else ''
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
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            shown, self.finish_reason = self._held[: min(found)[1]], 'stop'
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
