"""The protocol of ``POST /v1/completions``, which follows OpenAI's completions API.

Reference: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from layercomb.checks import Bound, fault
from layercomb.data.adapted import adapted
from layercomb.errors import one_line
from layercomb.serving.limits import Limits
from layercomb.supervised.decoding.sampling import Sampler

_STOPS, _STOP_LENGTH = 4, 256


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


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for a completion.

    Attributes:
      prompts: the token ids of each prompt.
      max_tokens: the most tokens to make, for each choice.
      n: how many choices to make of each prompt.
      sampling: how tokens are drawn.
      seed: of the sample.
      stop: texts that end a choice, and are not part of it.
      echo: whether each choice begins with its prompt.
      stream: whether to send text as it is made.
      include_usage: whether a stream ends with the usage.
      logprobs: how many alternatives of each token are told; None tells nothing.
      of_text: whether each prompt was given as a text; empty if none was.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 16
    n: int = 1
    sampling: Sampler = Sampler()
    seed: int = 0
    stop: tuple[str, ...] = ()
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    of_text: tuple[bool, ...] = ()
    logprobs: int | None = None

    @property
    def rows_of_text(self) -> list[bool]:
        """Whether the prompt of each choice was given as a text."""
        return [text for text in self.of_text or [False] * len(self.prompts) for _ in range(self.n)]

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The prompt of each choice: prompt 0's choices, prompt 1's …"""
        return [prompt for prompt in self.prompts for _ in range(self.n)]


def parse(body: bytes, tokenizer: Any, model: str, vocab_size: int, limits: Limits) -> Request:
    """Reads a request.

    Unsupported fields are accepted if their values change nothing: `best_of` of at most `n`,
    penalties and biases of 0, an empty `suffix`, and null for any field. Other values of them are
    refused by name. Ints may be written as 16.0, which is the same number in JSON. A field may not
    come twice.

    Args:
      body: JSON.
      tokenizer: turns prompts into tokens.
      model: the name of the served model.
      vocab_size: the model's token ids are less than this.
      limits: what a request may ask for.

    Raises:
      Refusal: if anything in it is wrong.
    """
    try:
        fields = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f'the body is no JSON ({e})', 'invalid_json') from None
    if not isinstance(fields, dict):
        raise Refusal(400, 'the body must be an object of JSON', 'invalid_json')
    fields = {name: value for name, value in fields.items() if value is not None}
    unknown = sorted(fields.keys() - _READERS.keys() - _NEUTRAL.keys() - _NAMES)
    if unknown:
        raise _wrong(_name(unknown[0]), 'is not a field of a completion', 'unknown_field')
    if fields.get('model', model) != model:
        raise Refusal(404, f'there is only the model {model!r}', 'model_not_found', 'model')
    values = {name: read(fields[name]) for name, read in _READERS.items() if name in fields}
    for name, (asks_nothing, neutral) in _NEUTRAL.items():
        if name in fields and not asks_nothing(fields[name], values):
            raise _wrong(name, neutral.format(n=values.get('n', 1)))
    usage = values.pop('stream_options', False)
    values.setdefault('seed', secrets.randbits(31))
    values['sampling'] = Sampler(**{n: values.pop(n) for n in _SAMPLING if n in values})
    given = _prompts(fields.get('prompt'))
    prompts = tuple(_prompt(prompt, tokenizer, vocab_size) for prompt in given)
    of_text = tuple(isinstance(prompt, str) for prompt in given)
    request = Request(prompts, include_usage=usage, of_text=of_text, **values)
    _within(request, limits)
    return request


def new_id() -> str:
    """A name for a completion."""
    return f'cmpl-{secrets.token_hex(12)}'


