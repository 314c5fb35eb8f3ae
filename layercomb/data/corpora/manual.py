"""The reference manual of Python, which comes with it: English text on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from layercomb.checks import checked
from layercomb.data.adapted import adapted
from layercomb.data.finetuning.answers import Texts
from layercomb.data.finetuning.documents import Document
from layercomb.data.sources import Mapped
from layercomb.data.tokenizers import Tokenizer
from layercomb.errors import UsageError


@checked
def python_manual(tokenizer: Tokenizer) -> Sequence[Document]:
    """Returns the topics of Python's own help as documents, of which every token is learnt.

    They are what ``help()`` shows of topics and keywords: some 80 sections of the language
    reference, half a megabyte of English, of which a fifth stands in two sections. Releases of
    Python differ in a few words. As the `rehearsal` of `packed_documents` they let a model forget
    less of what it knew.

    Args:
      tokenizer: of the model.

    Returns:
      A sequence of (ids, weights), (n,) int32 and float32, as of `chat`.

    Raises:
      TypeError: if an argument has the wrong type.
      UsageError: if this Python has no manual.

    >>> from layercomb.data.tokenizers import ByteTokenizer
    >>> ids, weights = python_manual(ByteTokenizer())[0]
    >>> bytes(ids.tolist())[:26]
    b'The "assert" statement\\n***'
    """
    texts = Texts(adapted(tokenizer, 'python_manual'))
    try:
        from pydoc_data.topics import topics  # half a megabyte
    except ImportError:
        raise UsageError(
            'this Python has no manual (pydoc_data.topics): rehearse text of your own, by '
            'data.text_folder, or none (--rehearse 0)'
        ) from None
    return Mapped([topics[name] for name in sorted(topics)], partial(_document, texts))


def _document(texts: Texts, text: str) -> Document:
    ids = np.concatenate([texts.start, texts.inside(text), texts.eos]).astype(np.int32)
    weights = np.ones(ids.size, np.float32)
    weights[:1] = 0
    return ids, weights
