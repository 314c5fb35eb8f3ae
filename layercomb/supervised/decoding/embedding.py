"""`embed`: texts as vectors, by an encoder that averages over positions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Size, check_value
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.model import Model, check_tokens
from layercomb.supervised.decoding.prompts import max_len, padded, round_up


def embed(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_tokens: int | None = None,
) -> np.ndarray:
    """The embeddings of texts: vectors whose products say how alike the texts are.

    Texts of similar length share a batch, padded at the end and masked.

    Args:
      model: with weights: ids (B, L) and mask (B, L) → (B, D), such as ``models.BERT(head='mean')``
        or what `interop.load` makes of a sentence encoder.
      tokenizer: see `data.Tokenizer`.
      texts: the texts, none of which is empty.
      batch_size: how many texts are read at once.
      max_tokens: longer texts are cut to so many tokens, and keep a mark at their end; None for as
        many as the model reads.

    Returns:
      (N, D) float32, in the order of the texts.

    Raises:
      TypeError: if the model has no weights.
      UsageError: if the model takes other inputs, gives something else, or a text has no tokens.

    References:
      Reimers & Gurevych, Sentence-BERT, 2019, https://arxiv.org/abs/1908.10084
    """
    if model.weights is None:
        raise TypeError('embed: this model has no weights yet: load or train one')
    if model.layer.n_in != 2:
        raise UsageError(
            f'embed takes a model of ids and a mask, and this one has {model.layer.n_in} inputs: '
            "load a sentence encoder, or make one by models.BERT(head='mean')"
        )
    batch_size = check_value('embed', 'batch_size', batch_size, Size)
    limit = max_len(model.layer)
    if max_tokens is not None:
        limit = min(check_value('embed', 'max_tokens', max_tokens, Size), limit or max_tokens)
    tokenizer = adapted(tokenizer, 'embed')
    rows = [_cut(tokenizer.encode(text), limit, tokenizer.eos_id) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        for i, vector in zip(chosen, _batch(model, [rows[i] for i in chosen], limit), strict=True):
            found[i] = vector
    return np.stack([found[i] for i in range(len(rows))]) if rows else np.zeros((0, 0), np.float32)


def _cut(ids: np.ndarray, limit: int | None, eos_id: int) -> np.ndarray:
    """The first ids; a mark at the end of the text stays there."""
    if limit is None or len(ids) <= limit:
        return ids
    return np.append(ids[: limit - 1], ids[-1]) if ids[-1] == eos_id else ids[:limit]


def _batch(model: Model, rows: list[np.ndarray], limit: int | None) -> np.ndarray:
    """The embeddings of some texts, (B, D); lengths are rounded up, so that programs are few."""
    ids, lengths = padded('text', rows)
    length = round_up(ids.shape[1])
    length = length if limit is None else min(length, limit)
    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
    mask = np.arange(length) < lengths[:, None]
    values = jnp.asarray(ids), jnp.asarray(mask)
    check_tokens(model.layer, values)
    made = np.asarray(_apply(model.layer, model.weights, model.state, values), np.float32)
    if made.ndim != 2:
        raise UsageError(
            f'embed takes a model that gives a vector for each text, and this one gives '
            f"{made.ndim} axes: load a sentence encoder, or make one by models.BERT(head='mean')"
        )
    return made


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: Layer, weights: Any, state: Any, values: Any) -> jax.Array:
    (y,), _ = net.apply(weights, state, values, mode=Mode.EVAL)
    return y
