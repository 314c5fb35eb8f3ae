"""``POST /v1/chat/completions``: its requests, as in OpenAI's chat completions API.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layercomb.errors import UsageError, one_line
from layercomb.serving.limits import Limits
from layercomb.serving.openai import fields
from layercomb.serving.openai.completions import check_ids
from layercomb.serving.openai.fields import cut, number, wrong
from layercomb.serving.protocol import Refusal, Request

_ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}


def parse(
    body: bytes,
    tokenizer: Any,
    model: str,
    vocab_size: int,
    limits: Limits,
    advised: Mapping[str, Any] = {},
    max_len: int | None = None,
    adapters: Sequence[str] = (),
) -> Request:
    """Reads a request.

    Args:
      body: JSON.
      tokenizer: has ``encode_chat``, which turns messages into tokens.
      model, vocab_size, limits, advised, adapters: as for `completions.parse`.
      max_len: how many positions the model reaches: without `max_tokens`, an answer may be as long
        as there is room, and as the limits allow.

    Raises:
      Refusal: if anything in it is wrong.
    """
    given = fields.in_object(body)
    values = fields.read(given, model, _READERS, _NEUTRAL, ('messages', *_IGNORED), adapters)
    prompt = _encoded(_messages(given.get('messages')), tokenizer, vocab_size)
    values = _checked(values)
    room = limits.max_tokens if max_len is None else max_len - len(prompt)
    values.setdefault('max_tokens', max(1, min(limits.max_tokens, room)))
    request = fields.requested((prompt,), values, advised, of_text=(True,), chat=True)
    fields.check_limits(request, limits, 'messages')
    fields.check_biases(request, vocab_size)
    return request


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were read, by the names of `Request`."""
    made = dict(values)
    new, old = made.pop('max_completion_tokens', None), made.get('max_tokens')
    if new is not None and old is not None and new != old:
        raise wrong('max_completion_tokens', "and 'max_tokens' differ: give one of them")
    if new is not None:
        made['max_tokens'] = new
    wanted, top = made.pop('logprobs', False), made.pop('top_logprobs', 0)
    if top and not wanted:
        raise wrong('top_logprobs', "needs 'logprobs': true")
    return {**made, 'logprobs': top if wanted else None}


def _encoded(messages: list[dict[str, str]], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    try:
        ids = [int(i) for i in tokenizer.encode_chat(messages)]
    except UsageError as e:  # the template refuses them
        raise Refusal(400, cut(one_line(e), 400), 'invalid_value', 'messages') from None
    except (ValueError, TypeError, LookupError) as e:
        raise wrong('messages', f'are no text ({cut(one_line(e), 200)})') from None
    if not ids:
        raise wrong('messages', 'are empty: give a text that has at least one token')
    check_ids('messages', ids, vocab_size)
    return tuple(ids)


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages with a role and a text each."""
    if not isinstance(value, list) or not value:
        what = 'must be a list such as [{"role": "user", "content": "Hello"}]'
        raise wrong('messages', what)
    return [_message(f'messages[{i}]', each) for i, each in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong(where, 'must be an object with a role and a content')
    given = {name: each for name, each in value.items() if each not in (None, [], {})}
    role = given.pop('role', None)
    if role in ('tool', 'function'):
        raise wrong(where, f'has the role {role!r}: tools are not supported')
    if not isinstance(role, str) or role not in _ROLES:
        shown = cut(repr(role), 40)
        raise wrong(where, f'has the role {shown}: there are {", ".join(_ROLES)}')
    content = given.pop('content', None)
    if given:
        raise wrong(where, f'has {cut(min(given), 40)!r}, which is not supported: leave it out')
    return {'role': _ROLES[role], 'content': _content(where, content)}


def _content(where: str, value: Any) -> str:
    """A text, or texts in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, "has no content: give a text, or a list of parts of the type 'text'")
    return ''.join(_part(where, part) for part in value)


def _part(where: str, value: Any) -> str:
    kind = value.get('type') if isinstance(value, dict) else None
    if kind != 'text':
        shown = cut(repr(kind), 40)
        raise wrong(where, f'has a part of the type {shown}: only texts are supported')
    if not isinstance(value.get('text'), str) or len(value) != 2:
        raise wrong(where, 'has a part without a text: give {"type": "text", "text": "…"}')
    text: str = value['text']
    return text


_MAX_TOKENS = fields.MANY
_READERS: dict[str, fields.Reader] = {
    **fields.COMMON,
    'max_tokens': number('max_tokens', _MAX_TOKENS, int),
    'max_completion_tokens': number('max_completion_tokens', _MAX_TOKENS, int),
    'logprobs': fields.flag('logprobs'),
    'top_logprobs': number('top_logprobs', fields.TOP, int),
}
_TOOLS = 'is not supported: the model calls no tools'
_NEUTRAL: dict[str, fields.Neutral] = {
    'tools': (lambda value, _: value == [], _TOOLS),
    'tool_choice': (lambda value, _: value in ('none', 'auto'), _TOOLS),
    'functions': (lambda value, _: value == [], _TOOLS),
    'function_call': (lambda value, _: value in ('none', 'auto'), _TOOLS),
    'parallel_tool_calls': (lambda value, _: isinstance(value, bool), _TOOLS),
    'response_format': (
        lambda value, _: value == {'type': 'text'},
        f'{fields.UNSUPPORTED} {{"type": "text"}}',
    ),
    'modalities': (lambda value, _: value == ['text'], f'{fields.UNSUPPORTED} ["text"]'),
    'store': (lambda value, _: value is False, f'{fields.UNSUPPORTED} false'),
}
# They change no answer.
_IGNORED = ('metadata', 'service_tier', 'prompt_cache_key', 'safety_identifier')
