"""The Reformer from sequence to sequence: an encoder and a decoder, both reversible."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from layercomb import layers as tl
from layercomb.checks import ChunkLen, checked
from layercomb.layers.core.walk import walk
from layercomb.models.reformer import (
    reformer_positions,
    reversible_blocks,
    reversible_feed_forward,
    reversible_half,
    two_streams,
)
from layercomb.models.transformer import (
    attention_pattern,
    feed_forward,
    rotary_positions,
    with_positions,
)


@checked
def Reformer(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_encoder_layers: int = 6,
    n_decoder_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 65536,
    dropout: float = 0.0,
    encoder_attention: tl.Layer | Sequence[tl.Layer] | None = None,
    decoder_attention: tl.Layer | Sequence[tl.Layer] | None = None,
    *,
    target_vocab_size: int | None = None,
    masked: bool = False,
    cross_attention: tl.Layer | None = None,
    n_hashes: int = 4,
    chunk_len: int = 64,
    activation: str | tl.Layer = 'gelu',
    positions: str = 'axial',
    axial_shape: tuple[int, int] | None = None,
    axial_depths: tuple[int, int] | None = None,
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: ChunkLen | None = 'auto',
) -> tl.Serial:
    """From sequence to sequence: tokens (B, M) and (B, L) → logits (B, L, target_vocab_size).

    The first input is the source. The second is the target moved by one: what the decoder has
    written before each position. If `masked`, the third says which source positions are real.

    Encoder and decoder have two streams each, in reversible blocks, so that training keeps no
    activations of any block. Each half of a block reads the stream that was written last, and adds
    to the other one::

        encoder    a = a + Dropout(Attention(Norm(b)))            bidirectional
                   b = b + Dropout(FeedForward(Norm(a)))
        decoder    a = a + Dropout(Attention(Norm(b)))            causal
                   b = b + Dropout(CrossAttention(Norm(a), m))
                   a = a + Dropout(FeedForward(Norm(b)))          and a and b change places

    All decoder blocks read the memory m = Norm(a + b), made of the encoder's last streams; their
    gradients of m add up. A sum is half as wide as the concatenated streams, so keys, values, m and
    its gradient cost half as much. The head reads the decoder's two streams, concatenated.

    In ``PREDICT`` the decoder takes one or more next inputs, and gives what ``EVAL`` gives. It gets
    the whole source each time; the encoder reads it at the first call only (`Once`). The sublayers
    can be applied by themselves: ``encoder``: (source[, mask]) → m, and ``decoder``:
    (inputs, m[, mask]) → its two streams, which ``head`` concatenates.

    Args:
      vocab_size: V, of the source.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of the default attention layers; it must divide `d_model`.
      max_len: the longest sequence on either side; it sets the number of buckets.
      dropout: the rate on the embeddings and on what each half of a block adds.
      encoder_attention: a layer, or several that alternate over depth; with `masked` they must take
        a mask, as ``tl.SelfAttention(8, causal=False, masked=True)`` does. By default bidirectional
        `LSHSelfAttention`.
      decoder_attention: a layer, or several that alternate over depth, causal and without a mask.
        By default causal `LSHSelfAttention`.
      target_vocab_size: of the decoder's inputs and logits; by default V.
      masked: whether a third input (B, M) boolean says which positions of the source are real.
      cross_attention: (B, L, D), (B, M, D)[, (B, M)] → (B, L, D); by default `CrossAttention`.
      n_hashes, chunk_len: of the default attention layers, as in `ReformerLM`.
      activation, positions, axial_shape, axial_depths, norm, ff_chunk_len: as in `ReformerLM`, on
        either side.

    Returns:
      A layer with ``n_in = 2 + masked``, whose parts are ``encoder``, ``decoder`` and ``head``.

    Raises:
      ValueError: as `ReformerLM`; if an attention layer does not take the inputs it gets, such as a
        missing mask; or if the decoder's attention is not causal.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451

    >>> Reformer(256, 64, 128, 2, 2, n_heads=4, max_len=1024, masked=True).n_in
    3
    """
    lsh = functools.partial(
        tl.LSHSelfAttention, n_heads, n_hashes=n_hashes, chunk_len=chunk_len, max_len=max_len
    )
    look = lsh(causal=False, masked=masked) if encoder_attention is None else encoder_attention
    back = lsh() if decoder_attention is None else decoder_attention
    across = cross_attention or tl.CrossAttention(n_heads, masked=masked)
    rotary = rotary_positions(positions, max_len)
    looks = with_positions(attention_pattern(look, n_encoder_layers), max_len, rotary)
    backs = with_positions(attention_pattern(back, n_decoder_layers), max_len, rotary)
    _check_attention(looks, backs, across, masked)

    half = functools.partial(reversible_half, norm, dropout=dropout, chunk_len=ff_chunk_len)
    dense = feed_forward(d_ff, d_model, activation, None)
    feed = reversible_feed_forward(norm, dense, dropout, ff_chunk_len)
    reading = [[half(layer), feed] for layer in looks]
    writing = [[half(layer), half(across), feed] for layer in backs]

    place = reformer_positions(positions, max_len, axial_shape, axial_depths)
    source = two_streams(vocab_size, d_model, place, dropout)
    n_target = vocab_size if target_vocab_size is None else target_vocab_size
    target = two_streams(n_target, d_model, place, dropout)
    return _reading_and_writing(
        _encoder(source, reversible_blocks(reading, n_encoder_layers), norm, masked),
        _decoder(target, reversible_blocks(writing, n_decoder_layers), masked),
        tl.Serial(tl.Concatenate(), norm, tl.Dense(n_target), name='head'),
        masked,
    )


def _reading_and_writing(
    encoder: tl.Layer, decoder: tl.Layer, head: tl.Layer, masked: bool
) -> tl.Serial:
    """(source, inputs[, mask]) → logits: a decoder that attends to what an encoder made."""
    return tl.Serial(
        tl.Select((0, 2, 1, 2)) if masked else None,  # source, mask, inputs, mask
        tl.Once(encoder),
        tl.Swap(),  # inputs, memory[, mask]
        decoder,
        head,
    )


def _encoder(
    streams: tuple[tl.Layer | None, ...], blocks: tl.Layer, norm: tl.Layer, masked: bool
) -> tl.Serial:
    """(source[, mask]) → the memory, the norm of the sum of both streams."""
    return tl.Serial(
        streams,
        blocks,
        tl.Add(),
        norm.replace(name='norm'),
        tl.Select((0,), n_in=2) if masked else None,
        name='encoder',
    )


def _decoder(streams: tuple[tl.Layer | None, ...], blocks: tl.Layer, masked: bool) -> tl.Serial:
    """(inputs, memory[, mask]) → both streams."""
    return tl.Serial(streams, blocks, tl.Select((0, 1), n_in=3 + masked), name='decoder')


def _check_attention(
    looks: Sequence[tl.Layer], backs: Sequence[tl.Layer], across: tl.Layer, masked: bool
) -> None:
    """Raises a ValueError unless all attention layers take the inputs they get."""
    check_arity('Reformer', 'encoder_attention', looks, 1, masked)
    check_arity('Reformer', 'decoder_attention', backs, 1, False)
    check_arity('Reformer', 'cross_attention', (across,), 2, masked)
    refuse_looking_ahead('Reformer', backs)


def check_arity(
    owner: str, argument: str, pattern: Sequence[tl.Layer], n_values: int, masked: bool
) -> None:
    """Raises a ValueError unless each layer takes so many inputs and gives one output.

    Args:
      owner: the name of the model, for messages.
      argument: the name of its argument, for messages.
      pattern: the layers.
      n_values: how many inputs there are, without the mask.
      masked: whether there is a mask as last input.
    """
    for layer in pattern:
        if (layer.n_in, layer.n_out) != (n_values + masked, 1):
            there = f'{n_values + masked} in and 1 out'
            raise ValueError(
                f'{owner}: {argument}: {type(layer).__name__} has {layer.n_in} in and '
                f'{layer.n_out} out and stands where {there} are: make it with masked={masked}'
            )


def refuse_looking_ahead(owner: str, pattern: Sequence[tl.Layer]) -> None:
    """Raises a ValueError if a layer, or a layer inside it, has ``causal=False``.

    Args:
      owner: the name of the model, for messages.
      pattern: the attention layers of its decoder.
    """
    for _, layer in (found for given in pattern for found in walk(given)):
        if getattr(layer, 'causal', True) is False:
            raise ValueError(
                f'{owner}: decoder_attention: {type(layer).__name__} with causal=False sees the '
                'tokens that it should predict: make it with causal=True'
            )
