"""The Terraformer: reversible blocks, LSH or full attention, and sparse layers throughout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import ChunkLen, Size, checked
from layercomb.layers.core.layer import Arrays, Key
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.once import run_once
from layercomb.layers.decoding.seek import Position, Seekable, held, seek
from layercomb.layers.positions.position import check_length, check_next
from layercomb.layers.sparse.attention import is_self_attention
from layercomb.layers.state.counted import after_memory, put_counted, take_counted
from layercomb.layers.state.parts import WHOLE
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
from layercomb.shapes import Signature, shape_dtype
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
    ff_chunk_len: ChunkLen | None = None,
    ff: tl.Layer | None = None,
) -> tl.Serial:
    """A sparse, reversible language model: token ids (B, L) → logits (B, L, vocab_size).

    It has the blocks of `ReformerLM` with sparse parts; None switches a part off::

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
        `SelfAttention`. For long sequences give ``tl.HashedSelfAttention(n_heads)``. Its
        projections become sparse.
      ff_block_size: N of `SparseFF`, which must divide `d_ff`; None for a dense feed-forward.
      qkv_modules: S of `SparseQKVAttention`, which must divide `d_model`; None for dense
        projections.
      head_modules: S of `MultiplicativeHead`; None for a dense head.
      kernel_size: of the attention's convolution, over positions and modules.
      d_lowrank: the rank of the controllers; None takes `SparseFF`'s own.
      d_sru: the width of an `SRU` that replaces each feed-forward; `d_ff`, `ff_block_size`,
        `d_lowrank` and `activation` are then not used. None for feed-forwards.
      activation: of the feed-forwards, a name.
      positions: 'rotary' (put into the attention layers), 'axial', 'learned', 'sinusoidal' or
        'none'.
      axial_shape, axial_depths: as in `ReformerLM`.
      norm: the normalization.
      ff_chunk_len: positions that a feed-forward and a norm take at a time: a number, 'auto' for
        what suits the platform (see `Chunk`), or None for all.
      ff: the feed-forward, a layer (B, L, D) → (B, L, D) such as ``tl.MixtureFF(2048)``, in place
        of `SparseFF`; `d_ff`, `ff_block_size`, `d_lowrank` and `activation` are then not used.

    Returns:
      ``Serial(embedding, positions, Dup, ReversibleRepeat(block), head)``.

    Raises:
      ValueError: if sizes do not divide each other, naming the nearest that do; if `d_sru` and `ff`
        are both given; and as `ReformerLM`.

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
        norm, d_ff, d_model, activation, dropout, ff_chunk_len, ff_block_size, d_lowrank, d_sru, ff
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
    ff_chunk_len: ChunkLen | None = None,
    ff: tl.Layer | None = None,
) -> tl.Serial:
    """From sequence to sequence: tokens (B, M) and (B, L) → logits (B, L, target_vocab_size).

    The first input is the source. The second is the target moved by one: what the decoder has
    written before each position. If `masked`, the third says which source positions are real.

    The encoder has the blocks of `TerraformerLM` with bidirectional attention; the memory is the
    sum of its two streams. The decoder has no cross-attention: it reads one sequence, the memory
    followed by the embedded inputs, with causal self-attention. The head reads the outputs at the
    inputs' positions.

    In ``PREDICT`` the decoder takes one or more next inputs, and gives what ``EVAL`` gives. It gets
    the whole source each time; encoder and decoder read it at the first call only.

    Args:
      vocab_size: V, of the source.
      d_model: D, the width of each stream.
      d_ff: the width inside the feed-forwards.
      n_encoder_layers: how many blocks encode.
      n_decoder_layers: how many decode.
      n_heads: of the default attention layers; it must divide `d_model`.
      max_len: the longest source.
      dropout: the rate on the embeddings and on what each half of a block adds.
      encoder_attention: a self-attention layer, or several that alternate over depth; with `masked`
        they must take a mask. By default bidirectional `SelfAttention`. Projections become sparse.
      decoder_attention: likewise for the decoder, causal; with `masked` it takes a mask too. By
        default causal `SelfAttention`.
      target_vocab_size: of the decoder's inputs and logits; by default V.
      target_max_len: the longest input of the decoder; by default `max_len`.
      masked: whether a third input (B, M) boolean says which positions of the source are real.
        Padding should be at the end of a row; the memory is moved so that it ends where the inputs
        begin. The contents of padding change nothing. The convolution of sparse projections does
        see, at the first real positions, that padding is there.
      ff_block_size, qkv_modules, head_modules, kernel_size, d_lowrank, d_sru: what is sparse, on
        either side; as in `TerraformerLM`.
      activation, norm, ff_chunk_len, ff: as in `TerraformerLM`.
      positions: as in `TerraformerLM`. 'rotary' counts through the joined sequence; other kinds
        count source and inputs separately.

    Returns:
      A layer with ``n_in = 2 + masked``, whose parts are ``encoder``, ``embedding``, ``decoder``
      and ``head``.

    Raises:
      ValueError: as `TerraformerLM`; if an attention layer does not take the inputs it gets, such
        as a missing mask; or if the decoder's attention is not causal.

    References:
      Jaszczur et al. 2021, section 4, https://arxiv.org/abs/2111.12763

    >>> Terraformer(256, 64, 128, 2, 2, 4, 32, masked=True, ff_block_size=16, qkv_modules=4).n_in
    3
    """
    n_target = vocab_size if target_vocab_size is None else target_vocab_size
    target_len = max_len if target_max_len is None else target_max_len
    side = functools.partial(_attention, n_heads, positions, masked, qkv_modules, kernel_size)
    looks = side('encoder_attention', encoder_attention, n_encoder_layers, max_len)
    backs = side('decoder_attention', decoder_attention, n_decoder_layers, max_len + target_len)
    refuse_looking_ahead('Terraformer', backs)

    half = functools.partial(reversible_half, norm, dropout=dropout, chunk_len=ff_chunk_len)
    feed = sparse_feed_forward(
        norm, d_ff, d_model, activation, dropout, ff_chunk_len, ff_block_size, d_lowrank, d_sru, ff
    )
    reading = reversible_blocks([[half(layer), feed] for layer in looks], n_encoder_layers)
    writing = reversible_blocks([[half(layer), feed] for layer in backs], n_decoder_layers)

    place = functools.partial(reformer_positions, positions, shape=None, depths=None)
    *embedding, dup = two_streams(n_target, d_model, place(target_len), dropout)
    decoder = tl.Serial(dup, writing, tl.Select((0, 1), n_in=2 + masked), name='decoder')
    return _reading_and_writing(
        _encoder(two_streams(vocab_size, d_model, place(max_len), dropout), reading, masked),
        tl.Serial(*embedding, name='embedding'),
        AfterMemory(decoder, masked=masked, max_len=target_len),
        tl.Serial(tl.Concatenate(), norm, sparse_head(n_target, head_modules), name='head'),
        masked,
    )


