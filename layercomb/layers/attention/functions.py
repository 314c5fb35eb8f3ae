"""Exact attention as array functions, in memory linear in the length.

Arguments and results are arrays (B, H, L, K): batch, heads, length, depth of a head. Keys and
values may have fewer heads, G, which H/G heads of queries each share (grouped-query attention). The
layers that use the functions are in `layers`; the computation is in `flash` and `local`.

References:
  GQA (Ainslie et al., 2023), https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.layers.attention import distances, tiles
from layercomb.layers.attention import flash as blockwise
from layercomb.layers.attention import local as chunkwise
from layercomb.layers.facts.sequence import sequence_parts
from layercomb.layers.quantized.native import attends_natively, has_kernels, with_kernel
from layercomb.shapes import check_mask, nearest_divisor


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    offset: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
    block_len: int | None = None,
) -> jax.Array:
    """Softmax attention, block by block: no (Lq, Lk) matrix exists, forward or backward.

    ::

        y[t] = Σ_c p[t, c] v[c]      p[t, ·] = softmax of scale · q[t]·k[c] over the visible c

    Head h of q reads head ⌊h·G/H⌋ of k and v.
    A causal query at position t sees the keys 0 … t, or t − window + 1 … t with a window. Blocks
    that no query sees are not computed, so with a window time is linear in the length.
    Scores and sums are float32 for any input dtype. On an NVIDIA GPU, cuDNN's kernel is used where
    dtypes and depths allow it. A single query is computed against all keys at once, unless there is
    dropout.

    Args:
      q: (B, H, Lq, K), floating.
      k: (B, G, Lk, K); G divides H.
      v: (B, G, Lk, D); D need not be K.
      causal: whether a query sees only keys at its own position and before.
      window: how many keys a query sees at most, its own position included; causal only. None for
        all.
      mask: (B, Lk) bool, True = a real key. A query that sees no real key gives zeros.
      segments: (B, L) int32, of a sequence to itself: the document of each position. A query sees
        keys of its own document alone, and blocks that hold none of it are not computed if
        documents stand one after the other.
      offset: (B,) int32: query t of row b is at position offset[b] + t, the keys are at 0, 1, …;
        zero by default. Decoding uses it: few queries against a cache of keys.
      scale: factor of the scores, 1/√K by default.
      softcap: c > 0, which makes scores s, after the scale, c·tanh(s / c); None for no cap.
      bias: (2R + 1, H), added to the scores by distance: a key d positions after the query gets
        bias[d + R], −R and R standing for all farther ones; `RelativeBias` makes it.
      dropout_rate: share of the probabilities set to zero, in [0, 1); the others grow by
        1 / (1 − dropout_rate).
      rng: a typed key for dropout, needed if the rate is not zero.
      block_len: longest block of queries and of keys wanted; chosen by default.

    Returns:
      (B, H, Lq, D), in the dtype of v.

    Raises:
      ValueError: if shapes, dtypes or the rate do not fit together.

    >>> q = jnp.ones((1, 2, 5, 8))
    >>> dot_product_attention(q, q, q, causal=True).shape
    (1, 2, 5, 8)

    References:
      FlashAttention (Dao et al., 2022), https://arxiv.org/abs/2205.14135
    """
    check(q, k, v, mask, offset, dropout_rate, rng)
    check_segments(segments, q, k, offset)
    check_window(window, causal)
    if window is not None and offset is None and window >= q.shape[2]:
        window = None  # no query is so far from the first key
    rng = rng if dropout_rate else None
    plan = plan_of(
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias,
        dropout_rate=dropout_rate, block_len=block_len,
    )  # fmt: skip
    if q.shape[2] == 1 and rng is None:
        return one_query(plan, q, k, v, mask, offset, bias)
    added = softcap, window, mask, segments, offset, rng, bias
    if all(x is None for x in added) and cudnn_applies(q, k, v, causal):
        return cudnn_attention(q, k, v, causal, plan.scale)
    return blockwise.attend(plan, q, k, v, mask, offset, rng, bias, segments)


def plan_of(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    dropout_rate: float = 0.0,
    block_len: int | None = None,
) -> blockwise.Plan:
    """How `flash` computes a call of `dot_product_attention`, whose arguments these are.

    Raises:
      ValueError: if the cap or the bias does not fit.
    """
    check_softcap(softcap)
    if bias is not None:
        distances.check_bias(bias, q.shape[1])
    return blockwise.Plan(
        n_queries=q.shape[2],
        n_keys=k.shape[2],
        q_block=even_block(q.shape[2], block_len or tiles.block_len()),
        k_block=even_block(k.shape[2], block_len or tiles.block_len()),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=bool(causal),
        dropout_rate=dropout_rate,
        softcap=softcap,
        group=q.shape[1] // max(k.shape[1], 1),
        window=window,
        native=bias is None and not dropout_rate and attends_natively(q, k, v),
    )


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    chunk_len: int,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = True,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
    neighbours: bool = False,
) -> jax.Array:
    """Softmax attention of each chunk to itself and its neighbours: linear in the length.

    With C = chunk_len, a query at position t sees these of the existing keys c::

        (⌊t/C⌋ − look_back)·C  ≤  c  ≤  t                                    causal
        (⌊t/C⌋ − look_back)·C  ≤  c  <  (⌊t/C⌋ + 1 + look_ahead)·C           not causal

    Args:
      q: (B, H, L, K), floating.
      k: (B, G, L, K); G divides H, as in `dot_product_attention`.
      v: (B, G, L, D).
      chunk_len: positions in a chunk; the length need not be a multiple.
      look_back: chunks seen before a query's own.
      look_ahead: chunks seen after it; 0 where causal.
      causal: whether a query sees only keys at its own position and before.
      mask: (B, L) bool, True = a real key. A query that sees no real key gives zeros.
      segments: (B, L) int32, the document of each position: a query sees keys of its own document
        alone, whose chunks are counted from its beginning. It does not decrease along a row.
      scale: factor of the scores, 1/√K by default.
      softcap: as of `dot_product_attention`.
      dropout_rate: as of `dot_product_attention`.
      rng: a typed key for dropout, needed if the rate is not zero.
      neighbours: whether devices split the sequence into parts of whole chunks, of which the arrays
        are one; windows then reach into the parts of others, as `facts.sequence` finds them.

    Returns:
      (B, H, L, D), in the dtype of v.

    Raises:
      ValueError: if shapes, dtypes or sizes do not fit together.
    """
    check(q, k, v, mask, None, dropout_rate, rng)
    check_segments(segments, q, k)
    check_softcap(softcap)
    check_chunks(q, k, chunk_len, look_back, look_ahead, causal)
    rng = rng if dropout_rate else None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    reach, more = (look_back, look_ahead), segments is not None
    # Chunks of documents begin anywhere: a window a chunk longer holds all that a query sees.
    look_back, look_ahead = look_back + more, look_ahead + (more and not causal)
    pairs = chunk_len * chunk_len * (look_back + 1 + look_ahead)
    n_chunks = -(-q.shape[2] // chunk_len)
    n_whole = n_chunks * (sequence_parts() if neighbours else 1)
    chunks = chunkwise.Plan(
        length=q.shape[2],
        chunk_len=chunk_len,
        look_back=min(look_back, n_whole - 1),
        look_ahead=min(look_ahead, n_whole - 1),
        n_together=tiles.even_share(n_chunks, tiles.pairs_in_tile() // pairs),
        scale=scale,
        causal=causal,
        dropout_rate=dropout_rate,
        softcap=softcap,
        group=q.shape[1] // max(k.shape[1], 1),
        reach=reach,
        neighbours=neighbours,
    )
    return chunkwise.attend(chunks, q, k, v, mask, rng, segments)


def even_block(length: int, block_len: int) -> int:
    """The block length that splits `length` most evenly into the fewest blocks.

    Args:
      length: positions to split.
      block_len: the longest block wanted.

    Returns:
      `length` if one block holds it, else a multiple of 16, which may exceed `block_len`.
    """
    n_blocks = -(-length // block_len)
    if n_blocks <= 1:
        return max(1, length)
    return -(-length // (16 * n_blocks)) * 16


def one_query(
    plan: blockwise.Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    offset: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Attention of one query per row to all keys at once, without dropout.

    Args:
      plan: the static description; the sizes of its blocks do not matter.
      q: (B, H, 1, K), floating.
      k: (B, G, Lk, K).
      v: (B, G, Lk, D).
      mask: (B, Lk) bool, True = a real key; or None.
      offset: (B,) int32, the query's position; None for 0.
      bias: as of `dot_product_attention`.

    Returns:
      (B, H, 1, D), in the dtype of v; zero where the query sees no key.
    """
    n_keys, softcap = k.shape[2], plan.softcap
    whole = dataclasses.replace(plan, q_block=1, k_block=n_keys)
    start = jnp.zeros((1,), jnp.int32) if offset is None else offset
    seen = jax.vmap(lambda t: blockwise.visible(whole, 0, 0, None, t)[0])(start)  # (B or 1, Lk)
    seen = seen[:, None] if mask is None else (seen & mask)[:, None]  # (B or 1, 1, Lk)
    q_1 = q[:, :, 0].astype(jnp.float32) * plan.scale  # (B, H, K)
    if bias is None and has_kernels(1, q_1, k, v):  # a kernel reads no key after the last seen one
        seen = jnp.broadcast_to(seen[:, 0], (len(q), n_keys))
        return _fast_attend(softcap)(q_1, k, v, seen)[:, :, None]  # (B, H, 1, D)
    added = None if bias is None else distances.of_one_query(bias, start, n_keys)
    p = _probabilities(q_1, k, seen, softcap, added)
    return _dot_shared('bhc,bhcd->bhd', p, v)[:, :, None].astype(v.dtype)  # (B, H, 1, D)


