"""``--calibrate FILE``: narrow weights that are rounded for a text, and what that does to it."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import numpy as np

from layercomb import paths, transforms
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.launcher import runs
from layercomb.model import Model

_TOKENS = 16_384  # that are read
_HELD = 2_048  # others of the text, which are foretold before and after
_WINDOW = 256
_TOGETHER = 4  # windows in a batch
_LEAST = 8  # windows


def option(add: Any) -> None:
    """Adds the option to a command."""
    add(
        '--calibrate',
        metavar='FILE',
        help='with --bits 8 or 4: a text in UTF-8 like those that the model will read, for which '
        'its weights are rounded; some 20,000 tokens are enough',
    )


def text_of(options: argparse.Namespace) -> str | None:
    """The text that a command is given; None for none.

    Raises:
      UsageError: if weights are not to become integers, or there is no such text.
    """
    if options.calibrate is None:
        return None
    if options.bits not in (8, 4):
        raise UsageError('--calibrate is about how weights are rounded: give --bits 8 or 4 too')
    return runs.read_text(paths.local(options.calibrate, '--calibrate'))


def narrowed(model: Model, bits: int, group_size: int, text: str, tokenizer: Any) -> Model:
    """The model with weights rounded for a text; its perplexity is written to standard error.

    Args:
      model: a language model, with wide weights.
      bits, group_size: as of `transforms.quantize`.
      text: all but its end is read.
      tokenizer: see `data.Tokenizer`.

    Raises:
      UsageError: if the model is none of language, or the text is too short.
    """
    from layercomb.supervised.decoding.prompts import max_len

    if model.layer.n_in != 1:
        raise UsageError(
            f'--calibrate is for language models, and this one takes {model.layer.n_in} inputs: '
            'leave it out'
        )
    window = min(_WINDOW, max_len(model.layer) or _WINDOW)
    ids = np.asarray(adapted(tokenizer, '--calibrate').encode(text), np.int32)
    rows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    if len(rows) < _LEAST:
        raise UsageError(
            f'the text of --calibrate has {len(ids)} tokens: give one of at least '
            f'{_LEAST * window}, better of {_TOKENS + _HELD}'
        )
    n_held = max(1, min(_HELD // window, len(rows) // 8))
    known, held = _spread(rows[:-n_held], _TOKENS // window), rows[-n_held:]
    batches = [np.stack(known[i : i + _TOGETHER]) for i in range(0, len(known), _TOGETHER)]
    made = transforms.quantize(
        model.layer, model.weights or {}, bits, group_size, calibrate=batches, state=model.state
    )
    narrow = Model(*made, model.state)
    before, after = (_perplexity(each, held) for each in (model, narrow))
    print(
        f'{bits} bits, calibrated on {len(known) * window} tokens: perplexity of {n_held * window} '
        f'others {before:.4g} before, {after:.4g} after',
        file=sys.stderr,
    )
    return narrow


def _spread(rows: list[Any], n: int) -> list[Any]:
    """As many rows, at most, from all over."""
    at = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)
    return [rows[i] for i in at]


def _perplexity(model: Model, rows: list[Any]) -> float:
    from layercomb.supervised.decoding.scoring import score

    parts = [rows[i : i + _TOGETHER] for i in range(0, len(rows), _TOGETHER)]
    total = sum(float(np.sum(score(model, part).totals, dtype=np.float64)) for part in parts)
    n = sum(len(row) - 1 for row in rows)
    return math.exp(min(-total / n, 700.0))
