"""The engine: completions, a few at a time, each decoded in a thread of its own.

The event loop owns the places; a thread only decodes, and posts what it has made. A completion
takes a place before anything is computed, and gives it back when its thread has ended, never
earlier. A client that disconnects stops the thread within a token, so there is never more computed
at once than there are places.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.model import Model, embeddings
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request
from layercomb.serving.texts import Text
from layercomb.supervised import decoding
from layercomb.transforms.unstacking import unstack, unstack_state

_LEAST_ROOM = 512  # positions that caches hold at least; otherwise a power of two


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """How likely a token was for the model, before sampling changes anything.

    Attributes:
      id: of the token.
      logprob: its log-probability; None for the first token of a prompt.
      top: the likeliest tokens there and their log-probabilities, the likeliest first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a token added to one choice.

    Attributes:
      index: of the choice.
      text: what it added; empty while a character is unfinished or text is held back.
      finish_reason: 'stop' or 'length' in the last piece of a choice, otherwise None.
      scores: of the tokens since the piece before, if the request wants them.
    """

    index: int
    text: str
    finish_reason: str | None
    scores: tuple[TokenScore, ...] = ()


class Running:
    """A completion that is being made: its pieces, and how to stop it.

    Attributes:
      n_made: how many tokens it has made.
      n_cached: how many tokens of its prompts were known from earlier requests.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.n_made = 0
        self.n_cached = 0
        self._posted: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces, as they are made.

        Raises:
          Refusal: if the model cannot make them.
        """
        while (posted := await self._posted.get()) is not None:
            if isinstance(posted, Exception):
                raise posted
            yield posted

    def cancel(self) -> None:
        """Ends the thread after the current token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def post(self, item: Piece | Exception | None) -> None:
        """Hands an item over, called in the thread; None ends the completion."""
        self._loop.call_soon_threadsafe(self._posted.put_nowait, item)


class Engine:
    """A model that makes completions.

    Args:
      model: a language model with weights.
      tokenizer: see `data.Tokenizer`; it must decode.
      limits: how many completions are made at once, and how many wait.

    Raises:
      TypeError, ValueError: if the tokenizer is refused, see `adapted`.
    """

    def __init__(self, model: Model, tokenizer: Any, limits: Limits) -> None:
        net, weights = unstack(model.layer, model.weights or {})  # once, not for each request
        self._model = Model(net, weights, unstack_state(model.layer, model.state))
        self._tokenizer = adapted(tokenizer, 'serving.app', must_decode=True)
        self.max_len = decoding.max_len(net)
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.max_concurrent, 'completion')
        self._free = asyncio.Semaphore(limits.max_concurrent)
        self._waiting = 0
        self._running: set[Running] = set()
        known = [embedding.vocab_size for _, embedding in embeddings(net)]
        self.vocab_size = min([*known, self._tokenizer.vocab_size])  # ids that both know

    @property
    def n_running(self) -> int:
        """How many completions are being made."""
        return len(self._running)

    def warm_up(self) -> None:
        """Compiles the programs that most requests need, by making a few tokens.

        Any sampling uses the same programs; more rows, longer prompts and longer answers do not.
        """
        request = Request(((self._tokenizer.eos_id,),), 2)
        for _ in zip(range(2), self._tokens(request), strict=False):
            pass

    async def start(self, request: Request) -> Running:
        """Begins a completion as soon as there is a place for it.

        Raises:
          Refusal: if prompt and answer do not fit the model, if too many requests wait, or if this
            one has waited too long.
        """
        if request.logprobs is not None or request.sampling.logit_bias:
            raise Refusal(400, 'this engine tells no logprobs and takes no biases', 'invalid_value')
        self._check_room(request)
        await self._take_place()
        running = Running(request)
        self._running.add(running)
        thread = asyncio.get_running_loop().run_in_executor(self._threads, self._make, running)
        thread.add_done_callback(lambda _: self._give_place_back(running))
        return running

    async def close(self) -> None:
        """Stops all completions, and waits until their threads have ended."""
        self.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def cancel(self) -> None:
        """Ends all completions after their current tokens."""
        for running in list(self._running):
            running.cancel()

    def _check_room(self, request: Request) -> None:
        longest, wanted = max(map(len, request.prompts)), request.max_tokens
        if self.max_len is not None and longest + wanted > self.max_len:
            raise Refusal(
                400,
                f'the prompt of {longest} tokens and {wanted} new ones make {longest + wanted}, '
                f'and the model reaches {self.max_len}: shorten the prompt, or ask for fewer',
                'context_length_exceeded',
                'prompt',
            )

    async def _take_place(self) -> None:
        if self._free.locked() and self._waiting >= self._limits.max_queue:
            raise _busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.patience):
                await self._free.acquire()
        except TimeoutError:
            raise _busy() from None
        finally:
            self._waiting -= 1

    def _give_place_back(self, running: Running) -> None:
        self._running.discard(running)
        self._free.release()

    def _make(self, running: Running) -> None:
        """Decodes one request; runs in a thread."""
        try:
            self._post_pieces(running)
        except Refusal as e:
            running.post(e)
        except UsageError as e:  # not the request's fault, e.g. weights that diverged
            running.post(Refusal(500, str(e), 'internal_error'))
        except Exception:
            logging.getLogger(__name__).exception('a completion failed')
            running.post(Refusal(500, 'the model failed: its log says why', 'internal_error'))
        running.post(None)

    def _post_pieces(self, running: Running) -> None:
        request = running.request
        texts = [
            Text(self._tokenizer, request.stop, request.max_tokens, row, whole)
            for row, whole in zip(request.rows, request.rows_of_text, strict=True)
        ]
        try:
            made = self._tokens(request)
        except UsageError as e:  # e.g. prompts that the model cannot read in one batch
            raise Refusal(400, str(e), 'invalid_value') from None
        if request.echo:
            for index, text in enumerate(texts):
                running.post(Piece(index, text.prompt, text.finish_reason))
        if not request.max_tokens:
            return
        for tokens in made:
            for index, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                if text.finish_reason is None:
                    shown = text.add(int(token))
                    running.n_made += 1
                    if shown or text.finish_reason:
                        running.post(Piece(index, shown, text.finish_reason))
            if running.cancelled or all(text.finish_reason for text in texts):
                return

    def _tokens(self, request: Request) -> Any:
        """Yields the tokens (B,) of each step, without end.

        Caches get room for more than is asked for, in a few sizes: each size is a program.
        """
        longest = max(map(len, request.prompts))
        room = max(_LEAST_ROOM, 1 << (longest + request.max_tokens - 1).bit_length())
        room = room if self.max_len is None else min(room, self.max_len)
        return decoding.stream(
            self._model,
            [np.asarray(row, np.int32) for row in request.rows],
            room - longest,
            temperature=request.sampling.temperature,
            top_k=request.sampling.top_k,
            top_p=request.sampling.top_p,
            repetition_penalty=request.sampling.repetition_penalty,
            rng=request.seed,
            eos_id=self._tokenizer.eos_id,
        )


def _busy() -> Refusal:
    return Refusal(
        429, 'too many requests at once: try again later', 'busy', headers={'Retry-After': '1'}
    )
