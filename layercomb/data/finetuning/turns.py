"""Conversations as rows hold them, in one form: messages with a role and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercomb.data.finetuning.rows import Row
from layercomb.errors import UsageError

Messages = list[dict[str, str]]

LISTS = ('messages', 'conversations', 'conversation')
COLUMNS = (*LISTS, 'tools')  # what `conversation` reads
_ROLES = {
    'system': 'system', 'user': 'user', 'assistant': 'assistant',
    'human': 'user', 'gpt': 'assistant',  # as ShareGPT names them
}  # fmt: skip
_TOOLS = 'calls of tools cannot be learnt yet: remove the row, or its "tools" and their messages'


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer.

    Attributes:
      messages: dicts of 'role' ('system', 'user' or 'assistant') and 'content'.
      answers: the numbers of those messages that are to be learnt.
    """

    messages: Messages
    answers: tuple[int, ...]


def conversation(row: Row, where: str) -> Conversation:
    """The conversation in a row.

    A row has ``messages`` of 'role' and 'content', or ``conversations`` of 'from' and 'value'; the
    roles are system, user and assistant, or human and gpt. A content is a text, or a list of parts
    ``{'type': 'text', 'text': …}``. An assistant's message with ``'weight': 0`` is not learnt.

    Args:
      row: a dict.
      where: what messages call it.

    Raises:
      UsageError: for any other form; if there is no answer, if one is empty, or tools are called.

    >>> turns = [{'from': 'human', 'value': '1 + 1?'}, {'from': 'gpt', 'value': '2'}]
    >>> made = conversation({'conversations': turns}, 'source[0]')
    >>> made.messages[1], made.answers
    ({'role': 'assistant', 'content': '2'}, (1,))
    """
    if row.get('tools'):
        raise UsageError(f'{where} offers tools, and {_TOOLS}')
    name, turns = _turns(row, where)
    messages, answers = [], []
    for i, turn in enumerate(turns):
        here = f'{where}: message {i + 1} of {name!r}'
        message = _message(turn, here)
        messages.append(message)
        if message['role'] == 'assistant' and _is_weighted(turn, here):
            answers.append(i)
    _check_order(messages, f'{where}: {name!r}')
    if not answers:
        raise UsageError(f'{where}: no answer in {name!r} has a weight: remove the row')
    return Conversation(messages, tuple(answers))


def _turns(row: Row, where: str) -> tuple[str, Sequence[Any]]:
    """The column of a conversation, and what is in it."""
    name = next((name for name in LISTS if row.get(name) is not None), None)
    if name is None:
        raise UsageError(
            f"{where} has no 'messages' and no 'conversations', but {named(row)}: give "
            '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}, or take '
            'data.instructions for questions and answers'
        )
    turns = row[name]
    if isinstance(turns, Mapping):  # a list of structs, as a table of lists
        columns = list(turns.values())
        if columns and all(isinstance(x, list) and len(x) == len(columns[0]) for x in columns):
            turns = [dict(zip(turns, each, strict=True)) for each in zip(*columns, strict=True)]
    if isinstance(turns, str) or not isinstance(turns, Sequence) or not turns:
        raise UsageError(
            f'{where}: {name!r} is {turns!r:.40}: give a list of messages, such as '
            '[{"role": "user", "content": "Hello"}, …]'
        )
    return name, turns


def _message(turn: Any, here: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise UsageError(f'{here} is {turn!r:.40}: give {{"role": "user", "content": "…"}}')
    if turn.get('tool_calls') or turn.get('function_call'):
        raise UsageError(f'{here} calls a tool, and {_TOOLS}')
    role = _either(turn, 'role', 'from')
    if role in ('tool', 'function', 'ipython', 'observation', 'function_call'):
        raise UsageError(f'{here} has the role {role!r}, and {_TOOLS}')
    if not isinstance(role, str) or role not in _ROLES:
        said = 'has no role' if role is None else f'has the role {role!r:.40}'
        raise UsageError(f'{here} {said}: give "role" as system, user or assistant')
    content = _text(_either(turn, 'content', 'value'), here)
    return {'role': _ROLES[role], 'content': content}


def _either(turn: Mapping[str, Any], name: str, other: str) -> Any:
    """One of two entries; tables fill what is missing with None."""
    return turn.get(other) if turn.get(name) is None else turn[name]


def _text(content: Any, here: str) -> str:
    """The text of a content, of which the parts may be listed."""
    if isinstance(content, str):
        return content
    if content is None:
        raise UsageError(f'{here} has no content: give a text, or remove the row')
    if not isinstance(content, Sequence):
        raise UsageError(f'{here} has the content {content!r:.40}: give a text')
    made = []
    for part in content:
        kind = part.get('type') or 'text' if isinstance(part, Mapping) else part
        text = part.get('text') if isinstance(part, Mapping) else None
        if kind != 'text' or not isinstance(text, str):
            raise UsageError(f'{here} has a part {kind!r:.40} that is no text: remove the row')
        made.append(text)
    return ''.join(made)


def _is_weighted(turn: Mapping[str, Any], here: str) -> bool:
    weight = turn.get('weight')
    if weight not in (None, 0, 1):
        raise UsageError(f'{here} has the weight {weight!r:.40}: give 0 or 1')
    return weight != 0


def _check_order(messages: Messages, where: str) -> None:
    for i, message in enumerate(messages):
        if message['role'] == 'assistant' and not message['content'].strip():
            raise UsageError(
                f'{where} has an empty answer, message {i + 1}: write one, or remove the row'
            )
    first = next((m['role'] for m in messages if m['role'] != 'system'), 'system')
    if first == 'assistant':
        raise UsageError(
            f'{where} begins with an answer to nothing: remove it, or put what was asked before it'
        )
    if messages[-1]['role'] != 'assistant':
        raise UsageError(
            f"{where} ends with the role {messages[-1]['role']!r}: add the assistant's answer, or "
            'remove the row'
        )


def named(row: Row) -> str:
    """The columns of a row that hold something, for messages."""
    found = ', '.join(repr(name) for name, value in row.items() if value is not None)
    return f'{found:.100}' or 'nothing'