def _dot_shared(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`tiles.dot` of x (B, H, n) and y (B, G, …), of which H/G heads of x share each head."""
    (b, h, n), g = x.shape, y.shape[1]
    if h == g:
        return tiles.dot(spec, x, y)
    apart = x.reshape(b, g, h // g, n)
    out = jax.vmap(functools.partial(tiles.dot, spec), (2, None), 2)(apart, y)
    return out.reshape(b, h, out.shape[-1])  # (B, G, H/G, …) → (B, H, …)


def _probabilities(
    q: jax.Array,
    k: jax.Array,
    seen: jax.Array,
    softcap: float | None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Probabilities (B, H, Lk): q (B, H, K), k (B, G, Lk, K), seen (B or 1, 1, Lk) bool.

    A bias is (B or 1, H, Lk), added to the scores.
    """
    scores = tiles.capped(_dot_shared('bhk,bhck->bhc', q, k), softcap)
    scores = scores if bias is None else scores + bias
    scores = jnp.where(seen, scores, -tiles.FAR)
    p = jnp.exp(scores - scores.max(-1, keepdims=True, initial=-tiles.FAR))
    p = jnp.where(seen, p, 0.0)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1.0)


@functools.cache
def _fast_attend(softcap: float | None) -> Callable[..., jax.Array]:
    """Attention of queries (B, H, K) to the seen keys, (B, Lk) bool → (B, H, D)."""

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        return _dot_shared('bhc,bhcd->bhd', _probabilities(q, k, seen[:, None], softcap), v)

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))  # (B, H, …) → (B·H, …)
        y = layercomb_kernels.query_attention(q, k, v, seen, softcap)
        return y.reshape(len(seen), -1, v.shape[-1])  # (B, H, D)

    return with_kernel(plain, by_kernel)


