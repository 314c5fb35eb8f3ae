"""The subword tokenizer of Trax and tensor2tensor: words of subwords, ended by an underscore."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import ClassVar

import numpy as np

from layercomb.data.pieces import as_list
from layercomb.data.tokenizers import as_document
from layercomb.errors import UsageError, machine_errors

LENGTH = 2**26  # of a file; those of Trax have some hundred thousand bytes
_ESCAPES = '\\_u;0123456789'  # what escapes are written with
_ESCAPED = re.compile(r'\\u|\\\\|\\([0-9]+);')


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer:
    """Text as subwords: a `Tokenizer`, whose ids are those of a vocabulary of Trax.

    Text is cut where letters or digits meet other characters; one blank between two words is left
    out. Each word is escaped, ended by ``_``, and cut into the longest subwords from its beginning.

    Attributes:
      subwords: by id. Id 0 is padding and what decoding begins with, and 1 ends a text.
    """

    subwords: tuple[str, ...]

    bos_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    pad_id: ClassVar[int] = 0

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return len(self.subwords)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, (L,) int32, without an end.

        Args:
          text: a str, or bytes of UTF-8, of which those that are none are left out.

        Raises:
          ValueError: if the vocabulary lacks a letter that escapes are made of.
        """
        text = as_document(text)
        if isinstance(text, bytes):
            text = text.decode('utf-8', 'ignore')
        ids = [i for word in _words(text) for i in self._of_word(word)]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of some ids; those outside of the vocabulary are left out.

        Args:
          ids: (L,) integers.
        """
        return self.incremental_decoder().decode(ids, final=True)

    def incremental_decoder(self) -> WordDecoder:
        """A decoder for tokens that come one by one."""
        return WordDecoder(self.subwords)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {subword: i for i, subword in enumerate(self.subwords) if subword}

    @functools.cached_property
    def _letters(self) -> frozenset[str]:
        return frozenset(''.join(self.subwords)) | frozenset(_ESCAPES)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.subwords))

    def _of_word(self, word: str) -> list[int]:
        """The ids of a word. Letters that occur in longer subwords alone are escaped if need be."""
        alone = self._letters & self._ids.keys()
        for letters in (self._letters, alone):
            ids = self._longest_first(_escaped(word, letters))
            if ids is not None:
                return ids
        missing = ''.join(sorted(set(_ESCAPES) - alone))
        raise ValueError(
            f'the vocabulary has no subwords for {missing!r}, which those of Trax have: check it'
        )

    def _longest_first(self, word: str) -> list[int] | None:
        """The ids of an escaped word; None if it has a letter that no subword is."""
        ids, start = [], 0
        while start < len(word):
            ends = range(min(len(word), start + self._longest), start, -1)
            end = next((end for end in ends if word[start:end] in self._ids), None)
            if end is None:
                return None
            ids.append(self._ids[word[start:end]])
            start = end
        return ids


class WordDecoder:
    """Decodes subwords as they come, and holds back an unfinished word.

    Args:
      subwords: by id.
    """

    def __init__(self, subwords: tuple[str, ...]):
        self._subwords = subwords
        self._left = ''
        self._before = ''

    def decode(self, ids: int | Iterable[int] | np.ndarray, final: bool = False) -> str:
        """The words that `ids` complete.

        Args:
          ids: the next token, or the next tokens; those outside of the vocabulary are left out.
          final: whether no token follows; an unfinished word then counts as a word.
        """
        known = (i for i in as_list(ids) if 0 <= i < len(self._subwords))
        *words, self._left = (self._left + ''.join(self._subwords[i] for i in known)).split('_')
        if final:
            words.append(self._left)
            self._left = ''
        return ''.join(self._spaced(_unescaped(word)) for word in words)

    def _spaced(self, word: str) -> str:
        """The word, after a blank if the word before it was of letters, too."""
        if not word:
            return ''
        blank = ' ' if self._before and _is_letter(self._before) and _is_letter(word[0]) else ''
        self._before = word[0]
        return blank + word


def read_subwords(path: Path) -> SubwordTokenizer:
    """Reads a vocabulary: a subword a line, in quotes or without.

    Args:
      path: of the file.

    Raises:
      UsageError: if it cannot be read, or is no such file.
    """
    with machine_errors('check the path'), path.open('rb') as file:
        data = file.read(LENGTH + 1)
    try:
        lines = io.TextIOWrapper(io.BytesIO(data), 'utf-8').readlines()
    except UnicodeDecodeError:
        lines = []
    if len(lines) < 2 or len(data) > LENGTH:
        raise UsageError(f'{path.name} is no vocabulary of subwords, one a line: check the path')
    subwords = map(str.rstrip, lines)
    return SubwordTokenizer(tuple(s[1:-1] if _is_quoted(s) else s for s in subwords))


def _is_quoted(subword: str) -> bool:
    return len(subword) > 1 and subword[0] == subword[-1] and subword[0] in '\'"'


def _is_letter(character: str) -> bool:
    """Whether it is a letter or a digit of any alphabet."""
    return unicodedata.category(character)[0] in 'LN'


def _words(text: str) -> Iterator[str]:
    """Runs of letters and digits, and runs of others, but single blanks between two words."""
    runs = [''.join(run) for _, run in itertools.groupby(text, _is_letter)]
    for i, run in enumerate(runs):
        if run != ' ' or i in (0, len(runs) - 1):
            yield run


def _escaped(word: str, letters: Set[str]) -> str:
    """A word in the given letters, and in numbers of others, ended by ``_``."""
    word = word.replace('\\', '\\\\').replace('_', '\\u')
    return ''.join(c if c in letters and c != '\n' else f'\\{ord(c)};' for c in word) + '_'


def _unescaped(word: str) -> str:
    def plain(found: re.Match[str]) -> str:
        if found[1] is None:
            return '_' if found[0] == '\\u' else '\\'
        try:
            return chr(int(found[1]))
        except (ValueError, OverflowError):
            return '\u3013'  # as Trax does: the mark of a character that is not there

    return _ESCAPED.sub(plain, word)
