"""`ChatTemplate`: the text that a model was trained to see for a conversation.

Templates come with models, so they are programs of strangers: they run in jinja2's sandbox, on a
budget (see `interop.sandbox`), with the names that transformers gives them.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from layercomb.errors import UsageError, one_line, require
from layercomb.interop.budget import Refused

_LONGEST = 1 << 20  # characters of a template
_CURE = 'take the template from the makers of the model, or remove it'

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template in the dialect of jinja2 that transformers reads.

    Attributes:
      source: the template.
      tokens: names and texts of special tokens, such as ``{'bos_token': '<s>'}``, which the
        template may use; kept as sorted pairs.

    Raises:
      UsageError: if the template is too long, or cannot be read.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\\n"
    ...                         "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}")
    >>> template.render([{'role': 'user', 'content': 'Hello'}])
    '<user>Hello\\n<bot>'
    """

    source: str
    tokens: Any = ()

    def __post_init__(self) -> None:
        pairs = self.tokens.items() if isinstance(self.tokens, Mapping) else self.tokens
        object.__setattr__(self, 'tokens', tuple(sorted((str(k), str(v)) for k, v in pairs)))
        if not isinstance(self.source, str) or len(self.source) > _LONGEST:
            raise UsageError(
                f'the chat template is no text of at most {_LONGEST:,} letters: {_CURE}'
            )
        _compiled(self.source)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as one text.

        Args:
          messages: each with 'role' and 'content', both str; other entries are handed on.
          add_generation_prompt: whether the text ends where the assistant begins to answer.
          **variables: other names that the template knows, such as ``enable_thinking=False``.

        Raises:
          UsageError: for messages of another form; if the template refuses them, fails, or needs
            too much time or memory.
        """
        names: dict[str, Any] = {'tools': None, 'documents': None, **dict(self.tokens)}
        names |= variables
        names['messages'] = checked_messages(messages)
        names['add_generation_prompt'] = add_generation_prompt
        return _guarded('', functools.partial(_sandbox().render, _compiled(self.source), names))


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain dicts.

    Args:
      messages: a sequence of mappings with 'role' and 'content', both str.

    Raises:
      UsageError: if there are none, or one has another form, saying which.
    """
    example = 'give e.g. [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f'messages must be a list, got {type(messages).__name__}: {example}')
    if not messages:
        raise UsageError(f'there are no messages: {example}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f'message {i} is {message!r:.40} and no object: {example}')
        role, content = message.get('role'), message.get('content')
        if not isinstance(role, str) or not role:
            raise UsageError(f"message {i} has the role {role!r:.40}: give 'user' or the like")
        calls = content is None and message.get('tool_calls')
        if not isinstance(content, str) and not calls:
            raise UsageError(f'the content of message {i} is {content!r:.40}: give a text')
    return [dict(message) for message in messages]


def template_in(given: Any) -> str | None:
    """The template in the entry ``chat_template`` of a tokenizer_config.json.

    Args:
      given: a template; a list of ``{'name': …, 'template': …}``, of which 'default' is taken; or
        None.

    Raises:
      UsageError: for another form, or a list without a default.
    """
    if given is None or isinstance(given, str):
        return given
    entries = given if isinstance(given, list) else []
    named = {
        each.get('name'): each.get('template') for each in entries if isinstance(each, Mapping)
    }
    found = named.get('default', next(iter(named.values())) if len(named) == 1 else None)
    if not isinstance(found, str):
        names = ', '.join(str(name) for name in named) or 'none'
        raise UsageError(
            f'tokenizer_config.json: among the chat templates ({names:.80}) none is named '
            f"'default': {_CURE}"
        )
    return found


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    sandbox = _sandbox()
    return _guarded('cannot be read: ', lambda: sandbox.compiled(source, strftime_now=_now))


def _sandbox() -> Any:
    """The module, which needs jinja2."""
    require('jinja2', 'pretrained')
    from layercomb.interop import sandbox

    return sandbox


def _guarded(what: str, run: Any) -> Any:
    """What `run` gives; whatever a template raises becomes a UsageError of one line."""
    try:
        return run()
    except Refused as e:
        raise UsageError(f'the chat template refuses these messages: {one_line(e)}') from None
    except UsageError:
        raise
    except (RecursionError, MemoryError) as e:
        raise UsageError(
            f'the chat template needs too much ({type(e).__name__}): {_CURE}'
        ) from None
    except Exception as e:
        said = f'{what}{one_line(e)}'
        raise UsageError(f'the chat template fails ({said:.200}): {_CURE}') from None