@functools.cache
def has_cudnn() -> bool:
    """Whether JAX runs on an NVIDIA GPU that has cuDNN attention (Ampere or later)."""
    if jax.default_backend() != 'gpu':
        return False
    device = jax.local_devices()[0]
    return 'NVIDIA' in device.device_kind and float(device.compute_capability) >= 8


def cudnn_applies(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> bool:
    """Whether cuDNN's kernel computes this call.

    It needs one 16-bit dtype, one depth for keys and values (a multiple of 8, up to 128) and, if
    causal, equal lengths.

    Args:
      q: (B, H, Lq, K).
      k: (B, G, Lk, K).
      v: (B, G, Lk, D).
      causal: whether a query sees only keys at its own position and before.
    """
    narrow = q.dtype in (jnp.float16, jnp.bfloat16) and q.dtype == k.dtype == v.dtype
    depth = q.shape[-1]
    fits = depth == v.shape[-1] and depth % 8 == 0 and depth <= 128
    return narrow and fits and (not causal or q.shape[2] == k.shape[2]) and has_cudnn()


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, scale: float
) -> jax.Array:
    """Attention by cuDNN, whose layout is (B, L, H, K).

    Args:
      q: (B, H, Lq, K).
      k: (B, G, Lk, K).
      v: (B, G, Lk, K).
      causal: whether a query sees only keys at its own position and before.
      scale: factor of the scores.

    Returns:
      (B, H, Lq, K), in the dtype of the arguments.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, L, H, K)
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation='cudnn')
    return y.swapaxes(1, 2)  # (B, H, L, D)


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    offset: jax.Array | None,
    dropout_rate: float,
    rng: jax.Array | None,
) -> None:
    """Checks the arguments of attention, as of `dot_product_attention`.

    Raises:
      ValueError: if shapes, dtypes, mask, offset or dropout rate do not fit together, or dropout
        has no key.
    """
    shapes = f'q {q.shape}, k {k.shape}, v {v.shape}'
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f'attention takes arrays (batch, heads, length, depth), got {shapes}')
    if not (len(q) == len(k) and k.shape[:2] == v.shape[:2]):
        raise ValueError(f'q, k and v must agree in batch, k and v in heads, got {shapes}')
    check_shared_heads(q.shape[1], k.shape[1], 'keys and values', shapes)
    if q.shape[3] != k.shape[3]:
        raise ValueError(f'q and k must have the same depth, got {shapes}')
    if not q.shape[2] or not k.shape[2]:
        raise ValueError(f'attention needs one position at least, got {shapes}')
    if k.shape[2] != v.shape[2]:
        raise ValueError(f'k and v must have the same length, got {shapes}')
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError(f'attention takes floats, got q {q.dtype}, k {k.dtype}, v {v.dtype}')
    if mask is not None:
        check_mask(mask, (k.shape[0], k.shape[2]))
    integer = offset is None or jnp.issubdtype(offset.dtype, jnp.integer)
    if offset is not None and not (integer and offset.shape == q.shape[:1]):
        raise ValueError(f'offset must be int32{q.shape[:1]}, got {offset.dtype}{offset.shape}')
    if not 0 <= dropout_rate < 1:
        raise ValueError(f'dropout_rate must be in [0, 1), got {dropout_rate}')
    if dropout_rate and rng is None:
        raise ValueError(f'dropout_rate={dropout_rate} needs a random key: pass rng=')


def check_segments(
    segments: jax.Array | None, q: jax.Array, k: jax.Array, offset: jax.Array | None = None
) -> None:
    """Checks the segments of attention, as of `dot_product_attention`.

    Raises:
      ValueError: if they are no int32 (B, L), or the attention is not of a sequence to itself.
    """
    if segments is None:
        return
    if q.shape[2] != k.shape[2] or offset is not None:
        raise ValueError(
            f'segments are of a sequence to itself, got q {q.shape}, k {k.shape}'
            f'{"" if offset is None else " and an offset"}: leave them out in decoding'
        )
    shape = (q.shape[0], q.shape[2])
    if segments.shape != shape or segments.dtype != jnp.int32:
        raise ValueError(
            f'segments must be int32{list(shape)}, the document of each position, got '
            f'{segments.dtype}{list(segments.shape)}'
        )


def check_window(window: int | None, causal: bool) -> None:
    """Checks the window of `dot_product_attention`.

    Raises:
      ValueError: if it is not positive, or the attention is not causal.
    """
    if window is None:
        return
    if operator.index(window) < 1:
        raise ValueError(f'window must be at least 1, got {window}')
    if not causal:
        raise ValueError(
            f'window={window} is of causal attention: pass causal=True, or use local attention, '
            'whose chunks see both ways'
        )


def check_shared_heads(n_heads: int, n_shared: int, which: str, shapes: str) -> None:
    """Raises ValueError unless each shared head is for a whole number of heads of queries.

    Args:
      n_heads: H, of queries.
      n_shared: G.
      which: what is shared.
      shapes: of the arguments, for the message.
    """
    if n_heads % max(n_shared, 1):
        raise ValueError(
            f'{n_shared} heads of {which} do not divide {n_heads} heads of queries: '
            f'use {nearest_divisor(n_heads, n_shared)}, got {shapes}'
        )


def check_softcap(softcap: float | None) -> None:
    """Raises ValueError unless softcap is None, or positive and finite."""
    if softcap is not None and not 0 < softcap < float('inf'):
        raise ValueError(f'softcap must be positive, got {softcap}: None is for no cap')


def check_chunks(
    q: jax.Array,
    k: jax.Array,
    chunk_len: int,
    look_back: int,
    look_ahead: int,
    causal: bool,
) -> None:
    """Checks the arguments of local attention, as of `local_attention`.

    Raises:
      ValueError: if a size is out of range, a causal call looks ahead, or q and k differ in length.
    """
    chunk_len, look_back, look_ahead = map(operator.index, (chunk_len, look_back, look_ahead))
    if chunk_len < 1 or look_back < 0 or look_ahead < 0:
        raise ValueError(
            'chunk_len must be positive, look_back and look_ahead not negative, '
            f'got {chunk_len}, {look_back} and {look_ahead}'
        )
    if causal and look_ahead:
        raise ValueError(f'look_ahead={look_ahead} looks into the future: pass causal=False')
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f'local attention is of a sequence to itself, got q {q.shape}, k {k.shape}'
        )
