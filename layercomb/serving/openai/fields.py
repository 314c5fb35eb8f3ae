"""Fields of a request: the object of JSON that holds them, and readers of single ones.

A reader turns a value of JSON into one of ours, or raises a `Refusal` that names the field.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

from layercomb.checks import Bound, fault
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request, unknown_model
from layercomb.supervised.decoding.sampling import Sampler

_STOPS, _STOP_LENGTH = 16, 256
_BIASES = 300
_ID = re.compile(r'0|[1-9][0-9]{0,8}')
_TOP = 20  # alternatives that the scores of a token may tell
UNSUPPORTED = 'is not supported: leave it out, or at'

Reader = Callable[[Any], Any]
Neutral = tuple[Callable[[Any, Mapping[str, Any]], bool], str]


def in_object(body: bytes) -> dict[str, Any]:
    """The fields of an object of JSON that are not null.

    Raises:
      Refusal: if it is no JSON, no object, or has a name twice.
    """
    try:
        fields = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f'the body is no JSON ({e})', 'invalid_json') from None
    if not isinstance(fields, dict):
        raise Refusal(400, 'the body must be an object of JSON', 'invalid_json')
    return {name: value for name, value in fields.items() if value is not None}


def read(
    fields: Mapping[str, Any],
    model: str,
    readers: Mapping[str, Reader],
    neutral: Mapping[str, Neutral],
    others: Collection[str] = (),
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """Reads the fields of a request, which must be known.

    Args:
      fields: values of JSON.
      model: the name of the served model.
      readers: of each field that means something.
      neutral: fields that are not supported: whether a value changes nothing, given those that were
        read, and the message if it does.
      others: names of fields that are read elsewhere, or ignored.
      adapters: the names of adapters, which are models too.

    Returns:
      The values of the fields that have readers; with ``adapter``, if one is asked for.

    Raises:
      Refusal: if anything is wrong.
    """
    unknown = sorted(fields.keys() - readers.keys() - neutral.keys() - {'model', 'user', *others})
    if unknown:
        raise wrong(_name(unknown[0]), 'is not a field of a completion', 'unknown_field')
    asked = fields.get('model', model)
    if asked != model and asked not in adapters:
        raise unknown_model(asked, (model, *adapters))
    values = {name: reader(fields[name]) for name, reader in readers.items() if name in fields}
    for name, (asks_nothing, said) in neutral.items():
        if name in fields and not asks_nothing(fields[name], values):
            raise wrong(name, said)
    return values if asked == model else {**values, 'adapter': asked}


def requested(
    prompts: tuple[tuple[int, ...], ...],
    values: dict[str, Any],
    advised: Mapping[str, Any],
    **more: Any,
) -> Request:
    """A request for prompts.

    Args:
      prompts: their token ids.
      values: the fields that were read.
      advised: what the model's makers advise for sampling; it holds where the request is silent.
      **more: further fields of `Request`.
    """
    values = dict(values)
    sampling = {name: values.pop(name) for name in SAMPLING if name in values}
    usage = values.pop('stream_options', False)
    values.setdefault('seed', secrets.randbits(31))
    sampler = Sampler(**{**advised, **sampling})
    return Request(prompts, sampling=sampler, include_usage=usage, **values, **more)


def check_limits(request: Request, limits: Limits, prompt: str) -> None:
    """Raises a Refusal if a request asks for too much.

    Args:
      request: what is asked for.
      limits: what may be.
      prompt: the name of the field with the prompt.
    """
    if request.max_tokens > limits.max_tokens:
        raise wrong('max_tokens', f'must be at most {limits.max_tokens} here')
    check_choices(len(request.prompts), request.n, request.best_of, limits)
    longest = max(map(len, request.prompts))
    if longest > limits.max_prompt:
        raise wrong(
            prompt,
            f'has {longest} tokens, and {limits.max_prompt} are allowed here: shorten it',
            'context_length_exceeded',
        )


def check_choices(n_prompts: int, n: int, best_of: int | None, limits: Limits) -> None:
    """Raises a Refusal if more choices are asked for than may be, before any is made.

    Args:
      n_prompts: how many prompts there are.
      n, best_of: as of `Request`.
      limits: what may be.
    """
    if n_prompts * max(n, best_of or 1) > limits.max_choices:
        most = f'times the number of prompts must be at most {limits.max_choices} here'
        raise wrong('n' if best_of is None else 'best_of', most)


def number(name: str, bound: Bound, kind: type = float) -> Reader:
    """Reads a number of a kind that lies in a range; 16.0 is an int, since JSON does not tell."""

    def read(value: Any) -> Any:
        value = int(value) if kind is int and is_whole(value) else value
        if (found := fault(value, Annotated[kind, bound])) is not None:
            raise wrong(name, f'must be {found[1]}')
        return kind(value)

    return read


def flag(name: str) -> Callable[[Any], bool]:
    """Reads true or false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise wrong(name, 'must be true or false')
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
        raise wrong('stop', f'must be {what}')
    return tuple(texts)


