"""The scheduler: reads prompts and decodes rows of all requests together, in one thread.

It works in turns. A turn reads one piece of one prompt, the prompts taking turns, puts the rows of
prompts that are read into free slots, and makes one token for every row. The step is dispatched
before the tokens of the last one are read, so that the device does not wait for texts. The thread
ends when there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from layercomb.data.adapted import Adapted
from layercomb.errors import UsageError
from layercomb.serving.batching.drafting import Drafter, no_draft
from layercomb.serving.batching.prefixes import Block, Prefixes
from layercomb.serving.batching.programs import NO_TOKEN, Drawn
from layercomb.serving.batching.slots import Chosen, Decodable, Desk, Reading, Slots
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal
from layercomb.serving.running import Piece, Running, TokenScore
from layercomb.serving.texts import Text
from layercomb.supervised.decoding.keys import key
from layercomb.supervised.decoding.sampling import diverged, stacked
from layercomb.supervised.decoding.scoring import Alternatives

_READINGS = 4  # prompts that are read in turns


class Silent:
    """What counts tokens where nobody reads a text.

    Args:
      max_tokens: how many there are.
    """

    prompt = ''
    finish_reason: str | None = None

    def __init__(self, max_tokens: int) -> None:
        self._left = max_tokens

    def add(self, token: int) -> str:
        """Takes the next token."""
        self._left -= 1
        self.finish_reason = None if self._left else 'length'
        return ''


class Row:
    """One choice of a request, as far as it is made.

    Args:
      running: the completion that it belongs to.
      index: of the choice.
      text: what makes its text of tokens.

    Attributes:
      prompt: the tokens of its prompt.
      made: the tokens that were made.
      n_asked: how many tokens the device was asked for.
    """

    def __init__(self, running: Running, index: int, text: Text | Silent) -> None:
        self.running, self.index, self.text = running, index, text
        self.prompt: tuple[int, ...] = tuple(running.request.rows[index])
        self.made: list[int] = []
        self.n_asked = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be made any more."""
        return self.text.finish_reason is not None or self.running.cancelled

    @property
    def wants_more(self) -> bool:
        """Whether the device is to be asked for another token."""
        return not self.is_done and self.n_asked < self.running.request.max_tokens

    @property
    def wants_scores(self) -> bool:
        return self.running.request.logprobs is not None

    def add(self, token: int, scores: tuple[TokenScore, ...]) -> None:
        """Takes the next token, and posts what it adds to the text."""
        self.made.append(token)
        shown = self.text.add(token)
        self.running.n_made += 1
        if shown or scores or self.text.finish_reason:
            self.running.post(Piece(self.index, shown, self.text.finish_reason, scores))


class Group:
    """The rows of a request that have one prompt: it is read once.

    Args:
      running: the completion that they belong to.
      indices: of the choices.

    Attributes:
      reading: the prompt, once it is being read.
      n_placed: how many rows were put into slots.
      told: whether its rows have begun with their prompt.
    """

    def __init__(self, running: Running, indices: Sequence[int]) -> None:
        self.told = False
        self.running, self.indices = running, tuple(indices)
        self.ids: tuple[int, ...] = tuple(running.request.rows[indices[0]])
        self.reading: Reading | None = None
        self.rows: list[Row] = []
        self.n_placed = 0

    @property
    def scored(self) -> bool:
        """Whether the scores of the prompt are wanted."""
        return self.running.request.echo and self.running.request.logprobs is not None


@dataclasses.dataclass
class _Asked:
    """Tokens that the device was asked for.

    Attributes:
      rows: the row of each number of the arrays; None for a free slot.
      drawn: what was drawn, perhaps not yet.
      group: whose first tokens these are, if its prompt's state is free then.
    """

    rows: list[Row | None]
    drawn: Drawn
    group: Group | None = None


