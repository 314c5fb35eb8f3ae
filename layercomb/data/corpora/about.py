"""Questions and answers about this library, as conversations: the default data of fine-tuning."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any, TypedDict

FILE = 'about_layercomb.jsonl'


class Fact(TypedDict):
    """A line of the file.

    Attributes:
      name: what the fact is about, such as 'tl.Chunk' or 'cli:chat'.
      key: the words that a right answer has.
      answer: a sentence, which has them.
      questions: four that ask for it, of which none has the key.
    """

    name: str
    key: str
    answer: str
    questions: list[str]


def about_layercomb(split: str | None = None) -> Sequence[dict[str, Any]]:
    """Returns questions about this library and their answers, in the form that `data.chat` takes.

    There are over a hundred facts, each with four questions in other words. A model that answers
    one that it was not trained on has learned the fact and not the wording.

    Args:
      split: 'train' for three of the questions about each fact, 'valid' for the other one, which is
        the first, second, third or fourth in turn; None for all four.

    Returns:
      Rows ``{'messages': [user, assistant], 'key': the words that a right answer has}``.

    Raises:
      ValueError: if there is no such split.

    >>> row = about_layercomb('valid')[0]
    >>> [message['role'] for message in row['messages']], row['key']
    (['user', 'assistant'], 'tl.Chunk')
    """
    if split not in ('train', 'valid', None):
        raise ValueError(f"split={split!r}: choose 'train' or 'valid', or None for both")
    return [
        {
            'messages': [
                {'role': 'user', 'content': question},
                {'role': 'assistant', 'content': fact['answer']},
            ],
            'key': fact['key'],
        }
        for i, fact in enumerate(facts())
        for j, question in enumerate(fact['questions'])
        if split is None or (j == i % len(fact['questions'])) == (split == 'valid')
    ]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the file."""
    text = importlib.resources.files(__package__).joinpath(FILE).read_text('utf-8')
    return tuple(json.loads(line) for line in text.splitlines())
