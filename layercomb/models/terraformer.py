"""The Terraformer: reversible blocks, LSH or full attention, and sparse layers throughout."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import Size, checked
from layercomb.layers.attention.lsh.seek import set_positions
from layercomb.layers.core.counted import after_memory, put_counted, take_counted
from layercomb.layers.core.layer import Arrays
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.caches import BEFORE
from layercomb.layers.decoding.once import run_once
from layercomb.layers.positions.position import check_length, init_position, next_positions
from layercomb.models.reformer import (
    reformer_positions,
    reversible_blocks,
    reversible_feed_forward,
    reversible_half,
    two_streams,
)
from layercomb.models.reformer_seq2seq import check_arity, refuse_looking_ahead
from layercomb.models.transformer import (
    attention_pattern,
    feed_forward,
    rotary_positions,
    with_positions,
)
from layercomb.shapes import shape_dtype
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree

Attention = tl.Layer | Sequence[tl.Layer] | None


@checked
def TerraformerLM(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 2048,
    dropout: float = 0.0,
    attention: Attention = None,
    *,
    ff_block_size: int | None = 64,
    qkv_modules: int | None = 16,
    head_modules: int | None = 4,
    kernel_size: tuple[int, int] = (3, 3),
    d_lowrank: int | None = None,
    d_sru: int | None = None,
    activation: str = 'relu',
    positions: str = 'rotary',
    axial_shape: tuple[int, int] | None = None,
    axial_depths: tuple[int, int] | None = None,
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: int | None = None,
) -> tl.Serial:
    """A sparse, reversible language model: token ids (B, L) → logits (B, L, vocab_size).

    The blocks of `ReformerLM`, whose parts are sparse, each unless it is switched off by None::

        x₁ = x₁ + Dropout(SparseQKVAttention(Norm(x₂)))
        x₂ = x₂ + Dropout(SparseFF(Norm(x₁)))
        logits = MultiplicativeHead(Norm(x₁, x₂))

    With ``ff_block_size=None, qkv_modules=None, head_modules=None`` it is the dense model of the
    same shape.

    Args:
      vocab_size: V.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_layers: how many blocks.
      n_heads: of the default attention; it must divide `d_model`.
      max_len: the longest sequence.
      dropout: the rate on the embeddings and on what each half of a block adds.
      attention: a self-attention layer, or several that alternate over depth; by default causal
        `SelfAttention`. For long sequences give ``tl.LSHSelfAttention(n_heads)``. Its projections
        become sparse.
      ff_block_size: N of `SparseFF`, which must divide `d_ff`; None for a dense feed-forward.
      qkv_modules: S of `SparseQKVAttention`, which must divide `d_model`; None for dense
        projections.
      head_modules: S of `MultiplicativeHead`; None for a dense head.
      kernel_size: of the attention's convolution, over positions and modules.
      d_lowrank: the rank of the controllers; None takes `SparseFF`'s own.
      d_sru: if given, an `SRU` so wide takes the place of each feed-forward, whatever `d_ff`,
        `ff_block_size`, `d_lowrank` and `activation` say.
      activation: of the feed-forwards, a name.
      positions: 'rotary' (put into the attention layers), 'axial', 'learned', 'sinusoidal' or
        'none'.
      axial_shape, axial_depths: as in `ReformerLM`.
      norm: the normalization.
      ff_chunk_len: positions that a feed-forward and a norm take at a time; None takes all.

    Returns:
      ``Serial(embedding, positions, Dup, ReversibleRepeat(block), head)``.

    Raises:
      ValueError: if sizes do not divide each other, naming the nearest that do; as `ReformerLM`.

    References:
      Jaszczur et al. 2021, https://arxiv.org/abs/2111.12763

    >>> TerraformerLM(256, 64, 128, 2, 4, 32, ff_block_size=16, qkv_modules=4).n_out
    1
    """
    default = tl.SelfAttention(n_heads) if attention is None else attention
    pattern = with_positions(
        attention_pattern(default, n_layers), max_len, rotary_positions(positions, max_len)
    )
    pattern = sparse_projections(pattern, qkv_modules, kernel_size)
    feed = sparse_feed_forward(
        norm, d_ff, d_model, activation, dropout, ff_chunk_len, ff_block_size, d_lowrank, d_sru
    )
    blocks = [[reversible_half(norm, layer, dropout, ff_chunk_len), feed] for layer in pattern]
    place = reformer_positions(positions, max_len, axial_shape, axial_depths)
    return tl.Serial(
        two_streams(vocab_size, d_model, place, dropout),
        reversible_blocks(blocks, n_layers),
        tl.Serial(tl.Concatenate(), norm, sparse_head(vocab_size, head_modules), name='head'),
    )


@checked
def Terraformer(
    vocab_size: int,
    d_model: int = 512,
    d_ff: int = 2048,
    n_encoder_layers: int = 6,
    n_decoder_layers: int = 6,
    n_heads: int = 8,
    max_len: int = 2048,
    dropout: float = 0.0,
    encoder_attention: Attention = None,
    decoder_attention: Attention = None,
    *,
    target_vocab_size: int | None = None,
    target_max_len: int | None = None,
    masked: bool = False,
    ff_block_size: int | None = 64,
    qkv_modules: int | None = 16,
    head_modules: int | None = 4,
    kernel_size: tuple[int, int] = (3, 3),
    d_lowrank: int | None = None,
    d_sru: int | None = None,
    activation: str = 'relu',
    positions: str = 'rotary',
    norm: tl.Layer = tl.LayerNorm(),
    ff_chunk_len: int | None = None,
) -> tl.Serial:
    """From sequence to sequence: tokens (B, M) and (B, L) → logits (B, L, target_vocab_size).

    The first input is the source, the second what the decoder has said before each position (the
    target moved by one), the third, if `masked`, says which positions of the source are real.

    The encoder's two streams, through blocks as in `TerraformerLM` with bidirectional attention,
    add up to the memory. The decoder has no attention of its own for it: it reads one sequence, the
    memory and behind it the embedded inputs, with causal self-attention, and the head reads what
    comes out at the inputs.

    In ``PREDICT`` the decoder takes its next inputs, many or one, and gives what ``EVAL`` gives. It
    is handed the whole source each time, which encoder and decoder read at the first call alone.

    Args:
      vocab_size: V, of the source.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of attention where a default is taken; it must divide `d_model`.
      max_len: the longest source.
      dropout: the rate on the embeddings and on what each half of a block adds.
      encoder_attention: a self-attention layer, or several that alternate over depth; with `masked`
        they must take a mask. By default bidirectional `SelfAttention`. Projections become sparse.
      decoder_attention: the same, causal; with `masked` it takes a mask too. By default causal
        `SelfAttention`.
      target_vocab_size: of the decoder's inputs and logits; by default V.
      target_max_len: the longest input of the decoder; by default `max_len`.
      masked: whether a third input (B, M) boolean says which positions of the source are real;
        others, which should end a row, change nothing by what they hold, and the memory is moved to
        where the inputs begin. How many they are, the first real positions of the memory see
        through the convolution of sparse projections.
      ff_block_size, qkv_modules, head_modules, kernel_size, d_lowrank, d_sru: what is sparse, on
        either side; as in `TerraformerLM`.
      activation, norm, ff_chunk_len: as in `TerraformerLM`.
      positions: as in `TerraformerLM`; the joined sequence is counted through by 'rotary', and by
        others each side for itself.

    Returns:
      A layer with ``n_in = 2 + masked``, whose parts are ``encoder``, ``embedding``, ``decoder``
      and ``head``.

    Raises:
      ValueError: as `TerraformerLM`; if an attention layer takes a mask where there is none, or
        none where there is; or if the decoder's sees later positions.

    References:
      Jaszczur et al. 2021, section 4, https://arxiv.org/abs/2111.12763

    >>> Terraformer(256, 64, 128, 2, 2, 4, 32, masked=True, ff_block_size=16, qkv_modules=4).n_in
    3
    """
    n_target = vocab_size if target_vocab_size is None else target_vocab_size
    target_len = max_len if target_max_len is None else target_max_len
    look = tl.SelfAttention(n_heads, causal=False, masked=masked)
    back = tl.SelfAttention(n_heads, masked=masked)
    sides = []
    for argument, given, default, n_layers, longest in (
        ('encoder_attention', encoder_attention, look, n_encoder_layers, max_len),
        ('decoder_attention', decoder_attention, back, n_decoder_layers, max_len + target_len),
    ):
        pattern = attention_pattern(default if given is None else given, n_layers)
        check_arity('Terraformer', argument, pattern, 1, masked)
        pattern = with_positions(pattern, longest, rotary_positions(positions, longest))
        sides.append(sparse_projections(pattern, qkv_modules, kernel_size))
    encoding, decoding = sides
    refuse_looking_ahead('Terraformer', decoding)
    half = functools.partial(reversible_half, norm, dropout=dropout, chunk_len=ff_chunk_len)
    feed = sparse_feed_forward(
        norm, d_ff, d_model, activation, dropout, ff_chunk_len, ff_block_size, d_lowrank, d_sru
    )
    place = functools.partial(reformer_positions, positions, shape=None, depths=None)
    encoder = tl.Serial(
        two_streams(vocab_size, d_model, place(max_len), dropout),
        reversible_blocks([[half(layer), feed] for layer in encoding], n_encoder_layers),
        tl.Add(),
        tl.Select((0,), n_in=2) if masked else None,
        name='encoder',
    )
    *embedding, dup = two_streams(n_target, d_model, place(target_len), dropout)
    decoder = tl.Serial(
        dup,
        reversible_blocks([[half(layer), feed] for layer in decoding], n_decoder_layers),
        tl.Select((0, 1), n_in=2 + masked),
        name='decoder',
    )
    return tl.Serial(
        tl.Select((0, 2, 1, 2)) if masked else None,  # source, mask, inputs, mask
        tl.Once(encoder),
        tl.Swap(),
        tl.Serial(*embedding, name='embedding'),
        tl.Swap(),  # memory, embedded inputs[, mask]
        AfterMemory(decoder, masked=masked, max_len=target_len),
        tl.Serial(tl.Concatenate(), norm, sparse_head(n_target, head_modules), name='head'),
    )


class AfterMemory(Wrapper):
    """A causal layer that reads a memory and then its inputs, as one sequence.

    (memory (B, M, D), x (B, L, D)[, mask (B, M)]) → what the layer puts out at the positions of x,
    each (B, L, …). The layer takes the joined sequence and, if `masked`, the joined mask. What is
    masked is made 0 and moved to the beginning, so that the memory ends where the inputs begin.

    In ``PREDICT`` the memory is read at the first call, and the state says that it has been. Rows
    have positions of their own, counted from the first input.

    Attributes:
      masked: whether a third input says which positions of the memory are real.
      max_len: the most inputs that are taken, the memory aside; None takes any number.
    """

    carries_counted = True

    masked: bool = False
    max_len: Size | None = None

    n_in = property(lambda self: 2 + self.masked)
    mixes_positions = True

    def inner_signature(self, signature):
        """Of the joined sequence and, if `masked`, the joined mask."""
        memory, x, *_ = signature
        length = memory.shape[1] + x.shape[1]
        joined = shape_dtype((x.shape[0], length, x.shape[2]), x.dtype)
        return (joined, *[shape_dtype((x.shape[0], length), bool)] * self.masked)

    def init(self, signature, rng, mode=Mode.TRAIN):
        """The layer's weights; its caches are as long as both sequences."""
        memory, x, *_ = signature
        check_length('AfterMemory', x.shape[1], self.max_len)
        weights, state = self.layer.init(self.inner_signature(signature), rng, mode)
        if mode is Mode.PREDICT:
            before = jnp.full(x.shape[0], memory.shape[1], jnp.int32)
            state = {'layer': state, 'has_memory': jnp.zeros((), bool), BEFORE: before}
            state |= init_position((x,), mode)
        return weights, state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """The layer on the joined sequence, or in ``PREDICT`` on what follows."""
        memory, x, *mask = inputs
        _, state = next_positions(self, state, x.shape[1], mode)
        if mask:
            memory, mask[0] = _at_the_end(memory, mask[0])
        real = [jnp.ones(x.shape[:2], bool)] * self.masked
        if mode is Mode.PREDICT:
            return self._extend(weights, state, (memory, *mask), (x, *real))
        state, counted = take_counted(state)
        before = mask[0] if mask else jnp.ones(memory.shape[:2], bool)
        state = put_counted(state, after_memory(counted, before, x.shape[:2]))
        joined = [
            jnp.concatenate(pair, 1) for pair in zip((memory, *mask), (x, *real), strict=True)
        ]
        outputs, state = self.layer.apply(weights, state, tuple(joined), rng=rng, mode=mode)
        return tuple(y[:, memory.shape[1] :] for y in outputs), state

    def _extend(
        self, weights: Tree, state: Tree, memory: Arrays, values: Arrays
    ) -> tuple[Arrays, Tree]:
        def read(inner: Tree) -> Tree:
            inner = set_positions(inner, jnp.zeros(len(memory[0]), jnp.int32))
            return self.layer.apply(weights, inner, memory, mode=Mode.PREDICT)[1]

        inner = run_once(state['has_memory'], state['layer'], read)
        outputs, inner = self.layer.apply(weights, inner, values, mode=Mode.PREDICT)
        return outputs, {**state, 'layer': inner, 'has_memory': jnp.ones((), bool)}