def _reading_and_writing(
    encoder: tl.Layer, embedding: tl.Layer, decoder: tl.Layer, head: tl.Layer, masked: bool
) -> tl.Serial:
    """(source, inputs[, mask]) → logits: a decoder that reads what an encoder made first."""
    return tl.Serial(
        tl.Select((0, 2, 1, 2)) if masked else None,  # source, mask, inputs, mask
        tl.Once(encoder),
        tl.Swap(),
        embedding,
        tl.Swap(),  # memory, embedded inputs[, mask]
        decoder,
        head,
    )


class Reading(Seekable):
    """The state in ``PREDICT`` of a layer that reads a memory before its inputs.

    Attributes:
      layer: the state of the layer inside, whose positions include the memory's.
      has_memory: () bool, whether the memory has been read.
      before: (B,) int32, the length of the memory.
      position: the position of each row, counted from the first input.
    """

    layer: Tree
    has_memory: jax.Array
    before: jax.Array
    position: Position

    def seek(self, lengths: jax.Array) -> Reading:
        """Moves each row to another input position.

        Args:
          lengths: (B,) int32, counted from the first input; the layer inside also counts the
            memory.
        """
        return self.replace(
            layer=seek(self.layer, lengths + self.before), position=self.position.seek(lengths)
        )


