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
from layercomb.data.judged.labels import joined
from layercomb.errors import UsageError
from layercomb.layers.basic.dense import Dense
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.metrics.class_names import class_names
from layercomb.model import Model, check_tokens
from layercomb.supervised.decoding.prompts import max_len, padded, round_up

_HEADS = ('head', 'classes')  # the names of dense layers that give logits, in all our models
_CURE = "load a sentence encoder, or make one by models.BERT(head='mean')"


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
      UsageError: if the model takes other inputs, gives logits of classes or something else, or a
        text has no tokens.

    References:
      Reimers & Gurevych, Sentence-BERT, 2019, https://arxiv.org/abs/1908.10084
    """
    batch_size = check_value('embed', 'batch_size', batch_size, Size)
    if max_tokens is not None:
        max_tokens = check_value('embed', 'max_tokens', max_tokens, Size)
    if model.layer.n_in != 2:
        raise UsageError(
            f'embed takes a model of ids and a mask, and this one has {model.layer.n_in} inputs: '
            f'{_CURE}'
        )
    if _gives_classes(model.layer):
        raise UsageError(
            'embed takes a model that gives a vector for each text, and this one gives logits of '
            f'classes: use decoding.classify, or {_CURE}'
        )
    rows = outputs_of('embed', model, tokenizer, texts, batch_size, max_tokens)
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def outputs_of(
    owner: str,
    model: Model,
    tokenizer: Any,
    texts: Sequence[str | tuple[str, str]],
    batch_size: int,
    max_tokens: int | None,
) -> list[np.ndarray]:
    """What an encoder gives for each text: a vector, or logits.

    Args:
      owner: what messages begin with.
      model: with weights: ids (B, L)[, types (B, L)], mask (B, L) → (B, D).
      tokenizer: see `data.Tokenizer`.
      texts: strings, or pairs of them.
      batch_size: how many are read at once.
      max_tokens: the most tokens of a text; None for as many as the model reads.

    Returns:
      For each text (D,) float32.

    Raises:
      TypeError: if the model has no weights.
      UsageError: if it gives something else, or a text has no tokens.
    """
    if model.weights is None:
        raise TypeError(f'{owner}: this model has no weights yet: load or train one')
    limit = max_len(model.layer)
    if max_tokens is not None:
        limit = min(max_tokens, limit or max_tokens)
    tokenizer = adapted(tokenizer, owner)
    pairs = [(text,) if isinstance(text, str | bytes) else tuple(text) for text in texts]
    if any(len(pair) not in (1, 2) for pair in pairs):
        raise TypeError(f'{owner}: give texts, or pairs of texts')
    given = [joined(pair, tokenizer, limit)[:2] for pair in pairs]
    order = sorted(range(len(given)), key=lambda i: len(given[i][0]))
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = _batch(owner, model, [given[i] for i in chosen], limit)
        found |= dict(zip(chosen, rows, strict=True))
    return [found[i] for i in range(len(given))]


def _gives_classes(net: Layer) -> bool:
    """Whether a model is a classifier: it names classes, or ends with a head of classes."""
    return class_names(net) is not None or any(
        isinstance(layer, Dense) and path.split('/')[-1] in _HEADS for path, layer in walk(net)
    )


def _batch(
    owner: str, model: Model, rows: list[tuple[np.ndarray, int]], limit: int | None
) -> np.ndarray:
    """Some texts, (B, D); lengths are rounded up, so that programs are few."""
    ids, lengths = padded('text', [row for row, _ in rows])
    length = round_up(ids.shape[1])
    length = length if limit is None else min(length, limit)
    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
    at = np.arange(length)
    mask = at < lengths[:, None]
    types = ((at >= np.array([[second] for _, second in rows])) & mask).astype(np.int32)
    values = tuple(map(jnp.asarray, (ids, *(types,) * (model.layer.n_in - 2), mask)))
    check_tokens(model.layer, values)
    made = np.asarray(_apply(model.layer, model.weights, model.state, values), np.float32)
    if made.ndim != 2:
        raise UsageError(
            f'{owner} takes a model that gives a vector for each text, and this one gives '
            f'{made.ndim} axes: {_CURE}'
        )
    return made


@functools.partial(jax.jit, static_argnums=0)
def _apply(net: Layer, weights: Any, state: Any, values: Any) -> jax.Array:
    (y,), _ = net.apply(weights, state, values, mode=Mode.EVAL)
    return y
