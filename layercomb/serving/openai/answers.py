"""Answers as JSON: whole, or as server-sent events, in the forms of both endpoints."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from layercomb.serving.openai import scores
from layercomb.serving.protocol import Refusal, Request
from layercomb.serving.running import Piece, Running

Json = dict[str, Any]


class Answer:
    """What is said of one request.

    Args:
      running: what is being made.
      model: the name of the model.
      names: of its tokens.
    """

    def __init__(self, running: Running, model: str, names: scores.Names) -> None:
        self._running, self._names = running, names
        self._request: Request = running.request
        kind = 'chatcmpl' if self._request.chat else 'cmpl'
        self._head = {
            'id': f'{kind}-{secrets.token_hex(12)}',
            'object': 'chat.completion' if self._request.chat else 'text_completion',
            'created': int(time.time()),
            'model': model,
        }
        self._rows = [scores.Row(names, self._request, i) for i in range(len(self._request.rows))]

    async def whole(self) -> Json:
        """The answer when it is done."""
        pieces: list[list[Piece]] = [[] for _ in self._rows]
        async for piece in self._running.pieces():
            pieces[piece.index].append(piece)
        choices = await run_in_threadpool(self._choices, pieces)
        return {**self._head, 'choices': choices, 'usage': self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as it is made."""
        try:
            if self._request.chat:
                for index in range(len(self._rows)):
                    yield self._event([_delta(index, {'role': 'assistant', 'content': ''})])
            async for piece in self._running.pieces():
                for choice in await self._parts(piece):
                    yield self._event([choice])
            if self._request.include_usage:
                yield self._event([], self._usage())
        except Refusal as e:  # the status has been sent already
            yield _event(e.body)
        yield 'data: [DONE]\n\n'

    def _choices(self, pieces: list[list[Piece]]) -> list[Json]:
        """One for each row that is shown: all of them, or the best of each prompt."""
        request = self._request
        each = request.n_rows
        made: list[Json] = []
        for start in range(0, len(pieces), each):
            shown = list(range(each))
            if each > request.n:
                found = [self._answered(i, pieces[i]) for i in range(start, start + each)]
                shown = scores.best(found, request.n)
            made += [
                self._choice(len(made) + i, start + row, pieces[start + row])
                for i, row in enumerate(shown)
            ]
        return made

    def _answered(self, row: int, pieces: list[Piece]) -> list[Any]:
        """The scores of a row without those of its prompt."""
        n = len(self._request.rows[row]) if self._request.echo else 0
        return [score for piece in pieces for score in piece.scores][n:]

    def _choice(self, index: int, row: int, pieces: list[Piece]) -> Json:
        text = ''.join(piece.text for piece in pieces)
        reason = next((piece.finish_reason for piece in pieces if piece.finish_reason), None)
        logprobs = self._logprobs([each for p in pieces for each in self._placed(row, p)])
        if not self._request.chat:
            return _text(index, text, reason, logprobs)
        message = {'role': 'assistant', 'content': text, 'refusal': None}
        return {'index': index, 'message': message, 'logprobs': logprobs, 'finish_reason': reason}

    async def _parts(self, piece: Piece) -> list[Json]:
        """The events of a piece: at most one with its text, and in a chat one with its end."""
        form = self._parts_of
        return await run_in_threadpool(form, piece) if piece.scores else form(piece)

    def _parts_of(self, piece: Piece) -> list[Json]:
        placed = self._placed(piece.index, piece)
        if not (piece.text or placed or piece.finish_reason):
            return []
        logprobs = self._logprobs(placed)
        if not self._request.chat:
            return [_text(piece.index, piece.text, piece.finish_reason, logprobs)]
        made = []
        if piece.text or placed:
            made.append(_delta(piece.index, {'content': piece.text}, logprobs=logprobs))
        if piece.finish_reason:
            made.append(_delta(piece.index, {}, piece.finish_reason))
        return made

    def _placed(self, row: int, piece: Piece) -> list[scores.Placed]:
        return self._rows[row].take(piece) if self._shows_scores else []

    @property
    def _shows_scores(self) -> bool:
        return self._request.logprobs is not None and self._request.shows_logprobs

    def _logprobs(self, placed: list[scores.Placed]) -> Json | None:
        if not self._shows_scores:
            return None
        form = scores.of_message if self._request.chat else scores.of_completion
        return form(self._names, self._request, placed)

    def _usage(self) -> Json:
        """The numbers of tokens that were read and made, as OpenAI names them."""
        n_read, n_made = sum(map(len, self._request.prompts)), self._running.n_made
        return {
            'prompt_tokens': n_read,
            'completion_tokens': n_made,
            'total_tokens': n_read + n_made,
            'prompt_tokens_details': {'cached_tokens': self._running.n_cached},
        }

    def _event(self, choices: list[Json], usage: Json | None = None) -> str:
        said: Json = {**self._head, 'choices': choices}
        if self._request.chat:
            said['object'] = 'chat.completion.chunk'
        if self._request.include_usage:
            said['usage'] = usage
        return _event(said)


def _text(index: int, text: str, reason: str | None, logprobs: Json | None) -> Json:
    """A choice of a completion, or a piece of one."""
    return {'text': text, 'index': index, 'finish_reason': reason, 'logprobs': logprobs}


def _delta(
    index: int, delta: Json, reason: str | None = None, logprobs: Json | None = None
) -> Json:
    """A piece of a message."""
    return {'index': index, 'delta': delta, 'logprobs': logprobs, 'finish_reason': reason}


def _event(value: Json) -> str:
    return f'data: {json.dumps(value, ensure_ascii=False)}\n\n'
