"""GPT-2.

Shape letters: B batch, L length, D d_model, H heads, F d_ff, V vocabulary.
"""

from __future__ import annotations

import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import NonNegative, Rate, Size, checked
from layercomb.transforms.tying import Tied


@checked
def GPT2(
    vocab_size: Size = 50257,
    d_model: Size = 768,
    d_ff: Size | None = None,
    n_layers: Size = 12,
    n_heads: Size = 12,
    max_len: Size = 1024,
    dropout: Rate = 0.0,
    *,
    activation: str | tl.Layer = 'gelu',
    epsilon: NonNegative = 1e-5,
    tied: bool = True,
    remat: bool = False,
) -> tl.Layer:
    """The decoder-only language model GPT-2: token ids (B, L) → logits (B, L, vocab_size).

    Positions are learned, and blocks are pre-norm::

        x = x + Dropout(Attention(LayerNorm(x)))
        x = x + Dropout(Dense(Gelu(Dense(LayerNorm(x)))))

    Args:
      vocab_size: V.
      d_model: D, the width of the stream.
      d_ff: F, the width inside the feed-forwards; None for 4 D.
      n_layers: how many blocks.
      n_heads: H, which divides D.
      max_len: the longest sequence.
      dropout: the rate on the embeddings and on what each sublayer adds.
      activation: of the feed-forwards, a name or a layer; 'gelu' is the tanh approximation.
      epsilon: of the norms.
      tied: whether the head is the transposed table of the embedding.
      remat: whether the backward pass computes each block again, instead of keeping its
        activations.

    Returns:
      ``Serial(embedding, positions, Repeat(block), norm, head)``, inside `transforms.Tied` if
      `tied`.

    References:
      Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    >>> GPT2(256, 64, n_layers=2, n_heads=4, max_len=32).n_out
    1
    """
    norm = tl.LayerNorm(epsilon, name='norm')
    rate = tl.Dropout(dropout) if dropout else None
    block: tl.Layer = tl.Serial(
        tl.Residual(norm, tl.SelfAttention(n_heads), rate, name='attention'),  # (B, L, D)
        tl.Residual(
            norm,
            tl.Dense(4 * d_model if d_ff is None else d_ff),  # (B, L, D) → (B, L, F)
            tl.activation(activation),
            tl.Dense(d_model),  # (B, L, F) → (B, L, D)
            rate,
            name='feed_forward',
        ),
        name='block',
    )
    net = tl.Serial(
        tl.Embedding(vocab_size, d_model, tl.Normal(0.02)),  # (B, L) → (B, L, D)
        tl.LearnedPositions(max_len, name='positions'),
        rate,
        tl.Repeat(tl.Remat(block) if remat else block, n_layers),
        norm,
        tl.Dense(vocab_size, use_bias=False, name='head'),  # (B, L, D) → (B, L, V)
    )
    return Tied(net, 'embedding/table', 'head/kernel', jnp.transpose) if tied else net
