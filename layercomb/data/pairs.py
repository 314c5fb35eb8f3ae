"""Pairs of texts, as examples for models from sequence to sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from layercomb.data import checks
from layercomb.data.packing import Arrays, encode_checked
from layercomb.data.sources import Mapped
from layercomb.data.tasks import sequence_pair
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer, as_document


def pairs(
    source: Sequence[Any],
    source_length: int,
    target_length: int,
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    masked: bool = True,
) -> Sequence[Arrays]:
    """Returns pairs of texts as examples for encoder-decoders such as `models.Reformer`.

    The decoder's inputs are `eos, tokens` of the second text, its targets `tokens, eos`. What is
    longer than its length is cut, what is shorter is padded with zeros of weight 0. Each example
    is made when it is asked for. `batches` takes them.

    Args:
      source: a sequence of pairs of documents, str or bytes: what is read and what is to be said.
      source_length: M, of the first text.
      target_length: L, of the second.
      tokenizer: what encodes both.
      masked: whether to give a mask of the source: True at what is no padding; the first position
        counts as such in an empty text, too, so that there is something to attend to.

    Returns:
      A sequence of (source, inputs, mask, targets, loss_weights), without the mask if not `masked`:
      (M,) int32, (L,) int32, (M,) bool, (L,) int32 and (L,) float32.

    Raises:
      TypeError: if an argument has the wrong type; for an element that is no pair.
      ValueError: if a length is below 1 or the source empty.

    >>> [x.tolist() for x in pairs([('ab', 'c')], 3, 3)[0]]
    [[97, 98, 0], [0, 99, 0], [True, True, False], [99, 0, 0], [1.0, 1.0, 0.0]]
    """
    make = partial(
        _example,
        source_length=checks.integer('source_length', source_length, 1),
        target_length=checks.integer('target_length', target_length, 1),
        tokenizer=checks.tokenizer(tokenizer),
        masked=checks.flag('masked', masked),
    )
    return Mapped(checks.source(source), make)


def continuations(source: Sequence[str | bytes], n_bytes: int) -> Sequence[tuple[bytes, bytes]]:
    """Returns the beginning of each document and what follows: pairs from any text.

    Args:
      source: a sequence of documents.
      n_bytes: how long a beginning is, in bytes, of UTF-8 for a str; of a document no longer than
        twice that, the first half.

    Returns:
      A sequence of (beginning, rest), made when they are asked for.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `n_bytes` is below 1 or the source empty.

    >>> list(continuations(['abcdef', 'xy'], 2))
    [(b'ab', b'cdef'), (b'x', b'y')]
    """
    n_bytes = checks.integer('n_bytes', n_bytes, 1)
    return Mapped(checks.source(source), partial(_cut, n_bytes=n_bytes))


def _cut(document: str | bytes, n_bytes: int) -> tuple[bytes, bytes]:
    text = as_document(document)
    text = text.encode() if isinstance(text, str) else text
    at = min(n_bytes, len(text) // 2)
    return text[:at], text[at:]


def _example(
    pair: Any, source_length: int, target_length: int, tokenizer: Tokenizer, masked: bool
) -> Arrays:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f'pairs takes pairs of documents, and the source holds {pair!r:.60}: '
            'use data.packed or data.bucketed for documents'
        )
    read, said = (encode_checked(document, tokenizer) for document in pair)
    made = sequence_pair(read, said, tokenizer.eos_id, source_length, target_length)
    return made if masked else made[:2] + made[3:]
