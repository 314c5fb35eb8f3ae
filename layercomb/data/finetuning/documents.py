"""Sequences of documents of tokens: of conversations, and of instructions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np

from layercomb.checks import Bound, checked
from layercomb.data.adapted import adapted
from layercomb.data.finetuning import answers, questions, turns
from layercomb.data.finetuning.answers import Texts, Weighted
from layercomb.data.finetuning.rows import Row, Rows, Source, rows_of
from layercomb.data.tokenizers import Tokenizer
from layercomb.errors import UsageError

Document: TypeAlias = tuple[np.ndarray, np.ndarray]
MaxLen: TypeAlias = Annotated[int, Bound(2)] | None


class Measured(NamedTuple):
    """A document, and what became of it.

    Attributes:
      document: (ids, weights).
      n_cut: how many of its tokens were cut off.
      n_skipped: how many of its answers have no weight, since the template rewrites them.
    """

    document: Document
    n_cut: int = 0
    n_skipped: int = 0


@runtime_checkable
class Measurable(Protocol):
    """Documents that know where they come from, and what became of them."""

    @property
    def said(self) -> str:
        """What they are, for reports."""

    def __len__(self) -> int:
        """How many there are."""

    def measured(self, index: int) -> Measured:
        """A document, and how much of it was cut off."""

    def check(self, index: int) -> None:
        """Raises a UsageError if what a document is made of has a wrong form."""

    def where(self, index: int) -> str:
        """What messages call a document."""


@dataclass(frozen=True, eq=False)
class Part(Sequence[Document]):
    """Some of the documents of a sequence, such as those held out: ``documents[::20]`` is one.

    Attributes:
      documents: all of them.
      numbers: which of them, in their order.
    """

    documents: Measurable
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(self.documents, self.numbers[index])
        return self.measured(in_range(index, len(self))).document

    def measured(self, index: int) -> Measured:
        """See `Measurable`; so with all of these."""
        return self.documents.measured(self.numbers[index])

    def check(self, index: int) -> None:
        self.documents.check(self.numbers[index])

    def where(self, index: int) -> str:
        return self.documents.where(self.numbers[index])

    @property
    def said(self) -> str:
        """What they are, for reports."""
        return self.documents.said


class Reader(Protocol):
    """Makes tokens of rows."""

    def check(self, row: Row, where: str) -> None:
        """Raises a UsageError if a row has another form; no token is made."""

    def read(self, row: Row, where: str) -> Weighted:
        """The tokens of a row, and their weights."""


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """Rows as documents (ids, weights), each made when it is asked for.

    Attributes:
      rows: where they come from.
      reader: what makes tokens of them; ``str(reader)`` says how.
      max_len: the most tokens of one; what follows is cut off.
    """

    rows: Rows
    reader: Reader
    max_len: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Part: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(self, range(len(self))[index])
        return self.measured(in_range(index, len(self))).document

    def measured(self, index: int) -> Measured:
        """A document, and how much of it was cut off."""
        ids, weights, n_skipped = self.reader.read(self.rows[index], self.where(index))
        n_cut = 0 if self.max_len is None else max(ids.size - self.max_len, 0)
        kept = ids.size - n_cut
        return Measured((ids[:kept], weights[:kept]), n_cut, n_skipped)

    def check(self, index: int) -> None:
        """Raises a UsageError if a row has another form than the source should have."""
        self.reader.check(self.rows[index], self.where(index))

    def where(self, index: int) -> str:
        """What messages call a document, such as ``chats.jsonl:17``."""
        return self.rows.where(index)

    @property
    def said(self) -> str:
        """How rows are read, for reports."""
        return str(self.reader)


@checked
def chat(source: Source, tokenizer: Tokenizer, max_len: MaxLen = None) -> Documents:
    """Returns conversations as documents, of which the assistant's answers alone are learnt.

    A row has ``messages`` of 'role' (system, user, assistant) and 'content', or ``conversations``
    of 'from' (system, human, gpt) and 'value'. The tokenizer's chat template writes it. Weighted
    are the tokens that the model would make itself: each answer and the token that ends it. What
    follows the last answer is left out. If the template ends answers with no token at which
    generation stops, `eos_id` is put behind the last one. An answer that the template writes in
    another way when more follows, as some do with thoughts, has no weight; `length_report` says so.
    So has a message with ``'weight': 0``.

    Args:
      source: the path of a file or directory, or a glob pattern: .jsonl, .jsonl.gz, .json, .parquet
        (with the extra `tables`); or a sequence of such rows, as a `datasets.Dataset` is one.
      tokenizer: of the model, with its template, as `interop.load` gives it.
      max_len: the most tokens of a document; what follows is cut off. A document whose answers are
        all cut off has no weighted token, and is left out by `packed_documents`.

    Returns:
      A sequence of (ids, weights), (n,) int32 and float32: weights[i] is the weight of predicting
      ids[i] from the tokens before it. Each is made when it is asked for.

    Raises:
      TypeError: if an argument has the wrong type.
      UsageError: if there is no template, or no rows; when a document is made, if its row has no
        conversation, no roles, or an answer that is missing or empty.

    >>> import tokenizers
    >>> from layercomb.interop.chat_template import ChatTemplate
    >>> from layercomb.interop.tokenizer import PretrainedTokenizer
    >>> words = {'<end>': 0, '<user>': 1, '<bot>': 2, 'two': 3, 'and': 4, 'four': 5}
    >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '<end>'))
    >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    >>> template = ChatTemplate(
    ...     "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
    ...     "{{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}")
    >>> tokenizer = PretrainedTokenizer(backend, eos_id=0, chat=template)
    >>> row = {'messages': [{'role': 'user', 'content': 'two and two'},
    ...                     {'role': 'assistant', 'content': 'four'}]}
    >>> ids, weights = chat([row], tokenizer)[0]
    >>> ids.tolist(), weights.tolist()
    ([1, 3, 4, 3, 0, 2, 5, 0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    """
    texts = Texts(adapted(tokenizer, 'chat'))
    if texts.template is None:
        raise UsageError(
            'chat: this tokenizer has no chat template: take the model that was trained for '
            'conversations, or data.instructions, which needs none'
        )
    return _begun(Documents(rows_of(source, 'chat', turns.COLUMNS), _Chats(texts), max_len))


@checked
def instructions(source: Source, tokenizer: Tokenizer, max_len: MaxLen = None) -> Documents:
    r"""Returns instructions and their answers as documents, of which the answers alone are learnt.

    The columns of the first row say how all are read: `instruction`, `input` if there is one, and
    `output`; `prompt` and `completion`; `question` and `answer`; `response` for any of these; or
    `text`, all of which is learnt. With a chat template, a row is a conversation of a user and an
    assistant, see `chat`. Without one, the prompt, a blank line and the answer follow each other,
    and `eos_id`; a completion follows its prompt as it is. An input follows its instruction after a
    blank line.

    Args:
      source: as of `chat`.
      tokenizer: of the model.
      max_len: as of `chat`.

    Returns:
      A sequence of (ids, weights), as of `chat`.

    Raises:
      TypeError: if an argument has the wrong type.
      UsageError: if there are no rows, or the first has no such columns; when a document is made,
        if a row lacks a column, or its answer is empty.

    >>> from layercomb.data.tokenizers import ByteTokenizer
    >>> documents = instructions([{'question': '1 + 1?', 'answer': '2'}], ByteTokenizer())
    >>> ids, weights = documents[0]
    >>> bytes(ids.tolist()), int(weights.sum())
    (b'1 + 1?\n\n2\x00', 2)
    """
    texts = Texts(adapted(tokenizer, 'instructions'))
    rows = rows_of(source, 'instructions', (*questions.COLUMNS, *turns.LISTS))
    reader = _Instructions(texts, questions.form_of(rows[0], rows.where(0)))
    return _begun(Documents(rows, reader, max_len))


@dataclass(frozen=True)
class _Chats:
    """Makes tokens of conversations."""

    texts: Texts

    def check(self, row: Row, where: str) -> None:
        turns.conversation(row, where)

    def read(self, row: Row, where: str) -> Weighted:
        return answers.of_chat(turns.conversation(row, where), self.texts, where)

    def __str__(self) -> str:
        return 'conversations, of which the answers are learnt'


@dataclass(frozen=True)
class _Instructions:
    """Makes tokens of questions and answers."""

    texts: Texts
    form: questions.Form

    def check(self, row: Row, where: str) -> None:
        self.form.asked(row, where)

    def read(self, row: Row, where: str) -> Weighted:
        prompt, answer = self.form.asked(row, where)
        if not prompt:
            return answers.of_parts('', answer, self.texts)
        if self.texts.template is None:
            return answers.of_parts(prompt + self.form.between, answer, self.texts)
        messages = [
            {'role': 'user', 'content': prompt},
            {'role': 'assistant', 'content': answer},
        ]
        return answers.of_chat(turns.Conversation(messages, (1,)), self.texts, where)

    def __str__(self) -> str:
        if self.form.prompt is None:
            return f'{self.form}, all of which is learnt'
        how = 'a plain text' if self.texts.template is None else 'a conversation'
        return f'{self.form}, as {how}'


def is_document(document: Any) -> bool:
    """Whether something is a pair (ids, weights) of 1-D arrays, integers and floats."""
    if not isinstance(document, tuple) or len(document) != 2:
        return False
    ids, weights = document
    return (
        all(isinstance(x, np.ndarray) and x.ndim == 1 for x in document)
        and ids.size == weights.size
        and (not ids.size or (ids.dtype.kind in 'iu' and weights.dtype.kind == 'f'))
    )


def in_range(index: Any, n: int) -> int:
    """An index of a sequence, counted from its start.

    Raises:
      TypeError: if it is no integer.
      IndexError: if there is no such element.
    """
    i = operator.index(index)
    if not -n <= i < n:
        raise IndexError(f'document {i} of {n}')
    return i % n


def _begun(documents: Documents) -> Documents:
    """Documents whose first row has the right form: most mistakes are in all rows."""
    documents.check(0)
    return documents
