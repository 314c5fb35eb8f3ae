"""The Reformer from sequence to sequence: an encoder and a decoder, both reversible."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from layercomb import layers as tl
from layercomb.checks import checked
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
    ff_chunk_len: int | None = 1024,
) -> tl.Serial:
    """From sequence to sequence: tokens (B, M) and (B, L) → logits (B, L, target_vocab_size).

    The first input is the source, the second what the decoder has said before each position (the
    target moved by one), the third, if `masked`, says which positions of the source are real.

    Encoder and decoder are two streams each, in blocks that can be run backwards, so that training
    keeps no activations of any block. Each half of a block reads the stream that was written last,
    and adds to the other one::

        encoder    a = a + Dropout(Attention(Norm(b)))            bidirectional
                   b = b + Dropout(FeedForward(Norm(a)))
        decoder    a = a + Dropout(Attention(Norm(b)))            causal
                   b = b + Dropout(CrossAttention(Norm(a), m))
                   a = a + Dropout(FeedForward(Norm(b)))          and a and b change places

    The memory m = Norm(a + b), of the encoder's last streams, is context of all decoder blocks, and
    their gradients of it add up. It is the sum and not the two joined, so that it is as wide as the
    decoder's streams: each block then makes keys and values at half the price, and what is held of
    m and of its gradient is half as large. The head reads the decoder's two streams, joined.

    In ``PREDICT`` the decoder takes its next inputs, many or one, and gives what ``EVAL`` gives. It
    is handed the whole source each time, which the encoder reads at the first call (`Once`). The
    sublayers can be applied by themselves: ``encoder``: (source[, mask]) → m, and ``decoder``:
    (inputs, m[, mask]) → its two streams, which ``head`` joins.

    Args:
      vocab_size: V, of the source.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of attention where a default is taken; it must divide `d_model`.
      max_len: the longest sequence on either side; the numbers of buckets follow from it.
      dropout: the rate on the embeddings and on what each half of a block adds.
      encoder_attention: a layer, or several that alternate over depth; with `masked` they must take
        a mask, as ``tl.SelfAttention(8, causal=False, masked=True)`` does. By default bidirectional
        `LSHSelfAttention`.
      decoder_attention: the same, causal and without a mask; by default causal `LSHSelfAttention`.
      target_vocab_size: of the decoder's inputs and logits; by default V.
      masked: whether a third input (B, M) boolean says which positions of the source are real.
      cross_attention: (B, L, D), (B, M, D)[, (B, M)] → (B, L, D); by default `CrossAttention`.
      n_hashes, chunk_len: of attention where a default is taken.
      activation, positions, axial_shape, axial_depths, norm, ff_chunk_len: as in `ReformerLM`, on
        either side.

    Returns:
      A layer with ``n_in = 2 + masked``, whose parts are ``encoder``, ``decoder`` and ``head``.

    Raises:
      ValueError: as `ReformerLM`; if an attention layer takes a mask where there is none, or none
        where there is; or if the decoder's sees later positions.

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
    """Raises a ValueError unless all attention layers take what they are handed."""
    check_arity('Reformer', 'encoder_attention', looks, 1, masked)
    check_arity('Reformer', 'decoder_attention', backs, 1, False)
    check_arity('Reformer', 'cross_attention', (across,), 2, masked)
    refuse_looking_ahead('Reformer', backs)


def check_arity(
    owner: str, argument: str, pattern: Sequence[tl.Layer], n_values: int, masked: bool
) -> None:
    """Raises a ValueError unless each layer takes the values there are, and the mask if any."""
    for layer in pattern:
        if (layer.n_in, layer.n_out) != (n_values + masked, 1):
            there = f'{n_values + masked} in and 1 out'
            raise ValueError(
                f'{owner}: {argument}: {type(layer).__name__} has {layer.n_in} in and '
                f'{layer.n_out} out and stands where {there} are: make it with masked={masked}'
            )


def refuse_looking_ahead(owner: str, pattern: Sequence[tl.Layer]) -> None:
    """Raises a ValueError if a layer, or one inside, says that it is not causal."""
    for _, layer in (found for given in pattern for found in walk(given)):
        if getattr(layer, 'causal', True) is False:
            raise ValueError(
                f'{owner}: decoder_attention: {type(layer).__name__} with causal=False sees the '
                'tokens that it should predict: make it with causal=True'
            )
