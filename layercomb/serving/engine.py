"""The engine: completions that are made together, for a server or without one.

    engine = Engine(model, tokenizer)
    for piece in engine.run(Request((ids,), max_tokens=100)):
        print(piece.text, end='')

A completion takes a place before anything is computed, and is cancelled within a token. The work is
done by a `Scheduler`, in a thread of its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.model import Model, embeddings
from layercomb.serving.batching.drafting import drafter
from layercomb.serving.batching.scheduler import Scheduler, busy
from layercomb.serving.batching.slots import Decodable
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request, unknown_model
from layercomb.serving.running import Piece, Running, TokenScore
from layercomb.supervised.decoding.drafts import Speculation
from layercomb.supervised.decoding.prompts import check_bias, check_ids, max_len

__all__ = ['Engine', 'Piece', 'Running', 'TokenScore']


class Engine:
    """A model that makes completions.

    Args:
      model: a language model with weights.
      tokenizer: see `data.Tokenizer`; it must decode. Tokens named by its `stop_ids`, if it has
        them, end a choice as its `eos_id` does.
      limits: how many completions are made at once, and how many wait.
      speculate: a `decoding.Lookup` or `decoding.Draft`: while one choice is decoded alone, several
        of its tokens are drafted and checked in one pass; choices whose scores are asked for, and
        those that are decoded together, are made a token at a time. The tokens are the same, up to
        rounding.

    Attributes:
      model: ready to be decoded.
      vocab_size: of the ids that both model and tokenizer know.

    Raises:
      TypeError, ValueError: if the tokenizer is refused, see `adapted`.
      UsageError: if the model cannot be decoded, see `axes.begun`, or cannot speculate, see
        `drafting.drafter`; or if it is to, and `limits` ask for the same program always.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        limits: Limits = Limits(),
        speculate: Speculation | None = None,
    ) -> None:
        self._tokenizer = adapted(tokenizer, 'serving.app', must_decode=True)
        if speculate is not None and limits.same_program:
            raise UsageError(
                'same_program decodes any number of choices by one program, and drafts are checked '
                'by another one where a choice is alone: leave out one of the two'
            )
        self.model = Decodable.of(model)
        self._limits = limits
        self._speculates = speculate is not None
        made = None if speculate is None else drafter(self.model, speculate)
        self.scheduler = Scheduler(self.model, self._tokenizer, limits, made)
        known = [embedding.vocab_size for _, embedding in embeddings(self.model.net)]
        self.vocab_size = min([*known, self._tokenizer.vocab_size])

    @property
    def n_running(self) -> int:
        """How many completions are being made."""
        return self.scheduler.n_running

    @property
    def n_waiting(self) -> int:
        """How many completions wait for a place."""
        return self.scheduler.n_waiting

    @property
    def max_len(self) -> int | None:
        """The most tokens of prompt and answer together; None for any number."""
        return self.model.max_len

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that a request may ask for."""
        return self.model.adapters

    @property
    def _reach(self) -> str:
        if self.max_len == max_len(self.model.net):
            return f'the model reaches {self.max_len}'
        return (
            f'the server {self.max_len}, the length up to which all texts have the same rotary '
            'positions in this model'
        )

    def warm_up(self) -> None:
        """Compiles the programs that most requests need, by making a few tokens.

        Any sampling uses the same programs; longer prompts and answers need further ones.

        Raises:
          UsageError: if the model makes no tokens, e.g. since its weights diverged.
        """
        for n in self.scheduler.slots.sizes:
            n_tokens = 3 if self._speculates and n == 1 else 2  # one of them by a check
            running = Running(Request(((self._tokenizer.eos_id,),) * n, n_tokens), silent=True)
            self.scheduler.submit(running)
            try:
                for _ in running:
                    pass
            except Refusal as e:
                raise UsageError(str(e)) from None

    def run(self, request: Request) -> Running:
        """Begins a completion outside of an event loop: iterate over what it returns.

        Raises:
          Refusal: if the request does not fit the model, if too many requests wait, or if the
            engine is closed.
        """
        self._check(request)
        running = Running(request)
        self.scheduler.submit(running)
        return running

    async def start(self, request: Request) -> Running:
        """Begins a completion, and returns as soon as there is a place for it.

        Raises:
          Refusal: if the request does not fit the model, if too many requests wait, or if this one
            has waited too long, or the engine is closed.
        """
        self._check(request)
        running = Running(request, asyncio.get_running_loop())
        self.scheduler.submit(running)
        try:
            async with asyncio.timeout(self._limits.patience):
                await running.begun()
        except TimeoutError:
            if self.scheduler.withdraw(running):
                raise busy() from None
        except asyncio.CancelledError:
            running.cancel()
            self.scheduler.withdraw(running)
            raise
        return running

    async def close(self) -> None:
        """Stops all completions, and waits until they have ended."""
        self.cancel()
        await asyncio.to_thread(self.scheduler.shutdown)

    def stop(self) -> None:
        """Does what `close` does, outside of an event loop."""
        self.cancel()
        self.scheduler.shutdown()

    def cancel(self) -> None:
        """Ends all completions after their current tokens."""
        self.scheduler.cancel()

    def _check(self, request: Request) -> None:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise unknown_model(request.adapter, self.adapters)
        longest, wanted = max(map(len, request.rows)), request.max_tokens
        if self.max_len is not None and longest + wanted > self.max_len:
            raise Refusal(
                400,
                f'the prompt of {longest} tokens and {wanted} new ones make {longest + wanted}, '
                f'and {self._reach}: shorten the prompt, or ask for fewer',
                'context_length_exceeded',
                'prompt',
            )
        try:
            for row in request.rows:
                check_ids(self.model.net, 'prompt', np.asarray([row], np.int32))
            check_bias(self.model.net, request.sampling)
        except UsageError as e:
            raise Refusal(400, str(e), 'invalid_value') from None