class Scheduler:
    """Makes completions; all but `submit` and what it returns runs in one thread.

    Args:
      model: what decodes.
      tokenizer: what makes texts.
      limits: see `Limits`.
      drafter: what makes drafts while a row is alone; None for none.
    """

    def __init__(
        self,
        model: Decodable,
        tokenizer: Adapted,
        limits: Limits,
        drafter: Drafter | None = None,
    ) -> None:
        self._model, self._tokenizer, self._limits = model, tokenizer, limits
        self._drafter = drafter
        stop_ids = getattr(tokenizer.tokenizer, 'stop_ids', (tokenizer.eos_id,))
        self._stop_ids = frozenset(map(int, stop_ids)) | {tokenizer.eos_id}
        self.prefixes = Prefixes(limits.prefix_cache)
        self.slots = Slots(model, limits.max_concurrent, limits.same_program)
        self._desk = Desk(model, self.prefixes)
        self._thread = ThreadPoolExecutor(1, 'decoding')
        self._lock = threading.Lock()
        self._works = self._closed = False
        self._waiting: deque[Running] = deque()
        self._alive: dict[Running, int] = {}  # how many rows are not done
        self._groups: deque[Group] = deque()  # of requests that have begun
        self._readings: deque[Group] = deque()
        self._read: deque[Group] = deque()
        self._asked: list[_Asked] = []
        self._piece: jax.Array | None = None  # of the last piece that was read

    @property
    def n_running(self) -> int:
        """How many completions are being made."""
        return len(self._alive)

    @property
    def n_waiting(self) -> int:
        """How many completions wait for a place."""
        return len(self._waiting)

    def submit(self, running: Running) -> None:
        """Queues a completion.

        Raises:
          Refusal: if too many wait, or after `shutdown`.
        """
        with self._lock:
            if self._closed:
                raise Refusal(503, 'the server is stopping: try again when it runs', 'stopping')
            free = max(0, self._limits.max_concurrent - sum(self._alive.values()))
            if len(self._waiting) >= self._limits.max_queue + free:
                raise busy()
            self._waiting.append(running)
            if not self._works:
                self._works = True
                self._thread.submit(self._work)

    def withdraw(self, running: Running) -> bool:
        """Takes a completion out of the queue; False if it has begun, or has ended."""
        with self._lock:
            if running not in self._waiting:
                return False
            self._waiting.remove(running)
            return True

    def cancel(self) -> None:
        """Ends all completions after their current tokens."""
        with self._lock:
            for running in (*self._alive, *self._waiting):
                running.cancel()

    def shutdown(self) -> None:
        """Ends all completions, and waits until they have; no more can be made then."""
        with self._lock:
            self._closed = True
        self.cancel()
        self._thread.shutdown()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._take()
                if not self._alive and not self._asked:
                    self._works = False
                    return
            try:
                self._turn()
            except Exception as e:  # what was donated is lost
                self._fail_all(e)

    def _take(self) -> None:
        """Begins the completions for which there is place, first come, first served."""
        while self._waiting:
            in_use = sum(self._alive.values())
            if self._waiting[0].cancelled:
                self._waiting.popleft().post(None)
                continue
            if in_use >= self._limits.max_concurrent:
                return
            running = self._waiting.popleft()
            rows = running.request.rows
            self._alive[running] = len(rows)
            running.begin()
            self._groups.extend(Group(running, each) for each in _alike(rows))

    def _turn(self) -> None:
        self._drop_cancelled()
        self._begin_readings()
        self._read_piece()
        self._place()
        if self._drafter is not None and self.slots.alone is not None:
            self._speculate(self._drafter)
            return
        before = self._ask()
        for asked in before:
            self._hear(asked)

    def _speculate(self, drafter: Drafter) -> None:
        """Makes tokens of a row that is alone: checks a draft, or asks for one token.

        What was asked for is heard first, since a draft continues it.
        """
        asked, self._asked = self._asked, []
        for each in asked:
            self._hear(each)
        row = next((row for row in self.slots.taken if row is not None), None)
        if row is None:
            return
        draft = self._draft(row, drafter)
        if draft is None:
            self._ask()
            return
        most = row.running.request.max_tokens - row.n_asked
        made = self.slots.check(draft, len(row.prompt) + len(row.made) - 1, most)
        row.n_asked += len(made)
        for token in made:
            if not row.is_done and row.running in self._alive:
                self._guarded(row.running, self._add, row, token, None, 0)

    def _draft(self, row: Row, drafter: Drafter) -> jax.Array | None:
        """The draft of a row that is alone; None if it has none, or may not have one."""
        alone, limit = self.slots.alone, self._model.max_len
        n_read = len(row.prompt) + len(row.made) + drafter.n_draft
        is_last = row.n_asked + 1 >= row.running.request.max_tokens
        too_long = limit is not None and n_read > limit
        if alone is None or is_last or too_long or row.wants_scores:
            return None
        draft = drafter.draft((*row.prompt, *row.made), alone)
        # What is silent compiles all programs: that which checks, and that for one token.
        return no_draft(drafter.n_draft) if row.running.silent else draft

    def _drop_cancelled(self) -> None:
        for row in [row for row in self.slots.taken if row is not None]:
            if row.running.cancelled:
                self._end(row)
        for running in [running for running in self._alive if running.cancelled]:
            self._finish(running)

    def _begin_readings(self) -> None:
        while self._groups and len(self._readings) < _READINGS:
            if len(self._readings) + len(self._read) >= max(1, self.slots.n_free):
                return
            group = self._groups.popleft()
            self._guarded(group.running, self._begin, group)

    def _begin(self, group: Group) -> None:
        request = group.running.request
        group.rows = [Row(group.running, i, self._text(group, i)) for i in group.indices]
        if request.max_tokens == 0 and not group.scored:
            for row in group.rows:
                self._tell_prompt(row, ())
                self._end(row)
            return
        room = self._model.room(len(group.ids) + 1)
        room = max(room, self.slots.room) if self.slots.n_taken else room
        adapter = self._model.adapter(request.adapter)
        group.reading = self._desk.begin(group.ids, room, group.scored, adapter)
        group.running.n_cached += group.reading.n_cached
        self._readings.append(group)

    def _text(self, group: Group, index: int) -> Text | Silent:
        request = group.running.request
        if group.running.silent:
            return Silent(request.max_tokens)
        row, whole = request.rows[index], request.rows_of_text[index]
        return Text(self._tokenizer, request.stop, request.max_tokens, row, whole)

    def _read_piece(self) -> None:
        if not self._readings:
            return
        group = self._readings.popleft()
        reading = group.reading
        assert reading is not None
        if self._piece is not None:  # one piece ahead, or nothing could be cancelled
            self._piece.block_until_ready()
        hurried = self._limits.same_program or self.slots.n_taken > 0
        if not self._guarded(group.running, reading.read, hurried):
            return
        self._piece = reading.logits
        (self._read if reading.done else self._readings).append(group)

    def _place(self) -> None:
        """Puts rows whose prompts are read into free slots."""
        while self._read:
            group = self._read.popleft()  # first: what ends a completion removes its groups
            if not self._guarded(group.running, self._tell_prompts, group):
                continue
            needs_slots = group.running.request.max_tokens > 0
            while group.n_placed < len(group.rows) and (self.slots.n_free or not needs_slots):
                self._place_one(group)
            if group.n_placed < len(group.rows):
                self._read.appendleft(group)
                return

    def _place_one(self, group: Group) -> None:
        row, reading = group.rows[group.n_placed], group.reading
        assert reading is not None
        group.n_placed += 1
        last = group.n_placed == len(group.rows)
        if row.running.request.max_tokens == 0:
            return self._end(row)
        drawn, one = self._desk.first(reading, self._chosen(row), row.wants_scores)
        wanted = sum(self._alive.values())
        self.slots.put(row, one, len(group.ids), reading.room, wanted)
        row.n_asked = 1
        self._asked.append(_Asked([row], drawn, group if last else None))
        return None

    def _chosen(self, row: Row) -> Chosen:
        request = row.running.request
        own = jax.random.fold_in(key('seed', request.seed), row.index)
        held = np.zeros((1, self._model.vocab_size), np.int32)
        held[0, list(row.prompt)] = 1
        return Chosen(stacked([request.sampling]), jax.random.key_data(own)[None], held)

    def _ask(self) -> list[_Asked]:
        """Asks for the next token of each row; returns what was asked for before."""
        before, self._asked = self._asked, []
        rows = [row for row in self.slots.taken if row is not None]
        if any(row.wants_more for row in rows):
            needed = max(len(row.prompt) + row.n_asked for row in rows)
            drawn = self.slots.step(needed, any(row.wants_scores for row in rows))
            for row in rows:
                row.n_asked += 1
            self._asked.append(_Asked(list(self.slots.taken), drawn))
        return before

    def _hear(self, asked: _Asked) -> None:
        """Hands over the tokens that were made."""
        token, scores = np.asarray(asked.drawn.token), asked.drawn.scores
        if any(row is not None and row.wants_scores for row in asked.rows):
            scores = jax.device_get(scores)
        for i, row in enumerate(asked.rows):
            if row is not None and not row.is_done and row.running in self._alive:
                self._guarded(row.running, self._add, row, token[i], scores, i)
        group = asked.group
        if group is not None and group.reading is not None and token[0] != NO_TOKEN:
            self._desk.end(group.reading)

    def _add(self, row: Row, token: Any, scores: Alternatives | None, i: int) -> None:
        if token == NO_TOKEN:
            self.slots.free(row, spoilt=True)
            raise diverged(f'at token {len(row.made)} of row {row.index}')
        stops = int(token) in self._stop_ids
        told: tuple[TokenScore, ...] = ()
        if row.wants_scores and scores is not None:
            told = (self._told(row, int(token), scores, i),)
        row.add(self._tokenizer.eos_id if stops else int(token), told)
        if row.is_done:
            self._keep(row)
            self._end(row)

    def _told(self, row: Row, token: int, scores: Alternatives, i: int) -> TokenScore:
        n = row.running.request.logprobs or 0
        pairs = zip(scores.ids[i, :n].tolist(), scores.logprobs[i, :n].tolist(), strict=True)
        return TokenScore(token, float(scores.logprob[i]), tuple(pairs))

    def _tell_prompts(self, group: Group) -> None:
        """Posts the prompts of rows that begin with them, once."""
        if group.told:
            return
        group.told = True
        scores: list[TokenScore] = []
        assert group.reading is not None
        if group.scored:
            scores = [TokenScore(group.ids[0], None)]
            pieces = jax.device_get(group.reading.scores)
            ids = iter(group.ids[1:])
            for n, piece in pieces:
                for i, token in zip(range(n), ids, strict=False):
                    scores.append(self._told(group.rows[0], token, piece, i))
            if any(np.isnan(score.logprob or 0) for score in scores):
                raise diverged('in the prompt')
        for row in group.rows:
            if row.running.request.echo:
                self._tell_prompt(row, tuple(scores))

    def _tell_prompt(self, row: Row, scores: tuple[TokenScore, ...]) -> None:
        reason = None if row.running.request.max_tokens else 'length'
        row.running.post(Piece(row.index, row.text.prompt, reason, scores))

    def _keep(self, row: Row) -> None:
        """Keeps the states of an answer, for the next turn of a talk."""
        if self._model.reads_whole or not self._model.axes.can_seek or row not in self.slots.taken:
            return
        known = (*row.prompt, *row.made[:-1])  # the last token has not been read
        keys = self.prefixes.keys(known, self._model.adapter(row.running.request.adapter))
        for i in range(len(keys)):
            chain = keys[: i + 1]
            if self.prefixes.wants(chain):
                self.prefixes.keep(chain, Block(self.slots.block(row, i), None))

    def _end(self, row: Row) -> None:
        """Ends a row, and its completion with the last of them."""
        if row in self.slots.taken:
            self.slots.free(row)
        if row.running in self._alive:
            self._alive[row.running] -= 1
            if not self._alive[row.running]:
                self._finish(row.running)

    def _finish(self, running: Running, error: Exception | None = None) -> None:
        """Ends a completion."""
        with self._lock:
            self._alive.pop(running, None)
        for row in [row for row in self.slots.taken if row is not None]:
            if row.running is running:  # what failed may have left NaN in any row with its prompt
                self.slots.free(row, spoilt=error is not None)
        for groups in (self._groups, self._readings, self._read):
            for group in [group for group in groups if group.running is running]:
                groups.remove(group)
        if error is not None:
            running.post(error)
        running.post(None)

    def _guarded(self, running: Running, act: Callable[..., Any], *args: Any) -> bool:
        """Does something for one completion; an error ends this one alone. Whether it went well."""
        try:
            act(*args)
        except Exception as e:
            self._finish(running, _refusal(e))
            return False
        return True

    def _fail_all(self, error: Exception) -> None:
        refusal = _refusal(error)
        self._asked, self._piece = [], None
        self.slots.clear()
        self._desk.clear()
        if self._drafter is not None:
            self._drafter.clear()
        self.prefixes.clear()  # what failed may be among what is kept
        for running in list(self._alive):
            self._finish(running, refusal)


def busy() -> Refusal:
    """The answer to a request that finds no place."""
    return Refusal(
        429, 'too many requests at once: try again later', 'busy', headers={'Retry-After': '1'}
    )


def _alike(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of rows, those with the same prompt together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row), []).append(i)
    return list(groups.values())


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UsageError):  # not the request's fault, e.g. weights that diverged
        return Refusal(500, str(error), 'internal_error')
    logging.getLogger(__name__).error('a completion failed', exc_info=error)
    return Refusal(500, 'the model failed: its log says why', 'internal_error')
