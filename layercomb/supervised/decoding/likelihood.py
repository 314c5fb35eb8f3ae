"""`likelihood`: how well a language model foretells a text, a token and a byte."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from layercomb.checks import Size, check_value
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.model import Model
from layercomb.supervised.decoding.prompts import max_len
from layercomb.supervised.decoding.scoring import score

_WINDOW = 1024  # tokens that are read at once, if nothing is said
_TOGETHER = 4  # windows in a batch


def likelihood(
    model: Model, text: str, tokenizer: Any, *, window: int | None = None
) -> dict[str, float]:
    """The likelihood of a text, read in windows that do not see each other.

    Each window of W tokens foretells the W that follow its first one, so every token of the text
    but the first is scored once, with 1 to W tokens before it.

    Args:
      model: a language model with weights.
      text: the text.
      tokenizer: see `data.Tokenizer`.
      window: W; by default 1,024, or the model's max_len if that is less.

    Returns:
      ``tokens``, how many were scored; ``nats_per_token``; ``perplexity``, e to that power; and
      ``bits_per_byte`` of the text in UTF-8.

    Raises:
      ValueError: if `window` is below 1.
      UsageError: if the text has fewer than two tokens, or `window` exceeds the model's max_len.
    """
    ids = adapted(tokenizer, 'likelihood').encode(text)
    limit = max_len(model.layer)
    most = _WINDOW if limit is None else min(_WINDOW, limit)
    window = most if window is None else check_value('likelihood', 'window', window, Size)
    if len(ids) < 2 or not text:  # a tokenizer may put tokens around nothing
        raise UsageError(f'the text has {len(ids)} tokens: give one of at least two')
    if limit is not None and window > limit:
        raise UsageError(f"the window of {window} exceeds the model's {limit}: give a smaller one")
    starts = range(0, len(ids) - 1, window)
    pieces = [ids[i : i + window + 1] for i in starts]
    whole = [piece for piece in pieces if len(piece) == window + 1]
    batches = [whole[i : i + _TOGETHER] for i in range(0, len(whole), _TOGETHER)]
    batches += [[piece] for piece in pieces[len(whole) :]]
    total = sum(float(np.sum(score(model, batch).totals, dtype=np.float64)) for batch in batches)
    n = len(ids) - 1
    nats = -total / n
    n_bytes = len(text.encode('utf-8', 'surrogatepass'))
    return {
        'tokens': n,
        'nats_per_token': nats,
        'perplexity': math.exp(min(nats, 700.0)),
        'bits_per_byte': -total / math.log(2) / n_bytes,
    }
