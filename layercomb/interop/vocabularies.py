"""Vocabularies of pretrained models: those of the library tokenizers, and of sentencepiece."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from layercomb.data.pieces import PieceDecoder, as_list
from layercomb.errors import UsageError, one_line, require

_CURE = 'take the file that came with the model'


class Vocabulary(Protocol):
    """Texts to ids and back; two are equal if their files are.

    Attributes:
      size: all ids are less than this.
    """

    @property
    def size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str, *, whole: bool) -> list[int]:
        """The ids of a text; if `whole`, with those that start and end one."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if there is none."""

    def token_bytes(self, i: int) -> bytes | None:
        """The bytes that a token adds to a text; None if only `decode` knows."""

    def incremental_decoder(self) -> Any:
        """A decoder for ids that come one by one."""


@dataclasses.dataclass(frozen=True)
class Subwords:
    """A vocabulary of the library tokenizers.

    Truncation and padding, which a tokenizer.json may ask for, are left out: data is packed here.

    Attributes:
      source: the content of a tokenizer.json.

    Raises:
      UsageError: if tokenizers is not installed, or cannot read it.
    """

    source: str = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        _ = self.backend

    @functools.cached_property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        tokenizers = require('tokenizers', 'pretrained')
        return _ready(_guarded(lambda: tokenizers.Tokenizer.from_str(self.source)))

    @classmethod
    def of(cls, backend: Any) -> Subwords:
        """The vocabulary of a `tokenizers.Tokenizer`, which is changed: it pads no more.

        Args:
          backend: not to be used by others afterwards.
        """
        made = object.__new__(cls)
        object.__setattr__(made, 'source', _ready(backend).to_str())
        made.__dict__['backend'] = backend
        return made

    @functools.cached_property
    def size(self) -> int:
        return max(self.backend.get_vocab(True).values(), default=-1) + 1

    def encode(self, text: str, *, whole: bool) -> list[int]:
        ids: list[int] = _guarded(
            lambda: self.backend.encode(_valid(text), add_special_tokens=whole).ids
        )
        return ids

    def decode(self, ids: list[int]) -> str:
        _check_ids(ids)
        text: str = _guarded(lambda: self.backend.decode(ids, skip_special_tokens=True))
        return text

    def id_of(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def token_bytes(self, i: int) -> bytes | None:
        if type(self.backend.decoder).__name__ == 'ByteLevel':
            return self._bytes_of(i)
        return _byte_of_piece(self.backend.id_to_token(i) or '')

    def incremental_decoder(self) -> Any:
        if type(self.backend.decoder).__name__ == 'ByteLevel':
            return _ByteLevelDecoder(self._bytes_of)
        return PieceDecoder(self.decode)

    def __getstate__(self) -> dict[str, Any]:
        return {'source': self.source}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        object.__setattr__(self, 'source', state['source'])

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def _bytes_of(self, i: int) -> bytes:
        """The bytes of a token whose letters stand for bytes; none of a special token."""
        token = None if i in self._special else self.backend.id_to_token(i)
        if token is None:
            return b''
        table = byte_letters()
        if all(letter in table for letter in token):
            return bytes(table[letter] for letter in token)
        return token.encode()  # an added token is written as it is


class _ByteLevelDecoder:
    """Text of tokens that are bytes, as they come; an unfinished character is held back."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def decode(self, ids: int | Iterable[int] | np.ndarray, final: bool = False) -> str:
        """The characters that `ids` complete; if `final`, an unfinished one is U+FFFD."""
        given = as_list(ids)
        _check_ids(given)
        return self._decoder.decode(b''.join(map(self._bytes_of, given)), final)


@dataclasses.dataclass(frozen=True)
class SentencePieces:
    """A vocabulary of sentencepiece.

    Attributes:
      model: the content of the file.
      target: the content of the file for decoding, if it is another, as Marian's is.
      ids: the id of each piece, if it is not its number in the file, as pairs.
      added: tokens that the file does not have, or that are found in texts as a whole, as pairs.
      special: ids that have no text.
      prefix: ids that start a text.
      suffix: ids that end it.

    Raises:
      UsageError: if sentencepiece is not installed, or cannot read a file.
    """

    model: bytes = dataclasses.field(repr=False)
    target: bytes | None = dataclasses.field(default=None, repr=False)
    ids: tuple[tuple[str, int], ...] | None = dataclasses.field(default=None, repr=False)
    added: tuple[tuple[str, int], ...] = dataclasses.field(default=(), repr=False)
    special: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _ = self._source, self._target

    @functools.cached_property
    def _source(self) -> Any:
        return _processor(self.model)

    @functools.cached_property
    def _target(self) -> Any:
        return self._source if self.target is None else _processor(self.target)

    @functools.cached_property
    def _ids(self) -> dict[str, int] | None:
        return None if self.ids is None else dict(self.ids)

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        return dict(self.added)

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {i: piece for piece, i in self.ids or ()}

    @functools.cached_property
    def _own(self) -> dict[int, str]:
        """The text of added tokens that have one."""
        return {i: token for token, i in self.added if i not in self.special}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')

    @functools.cached_property
    def size(self) -> int:
        own = range(self._source.get_piece_size()) if self._ids is None else self._ids.values()
        return max((*own, *self._added.values()), default=-1) + 1

    def encode(self, text: str, *, whole: bool) -> list[int]:
        made = list(self.prefix) if whole else []
        for part in self._pattern.split(_valid(text)) if self._added else [_valid(text)]:
            if part in self._added:
                made.append(self._added[part])
            elif part:
                made += self._encoded(part)
        return made + list(self.suffix) if whole else made

    def _encoded(self, text: str) -> list[int]:
        if self._ids is None:
            return list(self._source.encode(text))
        unknown = self._ids.get('<unk>', 0)
        return [self._ids.get(piece, unknown) for piece in self._source.encode(text, out_type=str)]

    def decode(self, ids: list[int]) -> str:
        _check_ids(ids)
        made, run = '', []
        for i in (*ids, None):
            if i in self.special:
                continue
            if i is not None and i not in self._own:
                run.append(i)
                continue
            made, run = made + self._decoded(run), []
            made += '' if i is None else self._own[i]
        return made

    def _decoded(self, ids: list[int]) -> str:
        if self._ids is None:
            known = self._target.get_piece_size()
            return str(self._target.decode([i for i in ids if i < known]))
        return str(self._target.decode([self._pieces[i] for i in ids if i in self._pieces]))

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        if self._ids is not None:
            return self._ids.get(token)
        i = int(self._source.piece_to_id(token))
        return i if self._source.id_to_piece(i) == token else None

    def token_bytes(self, i: int) -> bytes | None:
        known = self._ids is None and i < self._target.get_piece_size()
        return _byte_of_piece(self._target.id_to_piece(i)) if known else None

    def incremental_decoder(self) -> Any:
        return PieceDecoder(self.decode)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def _processor(model: bytes) -> Any:
    sentencepiece = require('sentencepiece', 'pretrained')
    made = sentencepiece.SentencePieceProcessor()
    try:
        made.LoadFromSerializedProto(model)
    except Exception as e:
        raise UsageError(
            f'the sentencepiece model cannot be read ({one_line(e)}): {_CURE}'
        ) from None
    if not made.get_piece_size():
        raise UsageError(f'the sentencepiece model is empty: {_CURE}')
    return made


def _byte_of_piece(piece: str) -> bytes | None:
    """The byte of a piece such as ``<0xE2>``: characters that are no pieces are made of them."""
    found = re.fullmatch('<0x([0-9A-F]{2})>', piece)
    return None if found is None else bytes.fromhex(found[1])


def _ready(backend: Any) -> Any:
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_ids(ids: list[int]) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < 2**31:
        raise ValueError(f'token ids are in 0 … vocab_size − 1, got {min(ids)} … {max(ids)}')


def _valid(text: str) -> str:
    """A text without halves of surrogate pairs, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
    return text


def _guarded(run: Callable[[], Any]) -> Any:
    """What `run` gives; the library's errors, and panics of its Rust, become a UsageError."""
    try:
        return run()
    except BaseException as e:  # a panic is no Exception
        if isinstance(e, Exception) or type(e).__name__ == 'PanicException':
            said = one_line(e)
            raise UsageError(f'tokenizer.json cannot be used ({said:.150}): {_CURE}') from None
        raise


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: letter -> byte.

    Printable bytes of Latin-1 stand for themselves, the others are numbered from U+0100 on.
    References: Radford et al., GPT-2, 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    return letters | {chr(256 + i): b for i, b in enumerate(others)}
