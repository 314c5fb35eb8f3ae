"""Log-probabilities of tokens: in the forms of both endpoints, and the best of some choices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from layercomb.data.adapted import Adapted, adapted
from layercomb.data.pieces import PieceDecoder
from layercomb.serving.texts import stop_ids

if TYPE_CHECKING:
    from layercomb.serving.protocol import Request
    from layercomb.serving.running import Piece, TokenScore

_LEAST = -9999.0  # as OpenAI writes it: JSON has no infinity


class Names:
    """What tokens are called.

    A token whose bytes are UTF-8 is called by its text, another one, which is a part of a
    character, by its bytes, such as ``bytes:\\xe2\\x82``. The bytes are those of the tokenizer's
    ``token_bytes(id)``, if it has that and knows. If not, a part of a character, and in any case a
    token without text, is called by its number, ``token_id:7``.

    Args:
      tokenizer: see `data.Tokenizer`.

    >>> from layercomb.data import ByteTokenizer
    >>> names = Names(ByteTokenizer())
    >>> names.of(97), names.of(226), names.bytes_of(226)
    ('a', 'bytes:\\\\xe2', [226])
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer: Adapted = adapted(tokenizer, 'Names', must_decode=True)
        self.stop_ids = stop_ids(self.tokenizer)
        self._token_bytes = getattr(self.tokenizer.tokenizer, 'token_bytes', None)
        self._found = functools.lru_cache(maxsize=1 << 16)(self._name_and_bytes)

    def of(self, i: int) -> str:
        """The name of a token."""
        return self._found(i)[0]

    def bytes_of(self, i: int) -> list[int] | None:
        """The bytes of a token, if they are known."""
        made = self._found(i)[1]
        return None if made is None else list(made)

    def _name_and_bytes(self, i: int) -> tuple[str, bytes | None]:
        known = None if self._token_bytes is None else self._token_bytes(i)
        if known is not None:
            made = bytes(known)
            try:
                return made.decode() or f'token_id:{i}', made
            except UnicodeDecodeError:
                return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in made), made
        text = self._text(i)
        if not text or '\ufffd' in text:
            return f'token_id:{i}', None if text else b''
        return text, text.encode()

    def _text(self, i: int) -> str:
        """What a token adds to a text: behind itself, since the first one may lose its space."""
        start, whole = self.tokenizer.decode([i]), self.tokenizer.decode([i, i])
        return whole[len(start) :] if whole.startswith(start) else start


class Placed(NamedTuple):
    """A score, and where its token begins in the text of the choice."""

    score: TokenScore
    offset: int


class Row:
    """The scores of one row as its pieces come: a score is shown with the text of its token.

    Tokens of a stop text, which is not shown, are not shown either. A token that ends the answer by
    itself is, at the end of the text.

    Args:
      names: of the tokenizer.
      request: what was asked for.
      index: of the row.
    """

    def __init__(self, names: Names, request: Request, index: int) -> None:
        self._names = names
        self._decoder = names.tokenizer.incremental_decoder()
        prompt = list(request.rows[index])
        self._n_prompt = len(prompt) if request.echo else 0  # scores of it that are yet to come
        # As in `Text`.
        self._whole = request.rows_of_text[index] and isinstance(self._decoder, PieceDecoder)
        self._end = 0  # where the next token begins
        self._shown = 0  # characters of the row so far
        self._pending: list[Placed] = []
        if not request.echo:
            self._decoder.decode(prompt, final=self._whole)

    def take(self, piece: Piece) -> list[Placed]:
        """The scores that are shown with a piece."""
        self._shown += len(piece.text)
        n_sure = min(self._n_prompt, len(piece.scores))
        for score in piece.scores:
            self._pending.append(Placed(score, self._end))
            self._end += self._length(score.id)
        if piece.finish_reason and not self._is_cut(piece):
            n_sure = len(self._pending)
        while n_sure < len(self._pending) and self._pending[n_sure].offset < self._shown:
            n_sure += 1
        made, self._pending = self._pending[:n_sure], self._pending[n_sure:]
        return [Placed(score, min(at, self._shown)) for score, at in made]

    def _length(self, i: int) -> int:
        """How many characters the next token completes."""
        if not self._n_prompt:
            return 0 if i in self._names.stop_ids else len(self._decoder.decode([i]))
        self._n_prompt -= 1
        return len(self._decoder.decode([i], final=self._whole and not self._n_prompt))

    def _is_cut(self, piece: Piece) -> bool:
        """Whether a stop text has ended it."""
        last = self._pending[-1].score.id if self._pending else None
        return piece.finish_reason == 'stop' and last not in self._names.stop_ids


def of_completion(names: Names, request: Request, placed: Sequence[Placed]) -> dict[str, Any]:
    """Scores as ``/v1/completions`` tells them: lists over tokens.

    The alternatives of each are an object; the likelier of two tokens of one name is in it.
    """
    return {
        'tokens': [names.of(each.score.id) for each in placed],
        'token_logprobs': [_finite(each.score.logprob) for each in placed],
        'top_logprobs': [_top(names, each.score) for each in placed] if request.logprobs else None,
        'text_offset': [each.offset for each in placed],
    }


def of_message(names: Names, request: Request, placed: Sequence[Placed]) -> dict[str, Any]:
    """Scores as ``/v1/chat/completions`` tells them: a list of objects.

    Their bytes together are those of the text, so the token that ends the answer is not there.
    """

    def told(i: int, logprob: float | None) -> dict[str, Any]:
        return {'token': names.of(i), 'logprob': _finite(logprob), 'bytes': names.bytes_of(i)}

    content = [
        {**told(score.id, score.logprob), 'top_logprobs': [told(*each) for each in score.top]}
        for score, _ in placed
        if score.id not in names.stop_ids
    ]
    return {'content': content, 'refusal': None}


def best(scores: Sequence[Sequence[TokenScore]], n: int) -> list[int]:
    """The n rows of the highest mean log-probability a token, the best first.

    Args:
      scores: of the answers alone.
      n: how many are wanted.
    """

    def mean(row: int) -> float:
        values = [_finite(score.logprob) or 0.0 for score in scores[row]]
        return sum(values) / max(1, len(values))

    return sorted(range(len(scores)), key=lambda row: -mean(row))[:n]


def _top(names: Names, score: TokenScore) -> dict[str, float | None] | None:
    if score.logprob is None:  # nothing comes before the first token
        return None
    made: dict[str, float | None] = {}
    for i, logprob in (*score.top, (score.id, score.logprob)):
        made.setdefault(names.of(i), _finite(logprob))
    return made


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(float(logprob), _LEAST)
