"""Any tokenizer as the library uses it: checked once when it is given, and its ids at each text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from layercomb.checks import Bound, check_value
from layercomb.data.pieces import PieceDecoder, as_list
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer, as_document

VocabSize = Annotated[int, Bound(1, high=2**31 - 1)]
_ABSENT: Any = object()
_PROBES = ('a', 'aa', 'A', '0')  # texts for which a tokenizer may know ids, or not


class NoText(TypeError):
    """A tokenizer's `decode` returned something that is no str."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A tokenizer that was checked; see `adapted`, which makes it.

    Its ids are (L,) int32 inside its vocabulary, and it decodes ids one by one.

    Attributes:
      tokenizer: the one that was given, see `Tokenizer`.
      vocab_size: the number of token ids, as it was when it was given.
      eos_id: the token that ends a document.
      decodes: whether `decode` was checked, too.
    """

    tokenizer: Any
    vocab_size: int
    eos_id: int
    decodes: bool = dataclasses.field(default=False, compare=False)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, (L,) int32.

        Raises:
          TypeError: if `text` is no document, or the tokenizer returns something else than ids.
          ValueError: if an id is outside the vocabulary.
        """
        ids = as_ids(self._name, self.tokenizer.encode(self._as_given(text)))
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = ids.max() if ids.min() >= 0 else ids.min()
            raise ValueError(
                f'{self._name} gave the id {bad}, but its vocab_size is {self.vocab_size}: ids '
                f'must be in 0 … {self.vocab_size - 1}'
            )
        return ids.astype(np.int32)

    def decode(self, ids: Any) -> str:
        """The text of ids of any integer type; half of a surrogate pair becomes U+FFFD.

        Raises:
          NoText: if the tokenizer returns no str.
        """
        text = self.tokenizer.decode(as_list(ids))
        if not isinstance(text, str):
            raise NoText(f'{self._name}.decode gave {type(text).__name__}: text is a str')
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        return text

    def incremental_decoder(self) -> Any:
        """A decoder for ids that come one by one: the tokenizer's own, or one made of `decode`."""
        make = getattr(self.tokenizer, 'incremental_decoder', None)
        return PieceDecoder(self.decode) if make is None else make()

    def _as_given(self, text: str | bytes) -> str | bytes:
        text = as_document(text)
        if isinstance(text, str) or isinstance(self.tokenizer, ByteTokenizer):
            return text
        try:
            return text.decode('utf-8')
        except UnicodeDecodeError:
            return text

    @property
    def _name(self) -> str:
        return type(self.tokenizer).__name__


def adapted(tokenizer: Tokenizer, owner: str = '', *, must_decode: bool = False) -> Adapted:
    """A tokenizer as the library uses it, once it has proved to offer what `Tokenizer` names.

    All that takes a tokenizer calls this. One that was checked before is returned as it is.

    Args:
      tokenizer: what was given.
      owner: what messages begin with: the function that it was given to.
      must_decode: whether it must make text of tokens, too.

    Raises:
      TypeError: if it lacks something, or returns something else for a first text.
      ValueError: if `vocab_size` or `eos_id` is out of range.
    """
    if isinstance(tokenizer, Adapted):
        if tokenizer.decodes or not must_decode:
            return tokenizer
        tokenizer = tokenizer.tokenizer
    asked = ('encode', 'eos_id', 'vocab_size') + ('decode',) * must_decode
    found = {each: getattr(tokenizer, each, _ABSENT) for each in asked}  # each is asked for once
    if isinstance(tokenizer, type) or any(value is _ABSENT for value in found.values()):
        raise TypeError(
            f'{owner}{": " if owner else ""}tokenizer must have encode, eos_id and vocab_size'
            f'{", and decode" if must_decode else ""}, got {tokenizer!r:.60}: '
            'give e.g. data.ByteTokenizer()'
        )
    whose = type(tokenizer).__name__
    size = check_value(whose, 'vocab_size', found['vocab_size'], VocabSize)
    eos_id = check_value(whose, 'eos_id', found['eos_id'], Annotated[int, Bound(0, size)])
    made = Adapted(tokenizer, size, eos_id, must_decode)
    probes = _encoded(tokenizer, _PROBES if must_decode else _PROBES[:1])
    if must_decode:
        _check_decoding(made, probes)
    return made


def as_ids(whose: str, made: Any) -> np.ndarray:
    """What the `encode` of a tokenizer returned, as an array (L,) of integers.

    Raises:
      TypeError: if it is something else.
    """
    try:
        ids = np.asarray(made)
    except Exception:  # ragged lists; an array on another device
        ids = np.asarray(None)
    if ids.ndim == 1 and (not ids.size or ids.dtype.kind in 'iu'):
        return ids if ids.size else np.zeros(0, np.int32)
    kind = f'{ids.dtype} of shape {ids.shape}' if ids.dtype != object else repr(made)[:60]
    raise TypeError(
        f'{whose}.encode gave {kind}: token ids are a sequence of integers, e.g. [5, 7]'
    )


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of those texts that the tokenizer knows."""
    made = []
    for text in texts:
        try:
            ids = tokenizer.encode(text)
        except Exception:  # it may be for another alphabet
            continue
        made.append(as_ids(type(tokenizer).__name__, ids).tolist())
    return [ids for ids in made if ids]


def _check_decoding(tokenizer: Adapted, probes: list[list[int]]) -> None:
    """Raises a TypeError unless some of a tokenizer's own ids become text, whole and in pieces.

    A tokenizer that gives the same ids for all probes may know none of their letters, and `decode`
    need not take the id of unknown letters: then nothing is proved, and it is accepted.
    """
    whose = type(tokenizer.tokenizer).__name__
    failures: list[tuple[list[int], Exception]] = []
    for ids in probes:
        try:
            tokenizer.decode(ids)
            text = tokenizer.incremental_decoder().decode(ids, final=True)
            if not isinstance(text, str):
                raise NoText(f'the incremental_decoder of {whose} gave {text!r:.60}: text is a str')
            return
        except NoText:
            raise
        except Exception as e:
            failures.append((ids, e))
    if len({frozenset(ids) for ids in probes}) > 1:
        ids, cause = failures[0]
        raise TypeError(
            f'{whose} gave the ids {ids} and does not decode that list ({type(cause).__name__}: '
            f'{cause}): see data.Tokenizer for what decode and incremental_decoder are given'
        ) from cause
