"""An engine that makes the tokens it is told, or the likeliest: servers are tested on it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import numpy as np

from layercomb.data import ByteTokenizer
from layercomb.serving.engine import Piece, TokenScore
from layercomb.serving.protocol import Request
from layercomb.serving.texts import Text


def flat(tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities of the next token (V,) that fall with its distance from the last one."""
    return -1.0 - np.abs(np.arange(256) - tokens[-1]) / 8.0


@dataclasses.dataclass
class Running:
    """A request that is answered by a script."""

    request: Request
    made: Iterator[Piece]
    n_made: int = 0
    n_cached: int = 0
    cancelled: bool = False

    async def pieces(self) -> AsyncIterator[Piece]:
        for piece in self.made:
            yield piece

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    """Follows the contract of `serving.engine.Engine`.

    Args:
      answers: the tokens of each row, over and over; None for the likeliest.
      logprobs: from the tokens so far to the log-probabilities of the next, (V,).
      tokenizer: of the texts.
    """

    adapters = ()

    def __init__(
        self,
        answers: Sequence[Sequence[int]] | None = None,
        logprobs: Callable[[Sequence[int]], np.ndarray] = flat,
        tokenizer=None,
        vocab_size: int = 256,
        max_len: int | None = 600,
        n_cached: int = 0,
    ) -> None:
        self.answers, self.logprobs = answers, logprobs
        self.tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self.vocab_size, self.max_len, self.n_cached = vocab_size, max_len, n_cached
        self.n_running = 0
        self.asked: list[Request] = []

    async def start(self, request: Request) -> Running:
        self.asked.append(request)
        running = Running(request, iter(()), n_cached=self.n_cached)
        running.made = self._pieces(running)
        return running

    async def close(self) -> None:
        pass

    def _pieces(self, running: Running) -> Iterator[Piece]:
        request = running.request
        rows = [list(row) for row in request.rows]
        texts = [
            Text(self.tokenizer, request.stop, request.max_tokens, row, whole)
            for row, whole in zip(rows, request.rows_of_text, strict=True)
        ]
        if request.echo:
            for i, row in enumerate(rows):
                scores = [self._score(request, row[:t], token) for t, token in enumerate(row)]
                found = () if request.logprobs is None else tuple(scores)
                yield Piece(i, texts[i].prompt, texts[i].finish_reason, found)
        for step in range(request.max_tokens):
            for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
                if text.finish_reason is None:
                    token = self._next(i, step, row)
                    score = self._score(request, row, token)
                    row.append(token)
                    running.n_made += 1
                    shown = text.add(token)
                    found = () if request.logprobs is None else (score,)
                    yield Piece(i, shown, text.finish_reason, found)

    def _next(self, i: int, step: int, row: list[int]) -> int:
        if self.answers is None:
            return int(self.logprobs(row).argmax())
        answer = self.answers[i % len(self.answers)]
        return answer[step % len(answer)]

    def _score(self, request: Request, before: list[int], token: int) -> TokenScore:
        if not before:
            return TokenScore(token, None)
        values = self.logprobs(before)
        likeliest = np.argsort(-values, kind='stable')[: request.logprobs or 0]
        return TokenScore(
            token, float(values[token]), tuple((int(i), float(values[i])) for i in likeliest)
        )
