"""The Transformer from sequence to sequence: an encoder, and a decoder that attends to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from layercomb import layers as tl
from layercomb.checks import ChunkLen, checked
from layercomb.models.reformer_seq2seq import check_arity, refuse_looking_ahead
from layercomb.models.transformer import (
    attention_pattern,
    feed_forward,
    position_layer,
    residual,
    rotary_positions,
    with_positions,
)


@checked
def Transformer(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_encoder_layers: int = 6,
    n_decoder_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 2048,
    dropout: float = 0.0,
    encoder_attention: tl.Layer | Sequence[tl.Layer] | None = None,
    decoder_attention: tl.Layer | Sequence[tl.Layer] | None = None,
    *,
    target_vocab_size: int | None = None,
    masked: bool = False,
    cross_attention: tl.Layer | None = None,
    activation: str | tl.Layer = 'gelu',
    positions: str = 'learned',
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: ChunkLen | None = None,
) -> tl.Serial:
    """From sequence to sequence: tokens (B, M) and (B, L) → logits (B, L, target_vocab_size).

    The first input is the source. The second is the target moved by one: what the decoder has
    written before each position. If `masked`, the third says which source positions are real.

    Blocks are pre-norm, and each stack ends with a norm::

        encoder    x = x + Dropout(Attention(Norm(x)))            bidirectional
                   x = x + Dropout(FeedForward(Norm(x)))
        decoder    x = x + Dropout(Attention(Norm(x)))            causal
                   x = x + Dropout(CrossAttention(Norm(x), m))
                   x = x + Dropout(FeedForward(Norm(x)))

    All decoder blocks read the memory m, the encoder's output. In ``PREDICT`` the decoder takes one
    or more next inputs, and gives what ``EVAL`` gives. It gets the whole source each time; the
    encoder reads it at the first call only, and keys and values of m are made once (`Once`). The
    sublayers can be applied by themselves: ``encoder``: (source[, mask]) → m, and ``decoder``:
    (inputs, m[, mask]) → (B, L, D), which ``head`` projects.

    To share one table of embeddings, wrap the model in ``transforms.Tied(net,
    'encoder/embedding/table', 'decoder/embedding/table')``.

    Args:
      vocab_size: V, of the source.
      d_model: D, the width of the streams.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of the default attention layers; it must divide `d_model`.
      max_len: the longest sequence on either side.
      dropout: the rate on the embeddings and on what each sublayer adds.
      encoder_attention: a layer, or several that alternate over depth; with `masked` they must take
        a mask, as ``tl.SelfAttention(8, causal=False, masked=True)`` does. By default bidirectional
        `SelfAttention`.
      decoder_attention: a layer, or several that alternate over depth, causal and without a mask.
        By default causal `SelfAttention`.
      target_vocab_size: of the decoder's inputs and logits; by default V.
      masked: whether a third input (B, M) boolean says which positions of the source are real.
      cross_attention: (B, L, D), (B, M, D)[, (B, M)] → (B, L, D); by default `CrossAttention`.
      activation, positions, norm, ff_chunk_len: as in `TransformerLM`, on either side.

    Returns:
      A layer with ``n_in = 2 + masked``, whose parts are ``encoder``, ``decoder`` and ``head``.

    Raises:
      ValueError: as `TransformerLM`; if an attention layer does not take the inputs it gets, such
        as a missing mask; or if the decoder's attention is not causal.

    References:
      Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    >>> Transformer(256, 64, 128, 2, 2, n_heads=4, max_len=32, masked=True).n_in
    3
    """
    rotary = rotary_positions(positions, max_len)
    both_ways = tl.SelfAttention(n_heads, causal=False, masked=masked)
    look = both_ways if encoder_attention is None else encoder_attention
    back = tl.SelfAttention(n_heads) if decoder_attention is None else decoder_attention
    across = cross_attention or tl.CrossAttention(n_heads, masked=masked)
    looks = with_positions(attention_pattern(look, n_encoder_layers), max_len, rotary)
    backs = with_positions(attention_pattern(back, n_decoder_layers), max_len, rotary)
    check_arity('Transformer', 'encoder_attention', looks, 1, masked)
    check_arity('Transformer', 'decoder_attention', backs, 1, False)
    check_arity('Transformer', 'cross_attention', (across,), 2, masked)
    refuse_looking_ahead('Transformer', backs)

    add = functools.partial(residual, norm, dropout=dropout)
    feed = add(feed_forward(d_ff, d_model, activation, ff_chunk_len))
    beside = tl.Select((0, 1, 2, 1, 2) if masked else (0, 1, 1))  # x, memory[, mask] twice
    reading = [[tl.Select((0, 1, 1)) if masked else None, add(layer), feed] for layer in looks]
    writing = [[add(layer), beside, add(across), feed] for layer in backs]
    n_target = vocab_size if target_vocab_size is None else target_vocab_size
    embedded = functools.partial(_embedded, d_model, position_layer(positions, max_len), dropout)
    stack = functools.partial(_stack, norm)
    return tl.Serial(
        tl.Select((0, 2, 1, 2)) if masked else None,  # source, mask, inputs, mask
        tl.Once(stack('encoder', embedded(vocab_size), reading, n_encoder_layers, masked)),
        tl.Swap(),  # inputs, memory[, mask]
        stack('decoder', embedded(n_target), writing, n_decoder_layers, 1 + masked),
        tl.Dense(n_target, name='head'),
    )


def _embedded(
    d_model: int, place: tl.Layer | None, dropout: float, vocab_size: int
) -> tuple[tl.Layer | None, ...]:
    """Embedding, positions and dropout: token ids (B, L) → (B, L, D)."""
    embedding = tl.Embedding(vocab_size, d_model, table_init=tl.Normal(0.02))
    return embedding, place, tl.Dropout(dropout) if dropout else None


def _stack(
    norm: tl.Layer,
    name: str,
    embedded: tuple[tl.Layer | None, ...],
    blocks: Sequence[Sequence[tl.Layer | None]],
    n_layers: int,
    n_beside: int,
) -> tl.Serial:
    """An embedding, blocks that alternate over depth, and a norm; values beside x are dropped."""
    return tl.Serial(
        embedded,
        tl.Repeat(tl.Serial(*blocks, name='block'), n_layers // len(blocks)),
        norm.replace(name='norm'),
        tl.Select((0,), n_in=1 + n_beside) if n_beside else None,
        name=name,
    )
