"""T5: an encoder-decoder, pre-norm, with biases of relative positions in place of positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import checked
from layercomb.transforms.tying import Tied


@checked
def T5(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_encoder_layers: int = 6,
    n_decoder_layers: int = 6,
    n_heads: int = 8,
    d_head: int | None = None,
    dropout: float = 0.0,
    *,
    n_buckets: int = 32,
    max_distance: int = 128,
    activation: str = 'relu',
    gated: bool = False,
    tied: bool = True,
    scaled_head: bool = True,
    epsilon: float = 1e-6,
) -> tl.Layer:
    """From sequence to sequence: tokens (B, S) and (B, L), mask (B, S) → logits (B, L, V).

    The first input is the source, the second what the decoder has written before each position, the
    third says which positions of the source are real. With one table E for both sides, and norms
    without mean and bias::

        encoder    x = x + Attention(Norm(x));  x = x + FeedForward(Norm(x))          bidirectional
        decoder    y = y + Attention(Norm(y));  y = y + CrossAttention(Norm(y), x)    causal
                   y = y + FeedForward(Norm(y))

    Scores are not divided by √K. All blocks of a side share the biases of relative positions, which
    `RelativeBias` makes. There are no other positions, and no longest sequence.

    In ``PREDICT`` the decoder takes one or more next inputs, and the encoder runs at the first call
    only (`Once`).

    Args:
      vocab_size: V.
      d_model: D.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: H.
      d_head: K; None for D / H.
      dropout: the rate on embeddings and on what each sublayer adds.
      n_buckets, max_distance: of the biases, see `RelativeBias`.
      activation: of the feed-forwards.
      gated: whether these are act(x W) · (x V) W_o (version 1.1), or act(x W) W_o.
      tied: whether the head is the table of the embeddings.
      scaled_head: whether the head's inputs are divided by √D, as in version 1.0.
      epsilon: of the norms.

    Returns:
      A layer with three inputs, whose parts are ``encoder``, ``decoder`` and ``head``.

    References:
      Raffel et al. 2019, https://arxiv.org/abs/1910.10683
      Shazeer, GLU variants (the gates), 2020, https://arxiv.org/abs/2002.05202

    >>> T5(64, 16, 32, 2, 2, n_heads=2).n_in
    3
    """
    norm = tl.RMSNorm(epsilon, name='norm')
    drop = tl.Dropout(dropout) if dropout else None
    heads = _Heads(n_heads, None if d_head is None or d_head * n_heads == d_model else d_head)
    encoder_block, decoder_block = _blocks(
        norm, drop, heads, dropout, _feed_forward(d_ff, d_model, activation, gated, drop)
    )

    def side(name: str, block: tl.Layer, n_layers: int, causal: bool) -> tl.Serial:
        return tl.Serial(
            tl.Embedding(vocab_size, d_model, table_init=tl.Normal(1.0), name='tokens'),
            drop,  # (B, L, D)
            tl.RelativeBias(
                n_heads, n_buckets, max_distance, bidirectional=not causal, name='distances'
            ),  # x, biases, …
            tl.Repeat(block, n_layers),
            tl.Select((0,), n_in=block.n_out),
            norm,
            drop,
            name=name,
        )

    net: tl.Layer = tl.Serial(
        tl.Select((0, 2, 1, 2)),  # source, mask, inputs, mask
        tl.Once(side('encoder', encoder_block, n_encoder_layers, causal=False)),
        tl.Swap(),  # inputs, memory, mask
        side('decoder', decoder_block, n_decoder_layers, causal=True),
        tl.Fn('Scale', Times(d_model**-0.5), position_wise=True) if scaled_head else None,
        tl.Dense(vocab_size, use_bias=False, name='head'),  # (B, L, V)
    )
    net = Tied(net, 'encoder/tokens/table', 'decoder/tokens/table')
    return Tied(net, 'encoder/tokens/table', 'head/kernel', jnp.transpose) if tied else net


class _Heads(NamedTuple):
    """The number of heads, and the depth of one if it is not D / H."""

    n_heads: int
    d_head: int | None


def _blocks(
    norm: tl.Layer, drop: tl.Layer | None, heads: _Heads, dropout: float, feed: Sequence[Any]
) -> tuple[tl.Serial, tl.Serial]:
    """The blocks of encoder and decoder.

    Returns:
      x, biases, mask → the same; and y, biases, memory, mask → the same. Only x and y change.
    """
    options: dict[str, Any] = {
        'd_head': heads.d_head, 'scale': 1.0, 'dropout': dropout,
        'qkv_bias': False, 'out_bias': False,
    }  # fmt: skip

    def attention(causal: bool) -> tl.SelfAttention:
        return tl.SelfAttention(
            heads.n_heads, causal=causal, masked=not causal, relative=True, **options
        )

    across = tl.CrossAttention(heads.n_heads, masked=True, **options)
    feeding = tl.Residual(norm, *feed, drop, name='feeding')
    encoder_block = tl.Serial(
        tl.Select((0, 1, 2, 1, 2)),  # x, biases, mask, biases, mask
        tl.Residual(norm, attention(causal=False), drop, name='mixing'),  # x, biases, mask
        feeding,
        name='block',
    )
    decoder_block = tl.Serial(
        tl.Select((0, 1, 1)),  # y, biases, biases, memory, mask
        tl.Residual(norm, attention(causal=True), drop, name='mixing'),  # y, biases, memory, mask
        tl.Select((0, 2, 3, 1, 2, 3)),  # y, memory, mask, biases, memory, mask
        tl.Residual(norm, across, drop, name='reading'),  # y, biases, memory, mask
        feeding,
        name='block',
    )
    return encoder_block, decoder_block


def _feed_forward(
    d_ff: int, d_model: int, activation: str, gated: bool, drop: tl.Layer | None
) -> list[tl.Layer | None]:
    """act(x W) W_o, or if gated act(x W) · (x V) W_o: (B, L, D) → (B, L, D)."""
    inner: list[tl.Layer | None] = [tl.Dense(d_ff, use_bias=False), tl.activation(activation)]
    if gated:
        inner = [tl.GatedDense(d_ff, activation)]
    return [*inner, drop, tl.Dense(d_model, use_bias=False, name='out')]


@dataclasses.dataclass(frozen=True)
class Times:
    """x · factor, a function that equals another with the same factor.

    Attributes:
      factor: any number.
    """

    factor: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """x · factor, in the shape and dtype of x."""
        return x * jnp.asarray(self.factor, x.dtype)
