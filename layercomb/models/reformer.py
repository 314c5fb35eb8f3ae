"""The Reformer: reversible blocks, LSH attention, chunked feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence

from layercomb import layers as tl
from layercomb.checks import ChunkLen, checked
from layercomb.layers.positions.axial import nearest_grid
from layercomb.models.transformer import (
    attention_pattern,
    feed_forward,
    position_layer,
    rotary_positions,
    with_positions,
)


@checked
def ReformerLM(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 65536,
    dropout: float = 0.0,
    attention: tl.Layer | Sequence[tl.Layer] | None = None,
    *,
    n_hashes: int = 4,
    chunk_len: int = 64,
    activation: str | tl.Layer = 'gelu',
    positions: str = 'axial',
    axial_shape: tuple[int, int] | None = None,
    axial_depths: tuple[int, int] | None = None,
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: ChunkLen | None = 'auto',
    ff: tl.Layer | None = None,
) -> tl.Serial:
    """A language model of long sequences: token ids (B, L) → logits (B, L, vocab_size).

    Two streams start as the embeddings and pass through blocks that can be run backwards::

        x₁ = x₁ + Dropout(Attention(Norm(x₂)))
        x₂ = x₂ + Dropout(FeedForward(Norm(x₁)))

    Training keeps no activations of any block, so its memory does not grow with depth. The head
    reads both streams, concatenated.

    Args:
      vocab_size: V.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_layers: how many blocks.
      n_heads: of the default attention; it must divide `d_model`.
      max_len: the longest sequence. It sets the number of buckets. The length of an input does not,
        so a longer input changes no earlier output.
      dropout: the rate on the embeddings and on what each half of a block adds.
      attention: a layer (B, L, D) → (B, L, D), or several that alternate over depth, e.g.
        ``(tl.LocalSelfAttention(8, 64), tl.LSHSelfAttention(8))``; by default causal
        `LSHSelfAttention`. An LSH layer without ``n_buckets`` and ``max_len`` gets this `max_len`.
      n_hashes: hash rounds of the default attention.
      chunk_len: positions in a chunk of the default attention.
      activation: of the feed-forwards, a name or a layer.
      positions: 'axial', 'rotary' (put into the attention layers), 'learned', 'sinusoidal' or
        'none'.
      axial_shape: (rows, columns) of the grid of axial positions; it must cover `max_len`. By
        default powers of two, as nearly square as possible.
      axial_depths: how D is divided among its two axes; by default into halves.
      norm: the normalization.
      ff_chunk_len: positions that a feed-forward and a norm take at a time: a number, 'auto' for
        what suits the platform (see `Chunk`), or None for all.
      ff: the feed-forward, as in `TransformerLM`.

    Returns:
      ``Serial(embedding, positions, Dup, ReversibleRepeat(block), head)``. The head concatenates
      the streams, normalizes and projects, so that a chunked loss does all this in slices.

    Raises:
      ValueError: if the attention pattern does not divide `n_layers`, the axial shape does not
        cover `max_len`, or for unknown positions.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451

    >>> ReformerLM(256, 64, 128, n_layers=2, n_heads=4, max_len=1024).n_out
    1
    """
    default = tl.LSHSelfAttention(
        n_heads, n_hashes=n_hashes, chunk_len=chunk_len, max_len=max_len, dropout=0.0
    )
    pattern = attention_pattern(default if attention is None else attention, n_layers)
    pattern = with_positions(pattern, max_len, rotary_positions(positions, max_len))
    feed = feed_forward(d_ff, d_model, activation, None, ff)
    feed = reversible_feed_forward(norm, feed, dropout, ff_chunk_len)
    blocks = [[reversible_half(norm, layer, dropout, ff_chunk_len), feed] for layer in pattern]
    place = reformer_positions(positions, max_len, axial_shape, axial_depths)
    return tl.Serial(
        two_streams(vocab_size, d_model, place, dropout),
        reversible_blocks(blocks, n_layers),
        tl.Serial(tl.Concatenate(), norm, tl.Dense(vocab_size), name='head'),
    )


def two_streams(
    vocab_size: int, d_model: int, place: tl.Layer | None, dropout: float
) -> tuple[tl.Layer | None, ...]:
    """Layers that make two equal streams of tokens: embedding, positions, dropout, `Dup`.

    Token ids (B, L) → two streams (B, L, D).

    Args:
      vocab_size: V.
      d_model: D.
      place: adds positions; None for none.
      dropout: the rate on the embeddings.
    """
    embedding = tl.Embedding(vocab_size, d_model, table_init=tl.Normal(0.02))
    return embedding, place, tl.Dropout(dropout) if dropout else None, tl.Dup()


def reversible_half(
    norm: tl.Layer, layer: tl.Layer, dropout: float, chunk_len: ChunkLen | None
) -> tl.ReversibleHalfResidual:
    """(acc, x, *context) → (acc + Dropout(layer(norm(x), *context)), x, *context)."""
    norm = norm if chunk_len is None else tl.Chunk(norm, chunk_len)
    return tl.ReversibleHalfResidual(norm, layer, tl.Dropout(dropout) if dropout else None)


def reversible_feed_forward(
    norm: tl.Layer, feed: tl.Layer, dropout: float, chunk_len: ChunkLen | None
) -> tl.ReversibleHalfResidual:
    """The feed-forward half of a block: acc + Dropout(feed(norm(x))), norm and dropout in slices.

    Args:
      norm: the normalization.
      feed: a layer (B, L, D) → (B, L, D).
      dropout: the rate on what it adds.
      chunk_len: positions in a slice; None takes all at once.
    """
    layers = feed.sublayers if isinstance(feed, tl.Serial) else (feed,)
    drop = tl.Dropout(dropout) if dropout else None
    whole: tl.Layer = tl.Serial(norm, *layers, drop, name='feed_forward')
    return tl.ReversibleHalfResidual(whole if chunk_len is None else tl.Chunk(whole, chunk_len))


def reversible_blocks(
    blocks: Sequence[Sequence[tl.ReversibleHalfResidual]], n_layers: int
) -> tl.ReversibleRepeat:
    """Repeats blocks that alternate over depth.

    Each half adds to the stream that the half before it read.

    Args:
      blocks: the halves of each block, in order.
      n_layers: how many blocks in all, a multiple of those given.
    """
    halves = [half for block in blocks for half in block]
    layers = [layer for half in halves for layer in (half, tl.ReversibleSwap())]
    return tl.ReversibleRepeat(tl.ReversibleSerial(*layers, name='block'), n_layers // len(blocks))


def reformer_positions(
    positions: str, max_len: int, shape: tuple[int, int] | None, depths: tuple[int, int] | None
) -> tl.Layer | None:
    """The layer that adds positions to the embeddings: axial, or that of `position_layer`.

    Args:
      positions: 'axial', or a kind of `position_layer`.
      max_len: the longest sequence.
      shape: (rows, columns) of the axial grid, or None.
      depths: how D is divided among its two axes, or None.

    Raises:
      ValueError: for an unknown kind, or an axial shape that does not cover `max_len`.
    """
    if positions == 'axial':
        return axial_positions(max_len, shape, depths)
    return position_layer(positions, max_len)


def axial_positions(
    max_len: int, shape: tuple[int, int] | None, depths: tuple[int, int] | None
) -> tl.AxialPositions:
    """Axial positions for sequences of up to `max_len` positions.

    Args:
      max_len: the longest sequence.
      shape: (rows, columns) of the grid; None takes powers of two, as nearly square as possible.
      depths: how D is divided among its two axes; None takes halves.

    Raises:
      ValueError: if `shape` has fewer than `max_len` places.
    """
    grid = nearest_grid(max_len)
    layer = tl.AxialPositions(grid if shape is None else tuple(shape), depths)
    if layer.max_len < max_len:
        raise ValueError(
            f'axial_shape={layer.shape} covers {layer.max_len} positions, max_len is {max_len}: '
            f'use {grid}'
        )
    return layer