def completion(name: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A completion, or a piece of one, without its usage."""
    return {
        'id': name,
        'object': 'text_completion',
        'created': int(time.time()),
        'model': model,
        'choices': choices,
    }


def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One text of a completion."""
    return {'text': text, 'index': index, 'finish_reason': finish_reason, 'logprobs': None}


def usage(request: Request, n_made: int) -> dict[str, int]:
    """The numbers of tokens that were read and made, as OpenAI names them."""
    n_read = sum(map(len, request.prompts))
    return {
        'prompt_tokens': n_read,
        'completion_tokens': n_made,
        'total_tokens': n_read + n_made,
    }


def _within(request: Request, limits: Limits) -> None:
    if request.max_tokens > limits.max_tokens:
        raise _wrong('max_tokens', f'must be at most {limits.max_tokens} here')
    if len(request.prompts) * request.n > limits.max_choices:  # before any is made
        raise _wrong('n', f'times the number of prompts must be at most {limits.max_choices} here')
    longest = max(map(len, request.prompts))
    if longest > limits.max_prompt:
        raise _wrong(
            'prompt',
            f'has {longest} tokens, and {limits.max_prompt} are allowed here: shorten it',
            'context_length_exceeded',
        )


def _prompts(value: Any) -> list[Any]:
    """A text, texts, token ids, or lists of token ids."""
    one = isinstance(value, str) or (isinstance(value, list) and value and _is_whole(value[0]))
    prompts = [value] if one else value
    if not isinstance(prompts, list) or not prompts:
        raise _wrong('prompt', 'must be a text, a list of texts, or token ids')
    return prompts


def _prompt(value: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            ids = adapted(tokenizer).encode(value).tolist()
        except (ValueError, TypeError, LookupError) as e:  # e.g. half of a surrogate pair
            raise _wrong('prompt', f'is no text ({cut(one_line(e), 200)})') from None
    elif isinstance(value, list) and all(map(_is_whole, value)):
        ids = [int(i) for i in value]
    else:
        raise _wrong('prompt', 'must be a text, a list of texts, or token ids')
    if not ids:
        raise _wrong('prompt', 'is empty: give a text that has at least one token')
    for i in ids:
        if not 0 <= i < vocab_size:
            shown = cut(str(i), 20)
            raise _wrong('prompt', f'has a token {shown} outside the vocabulary of {vocab_size}')
    return tuple(ids)


def _number(name: str, bound: Bound, kind: type = float) -> Callable[[Any], Any]:
    """Reads a number of a kind that lies in a range; 16.0 is an int, since JSON does not tell."""

    def read(value: Any) -> Any:
        value = int(value) if kind is int and _is_whole(value) else value
        if (wrong := fault(value, Annotated[kind, bound])) is not None:
            raise _wrong(name, f'must be {wrong[1]}')
        return kind(value)

    return read


def _flag(name: str) -> Callable[[Any], bool]:
    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise _wrong(name, 'must be true or false')
        return value

    return read


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > _STOPS
        or not all(isinstance(t, str) and 0 < len(t) <= _STOP_LENGTH for t in texts)
    ):
        what = f'a text, or up to {_STOPS} of them, of 1 to {_STOP_LENGTH} characters'
        raise _wrong('stop', f'must be {what}')
    return tuple(texts)


def _stream_options(value: Any) -> bool:
    options = dict(value) if isinstance(value, dict) else {'': value}
    options = {name: option for name, option in options.items() if option is not None}
    if options.get('include_obfuscation') is False:  # nothing is
        del options['include_obfuscation']
    if not options.keys() <= {'include_usage'}:
        raise _wrong('stream_options', "must be an object with 'include_usage' alone")
    return _flag('stream_options')(options.get('include_usage', False))


_MANY = Bound(1, high=2**31 - 1)
_READERS: dict[str, Callable[[Any], Any]] = {
    'max_tokens': _number('max_tokens', _MANY, int),
    'n': _number('n', _MANY, int),
    'temperature': _number('temperature', Bound(0, high=2)),
    'top_p': _number('top_p', Bound(above=0, high=1)),
    'top_k': _number('top_k', _MANY, int),
    'repetition_penalty': _number('repetition_penalty', Bound(1e-6, high=10)),
    'seed': _number('seed', Bound(-(2**63), high=2**63 - 1), int),
    'stop': _stop,
    'echo': _flag('echo'),
    'stream': _flag('stream'),
    'stream_options': _stream_options,
}


def _is_zero(value: Any, values: Mapping[str, Any] = {}) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def _is_bias_of_nothing(value: Any, values: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(map(_is_zero, value.values()))


def _is_at_most_n(value: Any, values: Mapping[str, Any]) -> bool:
    return _is_whole(value) and 1 <= value <= values.get('n', 1)


# Unsupported fields: whether a value changes nothing, and the message if it does.
_UNSUPPORTED = 'is not supported: leave it out, or at'
_NEUTRAL: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    'presence_penalty': (_is_zero, f'{_UNSUPPORTED} 0'),
    'frequency_penalty': (_is_zero, f'{_UNSUPPORTED} 0'),
    'best_of': (_is_at_most_n, 'may be at most n, here {n}, as a whole number from 1'),
    'logprobs': (lambda value, _: value is False, f'{_UNSUPPORTED} false'),
    'logit_bias': (_is_bias_of_nothing, _UNSUPPORTED + ' {{}}'),
    'suffix': (lambda value, _: value == '', f'{_UNSUPPORTED} ""'),
}
_SAMPLING = ('temperature', 'top_k', 'top_p', 'repetition_penalty')
_NAMES = {'model', 'prompt', 'user'}  # the user is ignored


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON has one kind of number, and 16.0 is 16."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a name that comes twice is refused, since either value may be meant."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise _wrong(_name(name), 'is there twice: give it once', 'duplicate_field')
        made[name] = value
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')


def _name(given: str) -> str:
    """A client's name of a field, cut and without what UTF-8 cannot hold."""
    return cut(given, 64).encode(errors='replace').decode()


def cut(text: str, most: int) -> str:
    """A client's text, cut to its beginning if it is too long for a message."""
    return text if len(text) <= most else f'{text[:most]}…'


def _wrong(param: str, what: str, code: str = 'invalid_value') -> Refusal:
    return Refusal(400, f'{param!r} {what}', code, param)