def _stream_options(value: Any) -> bool:
    options = dict(value) if isinstance(value, dict) else {'': value}
    options = {name: option for name, option in options.items() if option is not None}
    if options.get('include_obfuscation') is False:  # nothing is
        del options['include_obfuscation']
    if not options.keys() <= {'include_usage'}:
        raise wrong('stream_options', "must be an object with 'include_usage' alone")
    return flag('stream_options')(options.get('include_usage', False))


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of id and bias, by id; biases of 0 are left out, since they change nothing."""
    what = f'must be an object of up to {_BIASES} token ids and their biases from -100 to 100'
    if not isinstance(value, dict) or len(value) > _BIASES:
        raise wrong('logit_bias', what)
    bias = number('logit_bias', Bound(-100, high=100))
    made = {}
    for name, given in value.items():
        if not _ID.fullmatch(name):  # 07 would be 7 once more
            raise wrong('logit_bias', f'{what}: {cut(name, 20)!r} is no id')
        made[int(name)] = bias(given)
    return tuple(sorted((i, b) for i, b in made.items() if b))


def check_biases(request: Request, vocab_size: int) -> None:
    """Raises a Refusal if a bias is for no token of the vocabulary."""
    for i, _ in request.sampling.logit_bias:
        if i >= vocab_size:
            said = f'has a token {i} outside the vocabulary of {vocab_size}'
            raise wrong('logit_bias', said)


MANY = Bound(1, high=2**31 - 1)
TOP = Bound(0, high=_TOP)
_PENALTY = Bound(-2, high=2)
SAMPLING: dict[str, Reader] = {
    'temperature': number('temperature', Bound(0, high=2)),
    'top_p': number('top_p', Bound(above=0, high=1)),
    'top_k': number('top_k', MANY, int),
    'repetition_penalty': number('repetition_penalty', Bound(1e-6, high=10)),
    'presence_penalty': number('presence_penalty', _PENALTY),
    'frequency_penalty': number('frequency_penalty', _PENALTY),
    'logit_bias': _logit_bias,
}
COMMON: dict[str, Reader] = {
    **SAMPLING,
    'n': number('n', MANY, int),
    'seed': number('seed', Bound(-(2**63), high=2**63 - 1), int),
    'stop': _stop,
    'stream': flag('stream'),
    'stream_options': _stream_options,
}


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON has one kind of number, and 16.0 is 16."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def cut(text: str, most: int) -> str:
    """A client's text, cut to its beginning if it is too long for a message."""
    return text if len(text) <= most else f'{text[:most]}…'


def wrong(param: str, what: str, code: str = 'invalid_value') -> Refusal:
    """The refusal of a field, to be raised."""
    return Refusal(400, f'{param!r} {what}', code, param)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a name that comes twice is refused, since either value may be meant."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise wrong(_name(name), 'is there twice: give it once', 'duplicate_field')
        made[name] = value
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f'{name} is no number of JSON')


def _name(given: str) -> str:
    """A client's name of a field, cut and without what UTF-8 cannot hold."""
    return cut(given, 64).encode(errors='replace').decode()
