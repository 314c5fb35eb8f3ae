"""The text of one choice as its tokens come: whole characters, without stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb.data.adapted import adapted
from layercomb.data.pieces import PieceDecoder


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's ``stop_ids``, and in any case its `eos_id`."""
    tokenizer = adapted(tokenizer, 'Text', must_decode=True)
    more = getattr(tokenizer.tokenizer, 'stop_ids', ())
    return frozenset((tokenizer.eos_id, *(int(i) for i in more)))


class Text:
    """Turns tokens into text that may be shown, and tells when the text is done.

    Prompt and answer are one stream: the answer is what its tokens add to the text of the prompt,
    including a character that the prompt began. Stop texts are searched in the answer only; the one
    that is complete first ends it, however the text is cut into tokens. Text that may be the
    beginning of a stop text is held back until it is known not to be. An unfinished character at
    the end becomes U+FFFD.

    Args:
      tokenizer: what decodes the tokens.
      stop: texts that end the answer and are not part of it.
      max_tokens: the most tokens of the answer; with 0 it is done before it begins.
      prompt: the tokens before the answer.
      whole: whether the prompt was given as a text. Then it ends with a whole character, and U+FFFD
        at its end is a character, not one that the answer completes.

    Attributes:
      prompt: the whole characters of the prompt.
      finish_reason: 'stop' or 'length' once the text is done, None before.
      n_tokens: how many tokens the answer has, including the one that ended it.

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
        self._stop_ids = stop_ids(tokenizer)
        self._stop = tuple(stop)
        self._max_tokens = max_tokens
        self._held = ''
        # A tokenizer's own decoder is not finished here: `final` would end it.
        final = max_tokens == 0 or (whole and isinstance(self._decoder, PieceDecoder))
        self.prompt: str = self._decoder.decode(list(prompt), final=final) if prompt else ''
        self.finish_reason: str | None = None if max_tokens else 'length'
        self.n_tokens = 0

    def add(self, token: int) -> str:
        """Takes the next token, and returns the text that may be shown now; '' once it is done."""
        if self.finish_reason is not None:
            return ''
        self.n_tokens += 1
        ended = token in self._stop_ids
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
        """How many held characters may be the beginning of a stop text."""
        most = len(self._held) + 1
        beginnings = (t[:n] for t in self._stop for n in range(1, min(len(t), most)))
        return max((len(b) for b in beginnings if self._held.endswith(b)), default=0)
