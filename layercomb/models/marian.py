"""Marian: an encoder-decoder for translation, post-norm, with one table for both languages."""

from __future__ import annotations

import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import checked
from layercomb.models.bert import post_norm_block
from layercomb.transforms.tying import Tied


@checked
def Marian(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_encoder_layers: int = 6,
    n_decoder_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 512,
    dropout: float = 0.0,
    *,
    decoder_d_ff: int | None = None,
    decoder_n_heads: int | None = None,
    activation: str | tl.Layer = 'silu',
    scaled: bool = True,
    epsilon: float = 1e-5,
) -> tl.Layer:
    """From sequence to sequence: tokens (B, S) and (B, L), mask (B, S) → logits (B, L, V).

    The first input is the source, the second what the decoder has written before each position, the
    third says which positions of the source are real. With E one table for both sides::

        encoder    x = E[source] √D + P
                   x = Norm(x + Attention(x));  x = Norm(x + FeedForward(x))        bidirectional
        decoder    y = E[inputs] √D + P
                   y = Norm(y + Attention(y));  y = Norm(y + CrossAttention(y, x))  causal
                   y = Norm(y + FeedForward(y))
        head       y Eᵀ + b

    In ``PREDICT`` the decoder takes one or more next inputs, and the encoder runs at the first call
    only (`Once`).

    Args:
      vocab_size: V.
      d_model: D.
      d_ff: the width inside the encoder's feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of the encoder; it must divide `d_model`.
      max_len: the longest sequence on either side.
      dropout: the rate on embeddings and on what each sublayer adds.
      decoder_d_ff, decoder_n_heads: of the decoder; None for those of the encoder.
      activation: of the feed-forwards.
      scaled: whether embeddings are multiplied by √D.
      epsilon: of the norms.

    Returns:
      A layer with three inputs, whose parts are ``encoder``, ``decoder`` and ``head``.

    References:
      Junczys-Dowmunt et al., Marian, 2018, https://arxiv.org/abs/1804.00344
      Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    >>> Marian(64, 16, 32, 2, 2, n_heads=2, max_len=8).n_in
    3
    """
    norm = tl.LayerNorm(epsilon)
    drop = tl.Dropout(dropout) if dropout else None
    scale = d_model**0.5 if scaled else None
    start = [
        tl.Embedding(vocab_size, d_model, scale=scale, table_init=tl.Normal(0.02), name='tokens'),
        tl.SinusoidalPositions(max_len=max_len, name='positions'),
        drop,
    ]  # (B, L) → (B, L, D)
    look = tl.SelfAttention(n_heads, causal=False, masked=True, dropout=dropout)
    encoder = tl.Serial(
        start,
        tl.Repeat(
            post_norm_block(look, d_ff, d_model, activation, norm, dropout), n_encoder_layers
        ),
        tl.Select((0,), n_in=2),  # without the mask
        name='encoder',
    )
    block = _decoder_block(
        decoder_n_heads or n_heads, decoder_d_ff or d_ff, d_model, activation, norm, dropout
    )
    decoder = tl.Serial(
        start, tl.Repeat(block, n_decoder_layers), tl.Select((0,), n_in=3), name='decoder'
    )
    net: tl.Layer = tl.Serial(
        tl.Select((0, 2, 1, 2)),  # source, mask, inputs, mask
        tl.Once(encoder),
        tl.Swap(),  # inputs, memory, mask
        decoder,
        tl.Dense(vocab_size, name='head'),  # (B, L, V)
    )
    net = Tied(net, 'encoder/tokens/table', 'decoder/tokens/table')
    return Tied(net, 'encoder/tokens/table', 'head/kernel', jnp.transpose)


def _decoder_block(
    n_heads: int,
    d_ff: int,
    d_model: int,
    activation: str | tl.Layer,
    norm: tl.Layer,
    dropout: float,
) -> tl.Serial:
    """y (B, L, D), memory (B, S, D), mask (B, S) → the same, with y written on."""
    drop = tl.Dropout(dropout) if dropout else None
    feed_forward = tl.Serial(
        tl.Dense(d_ff), tl.activation(activation), tl.Dense(d_model), name='feed_forward'
    )
    return tl.Serial(
        tl.Residual(tl.SelfAttention(n_heads, dropout=dropout), drop, name='mixing'),
        norm.replace(name='mixing_norm'),
        tl.Select((0, 1, 2, 1, 2)),  # y, memory, mask, memory, mask
        tl.Residual(tl.CrossAttention(n_heads, masked=True, dropout=dropout), drop, name='reading'),
        norm.replace(name='reading_norm'),
        tl.Residual(feed_forward, drop, name='feeding'),
        norm.replace(name='feeding_norm'),
        name='block',
    )
