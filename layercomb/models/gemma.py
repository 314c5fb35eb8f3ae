"""Gemma 2 and Gemma 3, for text.

Shape letters: B batch, L length, D d_model, H heads of queries, G heads of keys and values, K head
depth, F d_ff, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layercomb import layers as tl
from layercomb.checks import ChunkLen, NonNegative, Positive, Rate, Size, checked
from layercomb.models.llama import (
    decoder,
    decoder_block,
    gated_feed_forward,
    grouped_attention,
    over_depth,
)


@checked
def Gemma3(
    vocab_size: Size,
    d_model: Size = 640,
    d_ff: Size = 2048,
    n_layers: Size = 18,
    n_heads: Size = 4,
    n_kv_heads: Size | None = 1,
    max_len: Size = 32768,
    dropout: Rate = 0.0,
    *,
    d_head: Size | None = 256,
    window: Size | Sequence[Size | None] | None = (*[512] * 5, None),
    period: Positive = 1000000.0,
    local_period: Positive | None = 10000.0,
    scaling: Any = None,
    local_scaling: Any = None,
    scale: Positive | None = None,
    softcap: Positive | None = None,
    logit_softcap: Positive | None = None,
    epsilon: NonNegative = 1e-6,
    attention_bias: bool = False,
    qk_norm: bool = True,
    tied: bool = True,
    activation: str = 'gelu',
    ff_chunk_len: ChunkLen | None = None,
    remat: bool = False,
) -> tl.Layer:
    """The decoder-only language model Gemma 3: token ids (B, L) → logits (B, L, vocab_size).

    Embeddings are multiplied by √D. A block has four norms, and multiplies by 1 + scale in each::

        x = x + Dropout(RMSNorm(Attention(RMSNorm(x))))
        x = x + Dropout(RMSNorm(Dense(gelu(h W_gate) · (h W_up)))) where h = RMSNorm(x)

    Args:
      vocab_size: V.
      d_model: D, the width of the stream.
      d_ff: F, the width inside the feed-forwards.
      n_layers: how many blocks.
      n_heads: H.
      n_kv_heads: G, which divides H; None for H.
      max_len: the longest sequence.
      dropout: the rate on the embeddings and on what each sublayer adds.
      d_head: K; None for D / H.
      window: how many positions a query sees, itself included; None for all before it. A sequence
        alternates over depth: by default five local layers and one that sees all.
      period: of the rotary positions of layers that see all.
      local_period: of those of layers with a window; None for `period`.
      scaling, local_scaling: of the rotary positions of the two, e.g. `tl.LinearScaling`; None for
        none.
      scale: of the attention scores; None for 1/√K.
      softcap: c of c·tanh(scores / c); None for none.
      logit_softcap: c of c·tanh(logits / c); None for none.
      epsilon: of the norms.
      attention_bias: whether the projections of the attention have biases.
      qk_norm: whether queries and keys are normalized, head by head, before they are rotated.
      tied: whether the head is the transposed table of the embedding.
      activation: of the gates.
      ff_chunk_len: how many positions a feed-forward takes at a time: a number, 'auto' for what
        suits the platform (see `Chunk`), or None for all.
      remat: whether the backward pass computes each block again.

    Returns:
      ``Serial(embedding, Repeat(block) …, norm, head)``, inside `transforms.Tied` if `tied`.

    Raises:
      ValueError: if heads do not divide, or an argument is out of its range.

    References:
      Gemma Team 2025, https://arxiv.org/abs/2503.19786

    >>> Gemma3(256, 64, 128, n_layers=7, n_heads=2, max_len=32, d_head=16).n_out
    1
    """
    further: Any = {'dropout': dropout, 'tied': tied, 'remat': remat}
    norm = tl.RMSNorm(epsilon, offset=1.0, name='norm')

    def block(window: int | None) -> tl.Serial:  # (B, L, D) → (B, L, D)
        seen = (period, scaling) if window is None else (local_period or period, local_scaling)
        attention = grouped_attention(
            (d_model, n_heads, n_kv_heads, d_head),
            window=window,
            biases=(attention_bias, attention_bias),
            norm=tl.RMSNorm(epsilon, offset=1.0) if qk_norm else None,
            rotary=tl.RotaryPositions(seen[0], max_len, scaling=seen[1]),
            scale=scale,
            softcap=softcap,
        )
        feed, after = gated_feed_forward(d_ff, d_model, activation), norm.replace(name='norm_after')
        return decoder_block(attention, feed, norm, dropout, ff_chunk_len, after=after)

    return decoder(
        tl.Embedding(vocab_size, d_model, tl.Normal(0.02), math.sqrt(d_model)),  # → (B, L, D)
        [block(each) for each in over_depth(window, n_layers)],
        norm,  # (B, L, D) → (B, L, D)
        _head(vocab_size, logit_softcap),  # (B, L, D) → (B, L, V)
        **further,
    )


def _head(vocab_size: int, softcap: float | None) -> tl.Layer:
    """(B, L, D) → logits (B, L, V)."""
    head = tl.Dense(vocab_size, use_bias=False, name='head')
    if softcap is None:
        return head
    return tl.Serial(head.replace(name='dense'), tl.SoftCap(softcap), name='head')


def Gemma2(vocab_size: int, *args: Any, **options: Any) -> tl.Layer:
    """The decoder Gemma 2: token ids (B, L) → logits (B, L, vocab_size).

    It is `Gemma3` with soft caps on scores (50) and logits (30), without norms of queries and keys,
    with one rotary period of 10,000, and with a window of 4,096 in every second layer.

    Args:
      vocab_size: V.
      *args, **options: as of `Gemma3`.

    Raises:
      TypeError, ValueError: as `Gemma3`.

    References:
      Gemma Team 2024, https://arxiv.org/abs/2408.00118

    >>> Gemma2(256, 64, 128, n_layers=2, n_heads=2, max_len=32, d_head=16).n_out
    1
    """
    return Gemma3(vocab_size, *args, **{**_GEMMA2, **options})


_GEMMA2: dict[str, Any] = {
    'window': (4096, None),
    'period': 10000.0,
    'local_period': None,
    'softcap': 50.0,
    'logit_softcap': 30.0,
    'qk_norm': False,
}