def _at_the_end(memory: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is real moved to the end of each row, in its order, and zeros before it."""
    order = jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)  # False is before True
    mask = jnp.take_along_axis(mask, order, 1)
    moved = jnp.take_along_axis(memory, order[..., None], 1)
    return jnp.where(mask[..., None], moved, 0), mask


def sparse_projections(
    pattern: Sequence[tl.Layer], n_modules: int | None, kernel_size: tuple[int, int]
) -> tuple[tl.Layer, ...]:
    """The attention layers, wrapped ones too, with sparse projections, if `n_modules` says so.

    Raises:
      TypeError: if there is none in a layer of the pattern.
    """
    if n_modules is None:
        return tuple(pattern)
    known = (tl.SelfAttention, tl.LocalSelfAttention, tl.LSHSelfAttention, tl.SparseQKVAttention)
    found: list[tl.Layer] = []

    def make(layer: tl.Layer) -> tl.Layer:
        if not isinstance(layer, known):
            return layer
        found.append(layer)
        return tl.sparse_qkv(layer, n_modules, kernel_size)

    made = []
    for layer in pattern:
        found.clear()
        made.append(rewrite(layer, make))
        if not found:
            raise TypeError(
                f'qkv_modules={n_modules}: {type(layer).__name__} has no projections that could be '
                'sparse: give a SelfAttention, LocalSelfAttention or LSHSelfAttention, or '
                'qkv_modules=None'
            )
    return tuple(made)


def sparse_feed_forward(
    norm: tl.Layer,
    d_ff: int,
    d_model: int,
    activation: str,
    dropout: float,
    chunk_len: int | None,
    block_size: int | None,
    d_lowrank: int | None,
    d_sru: int | None,
) -> tl.ReversibleHalfResidual:
    """The half of a block that is a sparse feed-forward, a dense one, or an SRU."""
    if d_sru is not None:
        sru = tl.Serial(tl.Dense(d_sru), tl.SRU(), tl.Dense(d_model), name='sru')
        return reversible_half(norm, sru, dropout, chunk_len)
    if block_size is None:
        dense = feed_forward(d_ff, d_model, activation, None)
        return reversible_feed_forward(norm, dense, dropout, chunk_len)
    sparse = tl.SparseFF(d_ff, block_size, d_lowrank=d_lowrank, activation=activation)
    return reversible_feed_forward(norm, sparse, dropout, chunk_len)


def sparse_head(vocab_size: int, n_modules: int | None) -> tl.Layer:
    """What makes logits: multiplicative, or dense if `n_modules` is None."""
    if n_modules is None:
        return tl.Dense(vocab_size)
    return tl.MultiplicativeHead(vocab_size, n_modules)
