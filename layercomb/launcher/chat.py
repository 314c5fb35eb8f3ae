"""A conversation in the terminal: `talk`.

A line that begins with ``/`` is a command. Ctrl-C stops an answer, and the end of the input
(Ctrl-D) ends the conversation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from layercomb.errors import UsageError
from layercomb.model import Model
from layercomb.serving.engine import Engine
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request
from layercomb.supervised.decoding.drafts import Speculation
from layercomb.supervised.decoding.prompts import checked
from layercomb.supervised.decoding.sampling import Sampler

_HELP = """\
/reset          forgets what was said
/system TEXT    tells the model this first, from now on, and forgets the rest; without TEXT, nothing
/help           shows this
/exit           ends, as Ctrl-D does; Ctrl-C stops an answer"""

Message = dict[str, str]


class Conversation:
    """What has been said, and the model's answers. What was read before is not read again.

    Args:
      model: a language model with weights.
      tokenizer: one with a chat template, see `interop.tokenizer.PretrainedTokenizer`.
      n_tokens: the most tokens of an answer.
      speculate: how its tokens are drafted, as of `Engine`; None for no drafts.

    Attributes:
      messages: dicts of ``role`` (``system``, ``user``, ``assistant``) and ``content``.

    Raises:
      UsageError: if the model is no language model or cannot speculate, or the tokenizer has no
        chat template.
    """

    def __init__(
        self, model: Model, tokenizer: Any, n_tokens: int, speculate: Speculation | None = None
    ) -> None:
        checked(model)
        if getattr(tokenizer, 'chat', None) is None:
            raise UsageError(
                'this model has no chat template, so it only continues texts: use layercomb '
                'generate, or a model that was taught to answer'
            )
        if n_tokens < 1:
            raise UsageError(f'--n_tokens {n_tokens} leaves no room for an answer: give at least 1')
        self._tokenizer, self._n_tokens = tokenizer, n_tokens
        limits = Limits(max_tokens=n_tokens, max_concurrent=1)
        self._engine = Engine(model, tokenizer, limits, speculate)
        self.messages: list[Message] = []

    def reset(self, system: str | None = None) -> None:
        """Forgets everything.

        Args:
          system: what the model is told before the first turn; None for nothing, or for what the
            template itself says.
        """
        self.messages = [] if system is None else [{'role': 'system', 'content': system}]

    def ask(self, text: str) -> tuple[list[int], int]:
        """Adds a turn of the user, and forgets the oldest turns if there is no room.

        Args:
          text: what the user says.

        Returns:
          The tokens to continue, and how many messages were forgotten.

        Raises:
          UsageError: if the turn alone is too long; then it is not added.
        """
        turn = {'role': 'user', 'content': text}
        kept = [*self.messages, turn]
        first = 1 if kept[0]['role'] == 'system' else 0
        n_forgotten = 0
        while (excess := self._excess(kept)) > 0:
            n = next((i for i in range(first + 1, len(kept)) if kept[i]['role'] == 'user'), None)
            if n is None:
                raise UsageError(
                    f'this is {excess} tokens too long: the model reaches '
                    f'{self._engine.max_len}, with {self._n_tokens} for the answer; say less, or '
                    'give a smaller --n_tokens'
                )
            n_forgotten += n - first
            kept = [*kept[:first], *kept[n:]]
        self.messages = kept
        return self._encoded(kept), n_forgotten

    def answered(self, text: str) -> None:
        """Adds the model's answer, whole or as far as it went."""
        self.messages = [*self.messages, {'role': 'assistant', 'content': text}]

    def _excess(self, messages: list[Message]) -> int:
        """How many tokens more there are than the model can read before it answers."""
        n = len(self._encoded(messages))
        return 0 if self._engine.max_len is None else n + self._n_tokens - self._engine.max_len

    def _encoded(self, messages: list[Message]) -> list[int]:
        return [int(i) for i in self._tokenizer.encode_chat(messages)]

    def answer(self, ids: list[int], sampling: Mapping[str, Any]) -> Iterator[str]:
        """Yields the pieces of an answer as they are made.

        Args:
          ids: the tokens to continue.
          sampling: arguments of `Sampler`, and ``rng``, the seed.

        Raises:
          UsageError: if the model cannot answer, e.g. since its weights diverged.
        """
        options = dict(sampling)
        seed = options.pop('rng', 0)
        request = Request(
            (tuple(ids),), self._n_tokens, sampling=Sampler(**options), seed=seed, of_text=(True,)
        )
        try:
            for piece in self._engine.run(request):
                if piece.text:
                    yield piece.text
        except Refusal as e:
            raise UsageError(str(e)) from None

    def close(self) -> None:
        """Ends what is being made."""
        self._engine.stop()


def talk(
    model: Model,
    tokenizer: Any,
    system: str | None,
    n_tokens: int,
    sampling: Mapping[str, Any],
    read: Callable[[str], str] = input,
    speculate: Speculation | None = None,
) -> None:
    """Talks until the input ends.

    Args:
      model: a language model with weights.
      tokenizer: one with a chat template.
      system: what the model is told first; None for nothing.
      n_tokens: the most tokens of an answer.
      sampling: see `Conversation.answer`.
      read: reads a line after showing a prompt; it raises EOFError at the end.
      speculate: as of `Conversation`.

    Raises:
      UsageError: if the model cannot talk.
    """
    conversation = Conversation(model, tokenizer, n_tokens, speculate)
    conversation.reset(system)
    with contextlib.closing(conversation):
        _converse(conversation, system, sampling, read)


def _converse(
    conversation: Conversation,
    system: str | None,
    sampling: Mapping[str, Any],
    read: Callable[[str], str],
) -> None:
    shown = '> ' if sys.stdin is not None and sys.stdin.isatty() else ''
    if shown:
        print('/help says what there is; Ctrl-D ends.', file=sys.stderr)
    while True:
        try:
            line = read(shown).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print('\n(Ctrl-D or /exit ends)', file=sys.stderr)
            continue
        if line == '/exit':
            return
        if line.startswith('/'):
            _obey(line, conversation, system)
        elif line:
            _turn(conversation, line, sampling)


def _obey(line: str, conversation: Conversation, system: str | None) -> None:
    """Carries out a command."""
    command, _, rest = line.partition(' ')
    if command == '/reset':
        conversation.reset(system)
    elif command == '/system':
        conversation.reset(rest.strip() or None)
    elif command == '/help':
        print(_HELP, file=sys.stderr)
    else:
        print(f'there is no {command}: /help says what there is', file=sys.stderr)


def _turn(conversation: Conversation, line: str, sampling: Mapping[str, Any]) -> None:
    """One question and its answer, which Ctrl-C stops."""
    try:
        ids, n_forgotten = conversation.ask(line)
    except UsageError as e:
        print(f'layercomb: {e}', file=sys.stderr)
        return
    if n_forgotten:
        print(f'(the {n_forgotten} oldest messages are forgotten: no room)', file=sys.stderr)
    pieces: list[str] = []
    try:
        for piece in conversation.answer(ids, sampling):
            pieces.append(piece)
            print(piece, end='', flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print('\n(stopped)', file=sys.stderr)
    conversation.answered(''.join(pieces))
