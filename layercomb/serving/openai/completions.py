"""``POST /v1/completions``: its requests, as in OpenAI's completions API.

Reference: https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layercomb.checks import Bound
from layercomb.data.adapted import adapted
from layercomb.errors import one_line
from layercomb.serving.limits import Limits
from layercomb.serving.openai import fields
from layercomb.serving.openai.fields import cut, is_whole, number, wrong
from layercomb.serving.protocol import Request


def parse(
    body: bytes,
    tokenizer: Any,
    model: str,
    vocab_size: int,
    limits: Limits,
    advised: Mapping[str, Any] = {},
    adapters: Sequence[str] = (),
) -> Request:
    """Reads a request.

    Ints may be written as 16.0, which is the same number in JSON. A field may not come twice. Null
    is as good as no field, and so are an empty `suffix`, a `best_of` of at most `n`, and `logprobs`
    of false.

    Args:
      body: JSON.
      tokenizer: turns prompts into tokens.
      model: the name of the served model.
      vocab_size: the model's token ids are less than this.
      limits: what a request may ask for.
      advised: arguments of `Sampler` that hold where the request is silent.
      adapters: the names of adapters of the model, which may be asked for as `model`.

    Raises:
      Refusal: if anything in it is wrong.
    """
    given = fields.in_object(body)
    values = fields.read(given, model, _READERS, _NEUTRAL, ('prompt',), adapters)
    values = _checked(values)
    texts = _prompts(given.get('prompt'))
    fields.check_choices(len(texts), values.get('n', 1), values.get('best_of'), limits)
    prompts = tuple(_prompt(prompt, tokenizer, vocab_size) for prompt in texts)
    of_text = tuple(isinstance(prompt, str) for prompt in texts)
    request = fields.requested(prompts, values, advised, of_text=of_text)
    fields.check_limits(request, limits, 'prompt')
    fields.check_biases(request, vocab_size)
    return request


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were read, which depend on each other."""
    made = dict(values)
    if made.get('max_tokens') == 0 and not made.get('echo'):
        raise wrong('max_tokens', "must be at least 1, or 0 with 'echo', for the prompt alone")
    if made.get('best_of', 1) <= made.get('n', 1):
        made.pop('best_of', None)
    elif made.get('stream'):
        raise wrong('best_of', 'must be at most n in a stream: the best are known at the end')
    if 'best_of' in made and made.get('logprobs') is None:
        made |= {'logprobs': 0, 'shows_logprobs': False}
    return made


def _prompts(value: Any) -> list[Any]:
    """A text, texts, token ids, or lists of token ids."""
    one = isinstance(value, str) or (isinstance(value, list) and value and is_whole(value[0]))
    prompts = [value] if one else value
    if not isinstance(prompts, list) or not prompts:
        raise wrong('prompt', 'must be a text, a list of texts, or token ids')
    return prompts


def _prompt(value: Any, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            ids = adapted(tokenizer).encode(value).tolist()
        except (ValueError, TypeError, LookupError) as e:  # e.g. half of a surrogate pair
            raise wrong('prompt', f'is no text ({cut(one_line(e), 200)})') from None
    elif isinstance(value, list) and all(map(is_whole, value)):
        ids = [int(i) for i in value]
    else:
        raise wrong('prompt', 'must be a text, a list of texts, or token ids')
    if not ids:
        raise wrong('prompt', 'is empty: give a text that has at least one token')
    check_ids('prompt', ids, vocab_size)
    return tuple(ids)


def check_ids(field: str, ids: list[int], vocab_size: int) -> None:
    """Raises a Refusal if one of the token ids in a field is none of the vocabulary."""
    for i in ids:
        if not 0 <= i < vocab_size:
            shown = cut(str(i), 20)
            raise wrong(field, f'has a token {shown} outside the vocabulary of {vocab_size}')


def _logprobs(value: Any) -> int | None:
    if value is False:  # as in a chat
        return None
    made: int = number('logprobs', fields.TOP, int)(value)
    return made


_READERS: dict[str, fields.Reader] = {
    **fields.COMMON,
    'max_tokens': number('max_tokens', Bound(0, high=2**31 - 1), int),
    'best_of': number('best_of', fields.MANY, int),
    'echo': fields.flag('echo'),
    'logprobs': _logprobs,
}
_NEUTRAL: dict[str, fields.Neutral] = {
    'suffix': (lambda value, _: value == '', f'{fields.UNSUPPORTED} ""'),
}
