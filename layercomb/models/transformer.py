"""The Transformer, as a language model and as an encoder for classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from layercomb import layers as tl
from layercomb.checks import ChunkLen, checked
from layercomb.shapes import nearest_multiple
from layercomb.transforms.rewriting import rewrite


@checked
def TransformerLM(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 2048,
    dropout: float = 0.0,
    attention: tl.Layer | Sequence[tl.Layer] | None = None,
    *,
    activation: str | tl.Layer = 'gelu',
    positions: str = 'learned',
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: ChunkLen | None = None,
    remat: bool = False,
    n_kv_heads: int | None = None,
    ff: tl.Layer | None = None,
) -> tl.Serial:
    """A decoder-only language model: token ids (B, L) → logits (B, L, vocab_size).

    Blocks are pre-norm::

        x = x + Dropout(Attention(Norm(x)))
        x = x + Dropout(FeedForward(Norm(x)))

    Args:
      vocab_size: V.
      d_model: D, the width of the stream.
      d_ff: the width inside the feed-forwards.
      n_layers: how many blocks.
      n_heads: of the default attention; it must divide `d_model`.
      max_len: the longest sequence.
      dropout: the rate on the embeddings and on what each sublayer adds.
      attention: a layer (B, L, D) → (B, L, D), or several that alternate over depth, e.g.
        ``(tl.LocalSelfAttention(8, 64), tl.SelfAttention(8))``; by default causal
        `SelfAttention`.
      activation: of the feed-forwards, a name or a layer.
      positions: 'learned', 'sinusoidal', 'rotary' (put into the attention layers) or 'none'.
      norm: the normalization.
      ff_chunk_len: how many positions a feed-forward takes at a time: a number, 'auto' for what
        suits the platform (see `Chunk`), or None for all.
      remat: whether the backward pass computes each block again, instead of keeping its
        activations.
      n_kv_heads: heads of keys and values of the default attention, which several heads of queries
        share; it must divide `n_heads`. None for as many.
      ff: the feed-forward, a layer (B, L, D) → (B, L, D) such as ``tl.MixtureFF(2048)``, in place
        of the dense one; `d_ff` and `activation` are then not used.

    Returns:
      ``Serial(embedding, positions, Repeat(block), norm, head)``.

    Raises:
      ValueError: if the attention pattern does not divide `n_layers`, for unknown positions, or for
        `n_kv_heads` beside `attention`.

    References:
      Radford et al., GPT-2, 2019.

    >>> TransformerLM(256, 64, 128, n_layers=2, n_heads=4, max_len=32).n_out
    1
    """
    if n_kv_heads is not None and attention is not None:
        raise ValueError(
            f'TransformerLM: n_kv_heads={n_kv_heads} is of the default attention: say it in the '
            'layer given as attention='
        )
    rotary = rotary_positions(positions, max_len)
    default = tl.SelfAttention(n_heads, n_kv_heads=n_kv_heads, rotary=rotary)
    pattern = attention_pattern(default if attention is None else attention, n_layers)
    pattern = with_positions(pattern, max_len, rotary)
    feed = feed_forward(d_ff, d_model, activation, ff_chunk_len, ff)
    block = [
        [
            residual(norm, layer, dropout),
            residual(norm, feed, dropout),
        ]
        for layer in pattern
    ]
    inner: tl.Layer = tl.Serial(*block, name='block')
    return tl.Serial(
        tl.Embedding(vocab_size, d_model, table_init=tl.Normal(0.02)),
        position_layer(positions, max_len),
        tl.Dropout(dropout) if dropout else None,
        tl.Repeat(tl.Remat(inner) if remat else inner, n_layers // len(pattern)),
        norm.replace(name='norm'),
        tl.Dense(vocab_size, name='head'),
    )


@checked
def TransformerEncoder(
    vocab_size: int,
    n_classes: int = 10,
    d_model: int = 512,
    d_ff: int = 2048,
    n_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 2048,
    dropout: float = 0.0,
    attention: tl.Layer | Sequence[tl.Layer] | None = None,
    *,
    masked: bool = False,
    activation: str | tl.Layer = 'gelu',
    positions: str = 'learned',
    norm: tl.Layer = tl.LayerNorm(),
) -> tl.Serial:
    """An encoder for classification: token ids (B, L) → logits (B, n_classes).

    It has the blocks of `TransformerLM` with bidirectional attention, then the mean over positions.

    Args:
      vocab_size: V.
      n_classes: the width of the logits.
      masked: whether a second input (B, L) boolean says which positions are real.
      attention: a layer, or several that alternate over depth; with `masked` they must take a
        mask, as ``tl.SelfAttention(8, causal=False, masked=True)`` does.
      d_model, d_ff, n_layers, n_heads, max_len, dropout: as in `TransformerLM`.
      activation, positions, norm: as in `TransformerLM`.

    Returns:
      A layer with ``n_in = 1 + masked``.

    Raises:
      ValueError: as `TransformerLM`.

    >>> TransformerEncoder(256, 2, 64, 128, 2, 4, 32, masked=True).n_in
    2
    """
    default = tl.SelfAttention(
        n_heads, causal=False, masked=masked, rotary=rotary_positions(positions, max_len)
    )
    pattern = attention_pattern(default if attention is None else attention, n_layers)
    pattern = with_positions(pattern, max_len, rotary_positions(positions, max_len))
    block = [
        [
            tl.Select((0, 1, 1)) if masked else None,
            residual(norm, layer, dropout),
            residual(norm, feed_forward(d_ff, d_model, activation, None), dropout),
        ]
        for layer in pattern
    ]
    return tl.Serial(
        tl.Embedding(vocab_size, d_model, table_init=tl.Normal(0.02)),
        position_layer(positions, max_len),
        tl.Dropout(dropout) if dropout else None,
        tl.Repeat(tl.Serial(*block, name='block'), n_layers // len(pattern)),
        norm.replace(name='norm'),
        tl.Mean(masked=masked),
        tl.Dense(n_classes, name='head'),
    )


def residual(norm: tl.Layer, layer: tl.Layer, dropout: float) -> tl.Residual:
    """x + Dropout(layer(norm(x))), with x (B, L, D).

    Args:
      norm: the normalization.
      layer: (B, L, D) → (B, L, D), or with a mask as second input.
      dropout: the rate on what the layer adds.
    """
    return tl.Residual(norm, layer, tl.Dropout(dropout) if dropout else None)


def feed_forward(
    d_ff: int,
    d_model: int,
    activation: str | tl.Layer,
    chunk_len: ChunkLen | None,
    given: tl.Layer | None = None,
) -> tl.Layer:
    """Dense to `d_ff`, an activation, and Dense back: (B, L, D) → (B, L, D).

    Args:
      d_ff: the width inside.
      d_model: D.
      activation: a name or a layer.
      chunk_len: how many positions are computed at a time; None takes all.
      given: a layer to take in its place; None for none.
    """
    layers = given
    if layers is None:
        layers = tl.Serial(
            tl.Dense(d_ff), tl.activation(activation), tl.Dense(d_model), name='feed_forward'
        )
    return layers if chunk_len is None else tl.Chunk(layers, chunk_len)


def position_layer(positions: str, max_len: int) -> tl.Layer | None:
    """The layer that adds positions to embeddings (B, L, D); None for kinds that add nothing.

    Args:
      positions: 'learned', 'sinusoidal', 'rotary' or 'none'.
      max_len: the longest sequence.

    Raises:
      ValueError: for an unknown kind, listing the known kinds.
    """
    kinds = {
        'learned': tl.LearnedPositions(max_len),
        'sinusoidal': tl.SinusoidalPositions(max_len=max_len),
        'rotary': None,
        'none': None,
    }
    if positions not in kinds:
        raise ValueError(f'no positions {positions!r}: there are {", ".join(kinds)}')
    return kinds[positions]


def rotary_positions(positions: str, max_len: int) -> tl.RotaryPositions | None:
    """The layer that rotates queries and keys, for 'rotary'; None for other kinds of positions."""
    return tl.RotaryPositions(max_len=max_len) if positions == 'rotary' else None


def with_positions(
    pattern: tuple[tl.Layer, ...], max_len: int, rotary: tl.RotaryPositions | None
) -> tuple[tl.Layer, ...]:
    """The attention layers, wrapped ones too, with `max_len` and `rotary` filled in.

    Layers with `needs_max_len`, such as LSH layers without ``n_buckets`` and ``max_len``, get
    `max_len`. Layers whose field ``rotary`` is None get `rotary`. Layers that attend to a memory
    are left alone: positions of two sequences have no distance.

    Args:
      pattern: the attention layers.
      max_len: the longest sequence.
      rotary: rotates queries and keys; None for no rotation.

    Raises:
      ValueError: if `rotary` is given and no layer takes it.
    """
    turned = []

    def tell(layer: tl.Layer) -> tl.Layer:
        if layer.needs_max_len:
            layer = layer.replace(max_len=max_len)
        can_turn = any(field.name == 'rotary' for field in dataclasses.fields(layer))
        if rotary is not None and can_turn and not layer.reads_memory:
            given: Any = layer
            layer = layer.replace(rotary=rotary) if given.rotary is None else layer
            turned.append(layer)
        return layer

    pattern = tuple(rewrite(layer, tell) for layer in pattern)
    if rotary is not None and not turned:
        raise ValueError(
            "positions='rotary': no layer of the attention pattern can turn queries and keys: use "
            "'learned' or another kind"
        )
    return pattern


def attention_pattern(
    attention: tl.Layer | Sequence[tl.Layer], n_layers: int
) -> tuple[tl.Layer, ...]:
    """The attention layers that alternate over depth, as a tuple.

    Args:
      attention: one layer, or several.
      n_layers: how many blocks the model has.

    Raises:
      ValueError: if there are no layers, or their number does not divide `n_layers`, naming the
        nearest multiple.
    """
    pattern = tuple(attention) if isinstance(attention, (list, tuple)) else (attention,)
    if not pattern:
        raise ValueError('attention is empty: give a layer, or several that alternate over depth')
    n = len(pattern)
    if n_layers % n or n_layers < 1:
        raise ValueError(
            f'n_layers={n_layers} is no multiple of the {n} attention layers of the pattern: use '
            f'{nearest_multiple(n_layers, n)}'
        )
    return pattern
