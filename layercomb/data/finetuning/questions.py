"""Rows of an instruction and its answer, and the columns in which they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layercomb.data.finetuning import turns
from layercomb.data.finetuning.rows import Row
from layercomb.errors import UsageError


class Asked(NamedTuple):
    """What is asked and what is answered, of which the second is to be learnt.

    Attributes:
      prompt: what is asked; '' in a row of plain text.
      answer: what is to be learnt.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Form:
    """The columns of rows.

    Attributes:
      prompt: the column of what is asked; None for rows of plain text.
      answer: the column of what is answered.
      more: columns of which the first that holds a text follows what is asked.
      between: what stands between a prompt and its answer where there is no chat template.
    """

    prompt: str | None
    answer: str
    more: Sequence[str] = ()
    between: str = '\n\n'

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return (self.answer,) if self.prompt is None else (self.prompt, self.answer)

    def __str__(self) -> str:
        if self.prompt is None:
            return self.answer
        more = f' (and {" or ".join(self.more)})' if self.more else ''
        return f'{self.prompt}{more} → {self.answer}'

    def asked(self, row: Row, where: str) -> Asked:
        """What a row asks and answers.

        Args:
          row: a dict.
          where: what messages call it.

        Raises:
          UsageError: if a column is missing, or is no text, or the answer is empty.
        """
        answer = self._text(row, self.answer, where)
        if not answer.strip():
            raise UsageError(f'{where}: {self.answer!r} is empty: write it, or remove the row')
        if self.prompt is None:
            return Asked('', answer)
        more = next((name for name in self.more if row.get(name)), None)
        names = (self.prompt,) if more is None else (self.prompt, more)
        parts = [self._text(row, name, where) for name in names]
        prompt = '\n\n'.join(part for part in parts if part)
        if not prompt.strip():
            raise UsageError(f'{where}: {self.prompt!r} is empty: write it, or remove the row')
        return Asked(prompt, answer)

    def _text(self, row: Row, name: str, where: str) -> str:
        value = row.get(name)
        if isinstance(value, str):
            return value
        if value is None:
            raise UsageError(
                f'{where} has no {name!r}, but {turns.named(row)}: all rows have the columns of '
                f'the first one, {self}'
            )
        raise UsageError(
            f'{where}: {name!r} is {value!r:.40}: give a text; data.chat takes lists of messages'
        )


_MORE = ('input', 'context')
FORMS = (
    *(Form('instruction', answer, _MORE) for answer in ('output', 'response', 'completion')),
    *(Form('prompt', answer, between='') for answer in ('completion', 'response')),
    *(Form('question', answer, ('context',)) for answer in ('answer', 'response')),
    Form('input', 'output'),
    Form(None, 'text'),
)
COLUMNS = tuple(dict.fromkeys(c for form in FORMS for c in (*form.columns, *form.more)))


def form_of(row: Row, where: str) -> Form:
    """The form of rows, from the first of them.

    Args:
      row: the first one.
      where: what messages call it.

    Raises:
      UsageError: if it has no known columns, listing those it has.

    >>> print(form_of({'instruction': 'Add.', 'input': '1, 1', 'output': '2', 'text': '…'}, ''))
    instruction (and input or context) → output
    """
    for form in FORMS:
        if all(row.get(name) is not None for name in form.columns):
            return form
    if any(row.get(name) is not None for name in turns.LISTS):
        raise UsageError(f'{where} holds a conversation: data.chat takes it')
    raise UsageError(
        f'{where} has the columns {turns.named(row)}: name them instruction, input and output; '
        'prompt and completion; question and answer; or text'
    )
