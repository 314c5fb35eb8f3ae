"""A completion that is being made: what it hands over, and how to stop it."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
from collections.abc import AsyncIterator, Iterator

from layercomb.serving.protocol import Request


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """How likely the model found a token, at temperature 1, before penalties and filters.

    Attributes:
      id: the token.
      logprob: log p(token | all before it); None for the first token of a prompt.
      top: (id, logprob) of the likeliest tokens at its place, best first.
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
      scores: of the token, if the request wants them; of the whole prompt in the first piece of a
        choice that echoes it. The token that ends a choice has one too, as clients count on it.
    """

    index: int
    text: str
    finish_reason: str | None
    scores: tuple[TokenScore, ...] = ()


Posted = Piece | Exception | None


class Running:
    """A completion that is being made.

    In an event loop, ``async for piece in running.pieces()``; elsewhere ``for piece in running``,
    which cancels it if it is left early.

    Args:
      request: what was asked for.
      loop: the event loop that takes the pieces; None for a thread.
      silent: whether no texts are made, only tokens.

    Attributes:
      request: what was asked for.
      n_made: how many tokens it has made.
      n_cached: how many tokens of its prompts were known from earlier ones, and not read again.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop | None = None, silent: bool = False
    ) -> None:
        self.request = request
        self.silent = silent
        self.n_made = 0
        self.n_cached = 0
        self._loop = loop
        self._posted: asyncio.Queue[Posted] = asyncio.Queue()
        self._here: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._begun = asyncio.Event()
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

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, as they are made; errors are those of `pieces`."""
        try:
            while (posted := self._here.get()) is not None:
                if isinstance(posted, Exception):
                    raise posted
                yield posted
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends it after the current token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    async def begun(self) -> None:
        """Returns when its first prompt is being read."""
        await self._begun.wait()

    def begin(self) -> None:
        """Says that its first prompt is being read; called by whoever reads it."""
        if self._loop is not None:
            self._call(self._begun.set)

    def post(self, item: Posted) -> None:
        """Hands an item over, called by whoever makes it; None ends the completion."""
        if self._loop is None:
            self._here.put(item)
        else:
            self._call(self._posted.put_nowait, item)

    def _call(self, function: object, *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)  # type: ignore[arg-type]
        except RuntimeError:  # the loop has ended, and nobody listens
            self.cancel()