def _encoder(streams: tuple[tl.Layer | None, ...], blocks: tl.Layer, masked: bool) -> tl.Serial:
    """(source[, mask]) → the memory, the sum of both streams."""
    drop_mask = tl.Select((0,), n_in=2) if masked else None
    return tl.Serial(streams, blocks, tl.Add(), drop_mask, name='encoder')


def _attention(
    n_heads: int,
    positions: str,
    masked: bool,
    n_modules: int | None,
    kernel_size: tuple[int, int],
    argument: str,
    given: Attention,
    n_layers: int,
    longest: int,
) -> tuple[tl.Layer, ...]:
    """The attention layers of one side, told of positions, with sparse projections.

    Raises:
      ValueError: as `Terraformer`, naming its argument.
    """
    default = tl.SelfAttention(n_heads, causal=argument == 'decoder_attention', masked=masked)
    pattern = attention_pattern(default if given is None else given, n_layers)
    check_arity('Terraformer', argument, pattern, 1, masked)
    pattern = with_positions(pattern, longest, rotary_positions(positions, longest))
    return sparse_projections(pattern, n_modules, kernel_size)


class AfterMemory(Wrapper):
    """A causal layer that reads a memory and then its inputs, as one sequence.

    (memory (B, M, D), x (B, L, D)[, mask (B, M)]) → the layer's outputs at the positions of x, each
    (B, L, …). The layer takes the joined sequence and, if `masked`, the joined mask. Masked
    positions of the memory become 0 and move to the beginning, so that the memory ends where the
    inputs begin.

    In ``PREDICT`` the memory is read at the first call only. Each row has its own position, counted
    from the first input.

    Attributes:
      layer: the causal layer.
      masked: whether a third input, boolean, says which positions of the memory are real.
      max_len: the most positions of x; None for any number.
    """

    carries_counted = True

    masked: bool = False
    max_len: Size | None = None

    n_in = property(lambda self: 2 + self.masked)
    position_wise = False

    def inner_signature(self, signature: Signature) -> Signature:
        """The signature of the joined sequence and, if `masked`, of the joined mask."""
        memory, x, *_ = signature
        length = memory.shape[1] + x.shape[1]
        joined = shape_dtype((x.shape[0], length, x.shape[2]), x.dtype)
        return (joined, *[shape_dtype((x.shape[0], length), bool)] * self.masked)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """The layer's weights; its caches are as long as both sequences."""
        memory, x, *_ = signature
        check_length('AfterMemory', x.shape[1], self.max_len)
        weights, state = self.layer.init(self.inner_signature(signature), rng, mode)
        if mode is Mode.PREDICT:
            before = jnp.full(x.shape[0], memory.shape[1], jnp.int32)
            position = Position.first(x.shape[0])
            return weights, Reading(state, jnp.zeros((), bool), before, position)
        return weights, state

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """Runs the layer on the joined sequence, or in ``PREDICT`` on the next inputs."""
        memory, x, *mask = inputs
        if mask:
            memory, mask[0] = _at_the_end(memory, mask[0])
        real = [jnp.ones(x.shape[:2], bool)] * self.masked
        if mode is Mode.PREDICT:
            return self._extend(weights, held(state, Reading), (memory, *mask), (x, *real))
        check_length('AfterMemory', x.shape[1], self.max_len)
        state, counted = take_counted(state)
        before = mask[0] if mask else jnp.ones(memory.shape[:2], bool)
        state = put_counted(state, after_memory(counted, before, x.shape[:2]))
        joined = [
            jnp.concatenate(pair, 1) for pair in zip((memory, *mask), (x, *real), strict=True)
        ]
        outputs, state = self.layer.apply(weights, state, tuple(joined), rng=rng, mode=mode)
        return tuple(y[:, memory.shape[1] :] for y in outputs), state

    def _extend(
        self, weights: Tree, state: Reading, memory: Arrays, values: Arrays
    ) -> tuple[Arrays, Reading]:
        length = values[0].shape[1]
        check_next(self, state.position, length)

        def read(inner: Tree) -> Tree:
            inner = seek(inner, jnp.zeros(len(memory[0]), jnp.int32))
            new = self.layer.apply(weights, inner, memory, mode=Mode.PREDICT)[1]
            return _as_far_as(inner, new)  # drops what `capture` adds: a loop keeps one structure

        inner = run_once(state.has_memory, state.layer, read)
        outputs, inner = self.layer.apply(weights, inner, values, mode=Mode.PREDICT)
        position = state.position.moved(length)
        return outputs, Reading(inner, jnp.ones((), bool), state.before, position)


