"""Pairs of texts, as examples for encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from layercomb.checks import Size, checked
from layercomb.data import checks
from layercomb.data.adapted import Adapted, adapted
from layercomb.data.checks import Source
from layercomb.data.packing import Arrays
from layercomb.data.sources import Mapped
from layercomb.data.tasks import sequence_pair
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer, as_document


@checked
def pairs(
    source: Source[Any],
    source_length: Size,
    target_length: Size,
    tokenizer: Tokenizer = ByteTokenizer(),
    *,
    masked: bool = True,
) -> Sequence[Arrays]:
    """Returns pairs of texts as examples for encoder-decoders such as `models.Reformer`.

    The encoder reads the first text. The decoder's inputs are `eos, tokens` of the second text, its
    targets `tokens, eos`. A longer text is cut, a shorter one is padded with zeros of weight 0.
    Each example is made when it is asked for. `batches` makes batches of them.

    Args:
      source: a sequence of pairs (text to read, text to produce), each str or bytes.
      source_length: M, tokens of the first text.
      target_length: L, tokens of the second.
      tokenizer: what encodes both.
      masked: whether to give a mask of the source, True at its tokens and False at padding. The
        first position is True even in an empty text, so that there is something to attend to.

    Returns:
      A sequence of (source, inputs, mask, targets, loss_weights), without the mask if not `masked`:
      (M,) int32, (L,) int32, (M,) bool, (L,) int32 and (L,) float32.

    Raises:
      TypeError: if an argument has the wrong type, or an element is no pair.
      ValueError: if a length is below 1, or the source is empty.

    >>> [x.tolist() for x in pairs([('ab', 'c')], 3, 3)[0]]
    [[97, 98, 0], [0, 99, 0], [True, True, False], [99, 0, 0], [1.0, 1.0, 0.0]]
    """
    make = partial(
        _example,
        source_length=source_length,
        target_length=target_length,
        tokenizer=adapted(tokenizer, 'pairs'),
        masked=masked,
    )
    return Mapped(checks.source('pairs', source), make)


@checked
def continuations(source: Source[str | bytes], n_bytes: Size) -> Sequence[tuple[bytes, bytes]]:
    """Returns the beginning of each document and the rest of it: pairs from any text.

    Args:
      source: a sequence of documents.
      n_bytes: the length of a beginning in bytes, in UTF-8 if the document is a str. A document of
        at most twice that is cut in the middle.

    Returns:
      A sequence of (beginning, rest), each made when it is asked for.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `n_bytes` is below 1, or the source is empty.

    >>> list(continuations(['abcdef', 'xy'], 2))
    [(b'ab', b'cdef'), (b'x', b'y')]
    """
    return Mapped(checks.source('continuations', source), partial(_cut, n_bytes=n_bytes))


def _cut(document: str | bytes, n_bytes: int) -> tuple[bytes, bytes]:
    text = as_document(document)
    text = text.encode() if isinstance(text, str) else text
    at = min(n_bytes, len(text) // 2)
    return text[:at], text[at:]


def _example(
    pair: Any, source_length: int, target_length: int, tokenizer: Adapted, masked: bool
) -> Arrays:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f'pairs takes pairs of documents, and the source holds {pair!r:.60}: '
            'use data.packed or data.bucketed for documents'
        )
    read, said = (tokenizer.encode(document) for document in pair)
    made = sequence_pair(read, said, tokenizer.eos_id, source_length, target_length)
    return made if masked else made[:2] + made[3:]
