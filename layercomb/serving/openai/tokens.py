"""The tokenizer for clients: ``/tokenize``, ``/detokenize`` and ``/tokenizer_info``.

Programs that score texts, such as lm_eval, count tokens with the tokenizer of the model. Paths and
fields are those of vLLM's server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb.data.adapted import adapted
from layercomb.errors import one_line
from layercomb.serving.openai import fields
from layercomb.serving.openai.completions import check_ids
from layercomb.serving.openai.fields import cut, flag, is_whole, wrong


def tokenize(
    body: bytes, tokenizer: Any, model: str, adapters: Sequence[str] = ()
) -> dict[str, Any]:
    """The token ids of a text, as a prompt has them.

    Args:
      body: JSON, with `prompt`. ``"add_special_tokens": false`` leaves out the tokens that start
        and end a text in this vocabulary.
      tokenizer: see `data.Tokenizer`.
      model: the name of the served model.
      adapters: the names of its adapters, which have the same tokenizer.

    Raises:
      Refusal: if anything in it is wrong.
    """
    given = fields.in_object(body)
    values = fields.read(given, model, _TOKENIZE, {}, ('prompt',), adapters)
    text = given.get('prompt')
    if not isinstance(text, str):
        raise wrong('prompt', 'must be a text')
    try:
        ids = adapted(tokenizer).encode(text).tolist()
        if not values.get('add_special_tokens', True):
            ids = _without_borders(ids, adapted(tokenizer).encode('').tolist())
    except (ValueError, TypeError, LookupError) as e:
        raise wrong('prompt', f'is no text ({cut(one_line(e), 200)})') from None
    return {'tokens': ids, 'count': len(ids)}


def detokenize(
    body: bytes, tokenizer: Any, model: str, vocab_size: int, adapters: Sequence[str] = ()
) -> dict[str, Any]:
    """The text of token ids.

    Args:
      body: JSON, with `tokens`.
      tokenizer, model, adapters: as for `tokenize`.
      vocab_size: ids are less than this.

    Raises:
      Refusal: if anything in it is wrong.
    """
    given = fields.in_object(body)
    fields.read(given, model, {}, {}, ('tokens',), adapters)
    ids = given.get('tokens')
    if not isinstance(ids, list) or not all(map(is_whole, ids)):
        raise wrong('tokens', 'must be a list of token ids')
    ids = [int(i) for i in ids]
    check_ids('tokens', ids, vocab_size)
    return {'prompt': adapted(tokenizer, must_decode=True).decode(ids)}


def info(tokenizer: Any) -> dict[str, Any]:
    """The texts of a tokenizer's special tokens, and its chat template; null for none."""
    checked = adapted(tokenizer, must_decode=True)
    own = checked.tokenizer
    named = dict(getattr(own, 'tokens', None) or {})
    template = getattr(getattr(own, 'chat', None), 'source', None)
    return {
        'tokenizer_class': type(own).__name__,
        'eos_token': named.get('eos_token', _as_text(checked, checked.eos_id)),
        'bos_token': named.get('bos_token', _as_text(checked, getattr(own, 'bos_id', None))),
        'pad_token': named.get('pad_token', _as_text(checked, getattr(own, 'pad_id', None))),
        'chat_template': template if isinstance(template, str) else None,
    }


def _as_text(tokenizer: Any, i: int | None) -> str | None:
    """The text that is encoded as just this token."""
    if i is None:
        return None
    text: str = tokenizer.decode([i])
    try:
        return text if text and tokenizer.encode(text).tolist() == [i] else None
    except (ValueError, TypeError, LookupError):
        return None


def _without_borders(ids: list[int], borders: list[int]) -> list[int]:
    """Ids without those that every text begins and ends with, which an empty text has alone."""
    start = 0
    while start < min(len(ids), len(borders)) and ids[start] == borders[start]:
        start += 1
    end = len(borders) - start
    return ids[start : len(ids) - end] if ids[len(ids) - end :] == borders[start:] else ids[start:]


_TOKENIZE = {
    'add_special_tokens': flag('add_special_tokens'),
    'return_token_strs': flag('return_token_strs'),
}