def _as_far_as(like: Any, state: Any) -> Any:
    """The part of a state at paths that another state has."""
    if not isinstance(like, dict):
        return state.get(WHOLE, state) if isinstance(state, dict) else state
    return type(like)((key, _as_far_as(x, state[key])) for key, x in like.items())


def _at_the_end(memory: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves real positions to the end of each row, in order, with zeros before them."""
    order = jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)  # False is before True
    mask = jnp.take_along_axis(mask, order, 1)
    moved = jnp.take_along_axis(memory, order[..., None], 1)
    return jnp.where(mask[..., None], moved, 0), mask


def sparse_projections(
    pattern: Sequence[tl.Layer], n_modules: int | None, kernel_size: tuple[int, int]
) -> tuple[tl.Layer, ...]:
    """The attention layers, wrapped ones too, with sparse projections.

    Args:
      pattern: self-attention layers (B, L, D) → (B, L, D).
      n_modules: S of `SparseQKVAttention`; None leaves the layers as they are.
      kernel_size: (positions, modules) of its convolution.

    Raises:
      TypeError: if a layer of the pattern has no projections that can be sparse.
    """
    if n_modules is None:
        return tuple(pattern)
    found: list[tl.Layer] = []

    def make(layer: tl.Layer) -> tl.Layer:
        if not is_self_attention(layer):
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
                'sparse: give a SelfAttention, LocalSelfAttention or LSHSelfAttention, one with '
                'fields n_heads, core and rotary, or qkv_modules=None'
            )
    return tuple(made)


def sparse_feed_forward(
    norm: tl.Layer,
    d_ff: int,
    d_model: int,
    activation: str,
    dropout: float,
    chunk_len: ChunkLen | None,
    block_size: int | None,
    d_lowrank: int | None,
    d_sru: int | None,
    ff: tl.Layer | None = None,
) -> tl.ReversibleHalfResidual:
    """The feed-forward half of a block: sparse, dense or an SRU.

    Args:
      norm, dropout, chunk_len: as of `reversible_feed_forward`.
      d_ff, d_model, activation: the width inside, D, and a name.
      block_size: N of `SparseFF`; None for a dense feed-forward.
      d_lowrank: the rank of the controller; None takes `SparseFF`'s own.
      d_sru: the width of an SRU that replaces the feed-forward; None for none.
      ff: a layer to take in its place; None for none.

    Raises:
      ValueError: if `d_sru` and `ff` are both given.
    """
    if ff is not None and d_sru is not None:
        raise ValueError(f'd_sru={d_sru} and ff both replace the feed-forward: give one of them')
    if d_sru is not None:
        sru = tl.Serial(tl.Dense(d_sru), tl.SRU(), tl.Dense(d_model), name='sru')
        return reversible_half(norm, sru, dropout, chunk_len)
    if block_size is None or ff is not None:
        dense = feed_forward(d_ff, d_model, activation, None, ff)
        return reversible_feed_forward(norm, dense, dropout, chunk_len)
    sparse = tl.SparseFF(d_ff, block_size, d_lowrank=d_lowrank, activation=activation)
    return reversible_feed_forward(norm, sparse, dropout, chunk_len)


def sparse_head(vocab_size: int, n_modules: int | None) -> tl.Layer:
    """The layer that makes logits, (B, L, D) → (B, L, V).

    Args:
      vocab_size: V.
      n_modules: S of `MultiplicativeHead`; None for a `Dense`.
    """
    if n_modules is None:
        return tl.Dense(vocab_size)
    return tl.MultiplicativeHead(vocab_size, n_modules)
