"""Llama, and what decoders of its kind share.

Shape letters: B batch, L length, D d_model, H heads of queries, G heads of keys and values, K head
depth, F d_ff, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from layercomb import layers as tl
from layercomb.checks import ChunkLen, Fraction, NonNegative, Positive, Rate, Size, checked
from layercomb.transforms.tying import Tied


@checked
def Llama(
    vocab_size: Size,
    d_model: Size = 512,
    d_ff: Size = 1408,
    n_layers: Size = 6,
    n_heads: Size = 8,
    n_kv_heads: Size | None = None,
    max_len: Size = 2048,
    dropout: Rate = 0.0,
    *,
    d_head: Size | None = None,
    period: Positive = 10000.0,
    scaling: Any = None,
    share: Fraction = 1.0,
    window: Size | Sequence[Size | None] | None = None,
    epsilon: NonNegative = 1e-6,
    qkv_bias: bool = False,
    out_bias: bool = False,
    ff_bias: bool = False,
    qk_norm: bool = False,
    tied: bool = False,
    activation: str = 'silu',
    ff_chunk_len: ChunkLen | None = None,
    remat: bool = False,
) -> tl.Layer:
    """The decoder-only language model Llama: token ids (B, L) → logits (B, L, vocab_size).

    Blocks are pre-norm, with grouped-query attention, rotary positions and gated feed-forwards::

        x = x + Dropout(Attention(RMSNorm(x)))
        x = x + Dropout(Dense(act(h W_gate) · (h W_up))) where h = RMSNorm(x)

    Options make its relatives: Mistral has a `window`, SmolLM2 is `tied`, `Qwen2` has `qkv_bias`,
    `Qwen3` has `qk_norm`.

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
      period: of the rotary positions.
      scaling: of the rotary positions, e.g. `tl.Llama3Scaling`; None for none.
      share: part of the features of a head that rotary positions turn.
      window: how many positions a query sees, itself included; None for all before it. A sequence
        alternates over depth, and `n_layers` need not be a multiple of its length.
      epsilon: of the norms.
      qkv_bias, out_bias, ff_bias: whether the projections of queries, keys and values, the one back
        from heads, and the feed-forwards have biases.
      qk_norm: whether queries and keys are normalized, head by head, before they are rotated.
      tied: whether the head is the transposed table of the embedding.
      activation: of the gates.
      ff_chunk_len: how many positions a feed-forward takes at a time: a number, 'auto' for what
        suits the platform (see `Chunk`), or None for all.
      remat: whether the backward pass computes each block again, instead of keeping its
        activations.

    Returns:
      ``Serial(embedding, Repeat(block), norm, head)``, inside `transforms.Tied` if `tied`.

    Raises:
      ValueError: if heads do not divide, or an argument is out of its range.

    References:
      Touvron et al. 2023, https://arxiv.org/abs/2302.13971
      Jiang et al., Mistral 7B, 2023, https://arxiv.org/abs/2310.06825

    >>> Llama(256, 64, 128, n_layers=2, n_heads=4, n_kv_heads=2, max_len=32).n_out
    1
    """
    norm = tl.RMSNorm(epsilon, name='norm')

    def block(window: int | None) -> tl.Serial:  # (B, L, D) → (B, L, D)
        attention = grouped_attention(
            (d_model, n_heads, n_kv_heads, d_head),
            window=window,
            biases=(qkv_bias, out_bias),
            norm=tl.RMSNorm(epsilon) if qk_norm else None,
            rotary=tl.RotaryPositions(period, max_len, scaling=scaling, share=share),
        )
        feed_forward = gated_feed_forward(d_ff, d_model, activation, ff_bias)
        return decoder_block(attention, feed_forward, norm, dropout, ff_chunk_len)

    return decoder(
        tl.Embedding(vocab_size, d_model, tl.Normal(0.02)),  # (B, L) → (B, L, D)
        [block(each) for each in over_depth(window, n_layers)],
        norm,  # (B, L, D) → (B, L, D)
        tl.Dense(vocab_size, use_bias=False, name='head'),  # (B, L, D) → (B, L, V)
        dropout=dropout,
        tied=tied,
        remat=remat,
    )


def grouped_attention(
    sizes: tuple[int, int, int | None, int | None],
    *,
    window: int | None,
    biases: tuple[bool, bool],
    norm: tl.Layer | None,
    rotary: tl.Layer,
    **options: Any,
) -> tl.SelfAttention:
    """Attention with q (B, H, L, K), k and v (B, G, L, K): (B, L, D) → (B, L, D).

    Args:
      sizes: D, H, G, K; None for G = H, and for K = D / H.
      window: how many positions a query sees; None for all before it.
      biases: of the projections to heads, and of the one back.
      norm: of queries and keys; None for none.
      rotary: their positions.
      **options: other fields of `SelfAttention`.
    """
    d_model, n_heads, n_kv_heads, d_head = sizes
    return tl.SelfAttention(
        n_heads,
        n_kv_heads=None if n_kv_heads == n_heads else n_kv_heads,
        d_head=None if d_head is None or d_head * n_heads == d_model else d_head,
        qkv_bias=biases[0],
        out_bias=biases[1],
        query_norm=norm,
        key_norm=norm,
        window=window,
        rotary=rotary,
        **options,
    )


def gated_feed_forward(
    d_ff: int, d_model: int, activation: str, use_bias: bool = False
) -> tuple[tl.Layer, ...]:
    """The layers of a gated feed-forward, (B, L, D) → (B, L, F) → (B, L, D).

    Args:
      d_ff: F.
      d_model: D.
      activation: of the gate.
      use_bias: whether all three matrices have biases.
    """
    return tl.GatedDense(d_ff, activation, use_bias), tl.Dense(d_model, use_bias)


def decoder_block(
    attention: tl.Layer,
    feed_forward: Sequence[tl.Layer],
    norm: tl.Layer,
    dropout: float = 0.0,
    ff_chunk_len: ChunkLen | None = None,
    *,
    after: tl.Layer | None = None,
) -> tl.Serial:
    """x + attention(norm(x)), then the same with the feed-forward: (B, L, D) → (B, L, D).

    Paths are ``attention/norm``, ``attention/self_attention``, ``feed_forward/norm``,
    ``feed_forward/gated_dense`` and ``feed_forward/dense``.

    Args:
      attention: (B, L, D) → (B, L, D).
      feed_forward: layers in series, (B, L, D) → (B, L, D).
      norm: before both.
      dropout: the rate on what each of the two adds.
      ff_chunk_len: how many positions the feed-forward takes at a time: a number, 'auto' for what
        suits the platform (see `Chunk`), or None for all.
      after: a norm of what each of the two adds; None for none.
    """
    last = (after, tl.Dropout(dropout) if dropout else None)
    second: tl.Layer = tl.Residual(norm, *feed_forward, *last, name='feed_forward')
    return tl.Serial(
        tl.Residual(norm, attention, *last, name='attention'),
        second if ff_chunk_len is None else tl.Chunk(second, ff_chunk_len),
        name='block',
    )


def decoder(
    embedding: tl.Layer,
    blocks: Sequence[tl.Layer],
    norm: tl.Layer,
    head: tl.Layer,
    *,
    dropout: float = 0.0,
    tied: bool = False,
    remat: bool = False,
) -> tl.Layer:
    """A language model of blocks: token ids (B, L) → logits (B, L, V).

    Args:
      embedding: (B, L) → (B, L, D), with a weight ``table`` (V, D).
      blocks: one for each layer, (B, L, D) → (B, L, D). Equal ones are scanned.
      norm: before the head.
      head: (B, L, D) → (B, L, V).
      dropout: the rate on the embeddings.
      tied: whether the kernel of the head is the transposed table of the embedding.
      remat: whether the backward pass computes each block again.
    """
    net = tl.Serial(
        embedding,
        tl.Dropout(dropout) if dropout else None,
        *in_depth(blocks, remat),
        norm,
        head,
    )
    if not tied:
        return net
    kernel = 'head/kernel' if isinstance(head, tl.Dense) else 'head/dense/kernel'
    return Tied(net, 'embedding/table', kernel, jnp.transpose)


def over_depth(given: Any, n_layers: int) -> list[Any]:
    """One value for each layer.

    Args:
      given: a value for all layers, or a sequence of values that alternate over depth.
      n_layers: how many layers there are; it need not be a multiple of the sequence's length.

    Raises:
      ValueError: if the sequence is empty.

    >>> over_depth(8, 2), over_depth((8, 8, None), 4)
    ([8, 8], [8, 8, None, 8])
    """
    pattern = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not pattern:
        raise ValueError('window is empty: give a number of positions, or several that alternate')
    return list(itertools.islice(itertools.cycle(pattern), n_layers))


def in_depth(blocks: Sequence[tl.Layer], remat: bool = False) -> list[tl.Repeat]:
    """Blocks in series, those that are alike or alternate as a `Repeat`.

    The first `Repeat` is named ``block``, the next ``block_1`` and so on. If blocks alternate, each
    has its number in the pattern as name: ``block/0``, ``block/1``. `places` tells the paths.

    Args:
      blocks: one for each layer; equal ones share a scan.
      remat: whether the backward pass computes each block again.
    """
    made = []
    for i, (first, period, n) in enumerate(_runs(blocks)):
        pattern, name = blocks[first : first + period], _name(i)
        inner: tl.Layer = (
            pattern[0].replace(name=name)
            if period == 1
            else tl.Serial(*[b.replace(name=str(j)) for j, b in enumerate(pattern)], name=name)
        )
        made.append(tl.Repeat(tl.Remat(inner) if remat else inner, n))
    return made


def places(kinds: Sequence[Any]) -> Iterator[tuple[str, range]]:
    """Where `in_depth` puts blocks: the path of each, and the numbers of the layers stacked there.

    Args:
      kinds: one value for each layer, equal where the blocks are.

    >>> list(places('aaaa')), list(places('aab'))
    ([('block', range(0, 4))], [('block', range(0, 2)), ('block_1', range(2, 3))])
    >>> list(places('ababa'))
    [('block/0', range(0, 3, 2)), ('block/1', range(1, 4, 2)), ('block_1', range(4, 5))]
    """
    for i, (first, period, n) in enumerate(_runs(kinds)):
        for j in range(period):
            path = _name(i) if period == 1 else f'{_name(i)}/{j}'
            yield path, range(first + j, first + j + (n - 1) * period + 1, period)


def _runs(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """The first layer, the period and the number of repeats of each `Repeat`."""
    length = len(kinds)
    for period in range(1, length // 2 + 1):
        if all(kinds[i] == kinds[i % period] for i in range(length)):
            n = length // period
            rest = n * period
            return [(0, period, n), *((rest + i, 1, m) for i, m in _alike(kinds[rest:]))]
    return [(i, 1, n) for i, n in _alike(kinds)]


def _alike(kinds: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Start and length of each run of equal values."""
    at = 0
    for _, run in itertools.groupby(kinds):
        n = len(list(run))
        yield at, n
        at += n


def _name(i: int) -> str:
    return f'block_{i}' if i else 'block'
