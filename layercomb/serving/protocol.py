"""What a client asks for, whichever endpoint it used, and what it gets if that cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from layercomb.supervised.decoding.sampling import Sampler

_SHOWN = 8  # names in a message


class Refusal(Exception):
    """An error response instead of a completion.

    Args:
      status: the HTTP status.
      message: a line of cause and cure.
      code: the kind of error, for programs.
      param: the field of the request that is wrong.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = 'invalid_request_error' if status < 500 else 'server_error'
        kind = 'rate_limit_error' if status == 429 else kind
        error = {'message': message, 'type': kind, 'param': param, 'code': code}
        self.body = {'error': error}


def unknown_model(asked: object, names: Sequence[str]) -> Refusal:
    """The answer to a request for a model that is not served.

    Args:
      asked: what the request calls it.
      names: of the models that are served.
    """
    if not names:
        said = f'there is no adapter {repr(asked)[:80]}: the model has none'
    elif len(names) == 1:
        said = f'there is only the model {names[0]!r}'
    else:
        shown = ', '.join(repr(name) for name in names[:_SHOWN])
        more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
        said = f'there is no model {repr(asked)[:80]}: choose one of {shown}{more}'
    return Refusal(404, said, 'model_not_found', 'model')


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for a completion.

    Attributes:
      prompts: the token ids of each prompt.
      max_tokens: the most tokens to make, for each choice; 0 if only the prompt is asked about.
      n: how many choices to show of each prompt.
      best_of: how many to make of each, if more than `n`: those of the highest mean log-probability
        a token are shown.
      sampling: how tokens are drawn.
      seed: of the sample.
      stop: texts that end a choice, and are not part of it.
      echo: whether each choice begins with its prompt.
      logprobs: how many alternatives the scores of each token tell; 0 for the token's own score
        alone, None for no scores.
      shows_logprobs: whether the client sees the scores; those of `best_of` may be for the server.
      stream: whether to send text as it is made.
      include_usage: whether a stream ends with the usage.
      of_text: whether each prompt was given as a text; empty if none was.
      chat: whether it is a turn of a conversation.
      adapter: the name of the adapter that makes it; None for the model alone.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 16
    n: int = 1
    best_of: int | None = None
    sampling: Sampler = Sampler()
    seed: int = 0
    stop: tuple[str, ...] = ()
    echo: bool = False
    logprobs: int | None = None
    shows_logprobs: bool = True
    stream: bool = False
    include_usage: bool = False
    of_text: tuple[bool, ...] = ()
    chat: bool = False
    adapter: str | None = None

    @property
    def n_rows(self) -> int:
        """How many rows are made of each prompt."""
        return max(self.n, self.best_of or 1)

    @property
    def rows_of_text(self) -> list[bool]:
        """Whether the prompt of each row was given as a text."""
        given = self.of_text or (False,) * len(self.prompts)
        return [text for text in given for _ in range(self.n_rows)]

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The prompt of each row: prompt 0's rows, prompt 1's …"""
        return [prompt for prompt in self.prompts for _ in range(self.n_rows)]
