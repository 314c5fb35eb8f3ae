"""Folders of text, as documents of which all is learnt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from layercomb.checks import checked
from layercomb.data.adapted import adapted
from layercomb.data.finetuning.answers import Texts
from layercomb.data.finetuning.documents import Document, MaxLen, Measured, Part, in_range
from layercomb.data.sources import TextFiles, text_files
from layercomb.data.tokenizers import Tokenizer
from layercomb.errors import UsageError

_PART = 1 << 20  # letters that are encoded at a time


@dataclass(frozen=True, eq=False)
class TextDocuments(Sequence[Document]):
    """Text files as documents (ids, weights), whole or in pieces.

    Whole files are read when they are asked for. Pieces are made of the tokens of all files, which
    are kept, in the smallest integers that hold the vocabulary.

    Attributes:
      files: the files.
      texts: of the tokenizer.
      max_len: the most tokens of a piece; None for whole files.
    """

    files: TextFiles
    texts: Texts
    max_len: int | None = None

    def __len__(self) -> int:
        return len(self.files) if self.max_len is None else int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Part(self, range(len(self))[index])
        return self.measured(in_range(index, len(self))).document

    def measured(self, index: int) -> Measured:
        """A document, of which nothing is cut off."""
        file, start = self._place(index)
        ids = self._encoded(file) if self.max_len is None else self._kept[file]
        end = None if self.max_len is None else start + self.max_len
        ids = ids[start:end].astype(np.int32)
        weights = np.ones(ids.size, np.float32)
        weights[:1] = 0
        return Measured((ids, weights))

    def check(self, index: int) -> None:
        """Does nothing: text has any form."""

    def where(self, index: int) -> str:
        """What messages call a document: the path of its file."""
        return self.files.paths[self._place(index)[0]]

    @property
    def said(self) -> str:
        """What documents are, for reports."""
        if self.max_len is None:
            return 'files of text, all of which is learnt'
        return f'pieces of {len(self.files):,} files of text, all of which is learnt'

    def __reduce__(self) -> Any:  # without the tokens
        return TextDocuments, (self.files, self.texts, self.max_len)

    def _place(self, index: int) -> tuple[int, int]:
        """The file of a document, and the token where it starts there."""
        if self.max_len is None:
            return index, 0
        file = int(np.searchsorted(self._ends, index, side='right'))
        before = int(self._ends[file - 1]) if file else 0
        return file, (index - before) * (self.max_len - 1)

    @cached_property
    def _ends(self) -> np.ndarray:
        """How many pieces the files up to each of them have, (n_files,)."""
        assert self.max_len is not None
        # A piece starts at the last token of the one before it, from which its first is predicted.
        return np.cumsum([-(-max(x.size - 1, 0) // (self.max_len - 1)) for x in self._kept])

    @cached_property
    def _kept(self) -> list[np.ndarray]:
        dtype = np.min_scalar_type(self.texts.tokenizer.vocab_size - 1)
        return [self._encoded(i).astype(dtype) for i in range(len(self.files))]

    def _encoded(self, file: int) -> np.ndarray:
        """The tokens of a file, with those that start and end it; none of an empty file."""
        text = _decoded(self.files[file], self.files.paths[file])
        if not text:
            return np.zeros(0, np.int32)
        parts = [self.texts.inside(part) for part in _parts(text)]
        return np.concatenate([self.texts.start, *parts, self.texts.eos])


@checked
def text_folder(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    max_len: MaxLen = None,
) -> TextDocuments:
    r"""Returns text files as documents, of which every token is learnt.

    A document is a file's tokens and `eos_id`, after the tokenizer's `bos_id` if it begins texts
    with one.

    Args:
      path: a directory, for all text files in it (UTF-8 without NUL), except hidden ones; or a file
        or a glob pattern.
      tokenizer: of the model.
      max_len: the most tokens of a document. A longer file becomes several, of which each starts at
        the last token of the one before: nothing is lost, and each token is predicted once. One
        more than the `length` of `packed_documents` fills its rows. The tokens of all files are
        then kept in memory, in 2 bytes each for a vocabulary below 65,536.

    Returns:
      A sequence of (ids, weights), (n,) int32 and float32, as of `chat`.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `max_len` is below 2.
      UsageError: if there is no text to read; when a document is made, if its file is not UTF-8.

    >>> import pathlib, tempfile
    >>> from layercomb.data.tokenizers import ByteTokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, 'a.txt').write_text('abcd')
    ...     documents = text_folder(folder, ByteTokenizer(), max_len=3)
    ...     [bytes(ids.tolist()) for ids, weights in documents]
    [b'abc', b'cd\x00']
    """
    texts = Texts(adapted(tokenizer, 'text_folder'))
    return TextDocuments(text_files(os.fspath(path)), texts, max_len)


def _decoded(content: bytes, path: str) -> str:
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise UsageError(
            f'{path} is no text in UTF-8 (byte {e.start}): convert it, or give a pattern that '
            'leaves it out'
        ) from None


def _parts(text: str) -> Iterator[str]:
    """A text in parts of about a million letters, so that encoding takes little memory.

    They are cut where a line begins with a letter, which vocabularies hardly ever reach over.
    """
    at = 0
    while len(text) - at > _PART:
        cut = at + _PART
        line = text.rfind('\n', at, cut)
        while line > at and (text[line + 1].isspace() or text[line - 1].isspace()):
            line = text.rfind('\n', at, line)
        cut = cut if line <= at else line + 1
        yield text[at:cut]
        at = cut
    yield text[at:]
