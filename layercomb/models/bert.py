"""BERT, RoBERTa and ALBERT: bidirectional encoders, and what is asked of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import checked
from layercomb.transforms.tying import Tied

HEADS = ('hidden', 'masked_lm', 'classes', 'mean')


@checked
def BERT(
    vocab_size: int = 30522,
    d_model: int = 768,
    d_ff: int = 3072,
    n_layers: int = 12,
    n_heads: int = 12,
    max_len: int = 512,
    dropout: float = 0.0,
    head: str = 'masked_lm',
    n_classes: int | None = None,
    *,
    typed: bool = False,
    masked: bool = True,
    n_types: int = 2,
    first_position: int = 0,
    d_embedding: int | None = None,
    shared: bool = False,
    activation: str | tl.Layer = 'exact_gelu',
    epsilon: float = 1e-12,
) -> tl.Layer:
    """A bidirectional encoder of token ids (B, L), with post-norm blocks.

    ::

        x = Norm(x + Attention(x))
        x = Norm(x + FeedForward(x))

    With ``first_position=2`` and ``n_types=1`` it is RoBERTa, with `d_embedding` and `shared` it is
    ALBERT.

    Inputs are the ids (B, L) int32; if `typed`, the type (sentence) of each token (B, L) int32;
    and, if `masked`, which positions are real (B, L) bool. Outputs go by `head`:

    * ``'hidden'``: the last hidden states (B, L, D).
    * ``'masked_lm'``: logits (B, L, V), by the table of the embedding.
    * ``'classes'``: logits (B, n_classes), by W tanh(P x + p) + b from the first position.
    * ``'mean'``: the mean over real positions, of length 1: (B, D), an embedding of the text.

    Args:
      vocab_size: V.
      d_model: D, the width of the stream.
      d_ff: the width inside the feed-forwards.
      n_layers: how many blocks.
      n_heads: H; it must divide `d_model`.
      max_len: the longest sequence.
      dropout: the rate on embeddings, on what each sublayer adds, and in the classifier.
      head: what the model gives.
      n_classes: of the head ``'classes'``.
      typed: whether types are an input; otherwise each token is of type 0.
      masked: whether a mask is an input; otherwise each position is real.
      n_types: how many types there are.
      first_position: the row of the table that is the first position's.
      d_embedding: E, the width of the embeddings before they are projected to D; None for D.
      shared: whether all blocks have the same weights.
      activation: of the feed-forwards and of the head ``'masked_lm'``.
      epsilon: of the norms.

    Returns:
      ``Serial(embeddings, Repeat(block), head)``, perhaps with a tied head.

    Raises:
      ValueError: for an unknown head, or `n_classes` missing or out of place.

    References:
      Devlin et al. 2018, https://arxiv.org/abs/1810.04805
      Liu et al., RoBERTa, 2019, https://arxiv.org/abs/1907.11692
      Lan et al., ALBERT, 2019, https://arxiv.org/abs/1909.11942
      Reimers & Gurevych, Sentence-BERT (the mean), 2019, https://arxiv.org/abs/1908.10084

    >>> BERT(64, 16, 32, n_layers=2, n_heads=2, max_len=8).n_in
    2
    """
    norm = tl.LayerNorm(epsilon)
    attention = tl.SelfAttention(n_heads, causal=False, masked=masked, dropout=dropout)
    block = post_norm_block(attention, d_ff, d_model, activation, norm, dropout)
    width = d_embedding or d_model
    return with_head(
        embeddings(
            vocab_size, width, n_types, max_len, norm, dropout, typed, first_position,
            None if d_embedding is None else d_model,
        ),
        tl.Repeat(block, n_layers, shared=shared),
        encoder_head(
            head, vocab_size, d_model, width, n_classes, activation, norm, dropout, masked
        ),
    )  # fmt: skip


def embeddings(
    vocab_size: int,
    width: int,
    n_types: int,
    max_len: int,
    norm: tl.Layer,
    dropout: float,
    typed: bool,
    first_position: int = 0,
    d_model: int | None = None,
) -> tl.Serial:
    """Norm(token + type + position): ids (B, L)[, types (B, L)] → (B, L, D).

    Args:
      vocab_size: V.
      width: E, of the tables.
      n_types: how many types of tokens there are.
      max_len: the longest sequence.
      norm: the normalization.
      dropout: the rate on the result.
      typed: whether types are a second input.
      first_position: the row of the first position.
      d_model: D, to which the result is projected; None for no projection.
    """
    types = None if typed else [tl.Dup(), tl.Parallel(None, tl.Fn('NoTypes', jnp.zeros_like))]
    initial = tl.Normal(0.02)
    return tl.Serial(
        types,
        tl.Parallel(
            tl.Embedding(vocab_size, width, table_init=initial, name='tokens'),
            tl.Embedding(n_types, width, table_init=initial, name='types'),
            name='tables',
        ),
        tl.Add(),  # (B, L, E)
        tl.LearnedPositions(max_len, first=first_position, name='positions'),
        norm.replace(name='norm'),
        tl.Dropout(dropout) if dropout else None,
        tl.Dense(d_model, name='projection') if d_model else None,  # (B, L, D)
        name='embeddings',
    )


def post_norm_block(
    mixing: tl.Layer,
    d_ff: int,
    d_model: int,
    activation: str | tl.Layer,
    norm: tl.Layer,
    dropout: float,
) -> tl.Serial:
    """x = Norm(x + Mixing(x)); x = Norm(x + FeedForward(x)): (B, L, D)[, mask] → the same.

    Args:
      mixing: attention, (B, L, D) → (B, L, D) or with a mask (B, L) as second input; or
        `FourierMixing`.
      d_ff: the width inside the feed-forward.
      d_model: D.
      activation: of the feed-forward.
      norm: the normalization.
      dropout: the rate on what each sublayer adds.
    """
    drop = tl.Dropout(dropout) if dropout else None
    feed_forward = tl.Serial(
        tl.Dense(d_ff), tl.activation(activation), tl.Dense(d_model), name='feed_forward'
    )
    return tl.Serial(
        tl.Select((0, 1, 1)) if mixing.n_in == 2 else None,  # x, mask, mask
        tl.Residual(mixing, drop, name='mixing'),  # (B, L, D)
        norm.replace(name='mixing_norm'),
        tl.Residual(feed_forward, drop, name='feeding'),  # (B, L, D)
        norm.replace(name='feeding_norm'),
        name='block',
    )


def encoder_head(
    head: str,
    vocab_size: int,
    d_model: int,
    width: int,
    n_classes: int | None,
    activation: str | tl.Layer,
    norm: tl.Layer,
    dropout: float,
    masked: bool,
) -> tl.Layer:
    """What is asked of an encoder: hidden states (B, L, D)[, mask (B, L)] → see `BERT`.

    Args:
      head: 'hidden', 'masked_lm', 'classes' or 'mean'.
      vocab_size: V.
      d_model: D.
      width: E, of the table that gives logits.
      n_classes: of the head 'classes'.
      activation: of the head 'masked_lm'.
      norm: the normalization in it.
      dropout: the rate in the classifier.
      masked: whether there is a mask on the stack; it ends here.

    Raises:
      ValueError: for an unknown head, or `n_classes` missing or out of place.
    """
    if head not in HEADS:
        raise ValueError(f'no head {head!r}: there are {", ".join(HEADS)}')
    if (head == 'classes') != (n_classes is not None):
        raise ValueError(f'n_classes={n_classes} with head={head!r}: give it for "classes" alone')
    unmasked = tl.Select((0,), n_in=2) if masked else None
    drop = tl.Dropout(dropout) if dropout else None
    parts: dict[str, Any] = {
        'hidden': [unmasked],
        'masked_lm': [
            unmasked,
            tl.Dense(width, name='dense'),  # (B, L, E)
            tl.activation(activation),
            norm.replace(name='norm'),
            tl.Dense(vocab_size, name='logits'),  # (B, L, V)
        ],
        'classes': [
            unmasked,
            tl.Fn('First', first_position),  # (B, D)
            tl.Dense(d_model, name='pooler'),
            tl.Tanh(),
            drop,
            tl.Dense(n_classes or 1, name='classes'),  # (B, n_classes)
        ],
        'mean': [tl.Mean(masked=masked), tl.Fn('Normalize', normalized)],  # (B, D)
    }
    return tl.Serial(*parts[head], name='head')


def with_head(before: tl.Layer, blocks: tl.Layer, head: tl.Layer) -> tl.Layer:
    """The whole model; a head with logits of tokens shares the table of the embedding.

    Args:
      before: the embeddings.
      blocks: the encoder.
      head: of `encoder_head`.
    """
    net = tl.Serial(before, blocks, head)
    if not any(layer.name == 'logits' for layer in head.sublayers):
        return net
    return Tied(net, 'embeddings/tables/tokens/table', 'head/logits/kernel', jnp.transpose)


def first_position(x: jax.Array) -> jax.Array:
    """The first position: (B, L, D) → (B, D)."""
    return x[:, 0]


def normalized(x: jax.Array) -> jax.Array:
    """x / max(‖x‖, 1e-12), of length 1 over the last axis: (…, D) → (…, D)."""
    length = jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)
