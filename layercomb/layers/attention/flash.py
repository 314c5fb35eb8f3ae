"""Softmax attention of whole sequences, one block of queries by one block of keys at a time.

The forward pass visits the blocks of keys in turn. It keeps a running maximum m and sum ℓ for every
query (online softmax), and returns the output O and the logsumexp z = m + log ℓ. The backward pass
recomputes the probabilities of each block::

    P = exp(s·Q Kᵀ − z)    dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − Σ dO ∘ O)    dQ = s·dS K    dK = s·dSᵀ Q

Functions named `…_head` compute one head, on arrays cut into blocks; they are mapped over heads.
Shape letters: B batch, H heads of queries, G heads of keys and values, which R = H / G heads of
queries each share, K depth of queries and keys, D depth of values; Nq blocks of q queries, Nk
blocks of c keys.

References:
    FlashAttention (Dao et al., 2022), https://arxiv.org/abs/2205.14135
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import layercomb_kernels
from layercomb.layers.attention import distances, documents, tiles

# The places of k, v, mask, start and segments among the arguments of `forward_head` that `per_head`
# makes.
OF_KEYS = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of one call: which keys a query sees, and the sizes of the blocks.

    Attributes:
      n_queries: Lq, before padding.
      n_keys: Lk, before padding.
      q_block: queries in a block, q.
      k_block: keys in a block, c.
      scale: factor s of the scores.
      causal: whether a query sees only keys at its own position and before.
      dropout_rate: share of the probabilities set to zero.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
      group: R.
      window: how many keys a causal query sees at most, its own position included; None for all.
      native: whether `layercomb_kernels` computes it on a CPU; without bias and dropout only.
    """

    n_queries: int
    n_keys: int
    q_block: int
    k_block: int
    scale: float
    causal: bool = False
    dropout_rate: float = 0.0
    softcap: float | None = None
    group: int = 1
    window: int | None = None
    native: bool = False

    @property
    def sight(self) -> layercomb_kernels.Sight:
        """The same for `layercomb_kernels`, which chooses blocks of its own."""
        return layercomb_kernels.Sight(self.scale, self.causal, self.window, self.softcap)

    @property
    def n_q_blocks(self) -> int:
        """Number of blocks of queries, Nq; the last may be short."""
        return -(-self.n_queries // self.q_block)

    @property
    def n_k_blocks(self) -> int:
        """Number of blocks of keys, Nk; the last may be short."""
        return -(-self.n_keys // self.k_block)


def visible(plan: Plan, i: Any, j: Any, mask: Any, start: Any, segments: Any = None) -> jax.Array:
    """Which keys of block j each query of block i sees.

    Args:
      plan: the static description.
      i, j: numbers of the block of queries and the block of keys, int32 ().
      mask: (Nk, c) bool, True = a real key; or None.
      start: position of the first query, int32 ().
      segments: the document of each query (Nq, q) and key (Nk, c), int32; or None.

    Returns:
      (q, c) bool if causal or of segments, else (1, c), the same for all queries. Padding is never
      seen.
    """
    key = j * plan.k_block + jnp.arange(plan.k_block, dtype=jnp.int32)
    seen = (key < plan.n_keys)[None]  # (1, c)
    if mask is not None:
        seen = seen & mask[j][None]
    if plan.causal:
        query = start + i * plan.q_block + jnp.arange(plan.q_block, dtype=jnp.int32)[:, None]
        seen = seen & (key[None] <= query)
        if plan.window is not None:
            seen = seen & (key[None] > query - plan.window)
    if segments is not None:
        of_queries, of_keys = segments
        seen = seen & (of_queries[i][:, None] == of_keys[j][None])
    return seen


def key_blocks(
    plan: Plan, masked: bool, starts: tuple[Any, Any], i: Any, meets: Any = None
) -> tuple[Any, Any, Any]:
    """Which blocks of keys the i-th block of queries reads: (low, middle, high).

    Every query sees every key of the blocks from `low` up to `middle` (exclusive). Blocks from
    `middle` up to `high` (exclusive) need `visible`. No query sees any other block.

    Args:
      plan: the static description.
      masked: whether there is a mask; `middle` is then `low`, as it is with a window.
      starts: the least and the greatest position of a first query in the batch; the bounds hold for
        all rows.
      i: number of the block of queries.
      meets: the first block of keys that meets each block of queries, and the one after the last,
        as of `documents.meeting`; None for all.

    Returns:
      Three block numbers, Python integers where they are known, else int32 ().
    """
    low, middle, high = 0, 0 if masked else plan.n_keys // plan.k_block, plan.n_k_blocks
    if plan.causal:
        first = starts[0] + i * plan.q_block
        last = starts[1] + (i + 1) * plan.q_block - 1
        middle = middle and tiles.most(0, tiles.least(middle, (first + 1) // plan.k_block))
        high = tiles.least(high, last // plan.k_block + 1)
        if plan.window is not None:
            low = middle = tiles.most(0, (first + 1 - plan.window) // plan.k_block)
    if meets is not None:
        low = middle = tiles.most(low, meets[0][i])
        high = tiles.least(high, meets[1][i])
    return low, middle, high


def query_blocks(
    plan: Plan, masked: bool, starts: tuple[Any, Any], j: Any, meets: Any = None
) -> tuple[Any, Any, Any]:
    """Which blocks of queries see the j-th block of keys: (low, middle, high).

    Blocks from `low` up to `middle` (exclusive) need `visible`. Queries of the blocks from `middle`
    up to `high` (exclusive) see every key. No query of any other block sees a key.

    Args:
      plan, masked, starts: as of `key_blocks`.
      j: number of the block of keys.
      meets: the same as in `key_blocks`, of the blocks of queries that meet each block of keys.

    Returns:
      Three block numbers, Python integers where they are known, else int32 ().
    """
    low = middle = 0
    high = plan.n_q_blocks
    first, after = j * plan.k_block, (j + 1) * plan.k_block
    if plan.causal:
        low = tiles.least(tiles.most(0, (first - starts[1]) // plan.q_block), high)
        middle = -((starts[0] + 1 - after) // plan.q_block)
        middle = tiles.least(tiles.most(low, middle), high)
        if plan.window is not None:
            last = after - 2 + plan.window - starts[0]  # the last query that sees a key
            high = middle = tiles.least(tiles.most(low, last // plan.q_block + 1), high)
    n_whole = 0 if masked else plan.n_keys // plan.k_block
    if n_whole == 0:
        middle = high
    elif n_whole < plan.n_k_blocks:
        middle = jnp.where(j < n_whole, middle, high)  # type: ignore[assignment]
    if meets is not None:
        low = tiles.most(low, meets[0][j])
        high = middle = tiles.least(high, meets[1][j])
    return low, middle, high


def first_distance(plan: Plan, i: Any, j: Any, start: Any) -> Any:
    """The distance from the first query of block i to the first key of block j, int32 ()."""
    return j * plan.k_block - (start + i * plan.q_block)


def biased(plan: Plan, scores: jax.Array, bias: Any, i: Any, j: Any, start: Any) -> jax.Array:
    """The scores (q, c) of blocks i and j, with the bias of their distances if there is one."""
    if bias is None:
        return scores
    first = first_distance(plan, i, j, start)
    return scores + distances.of_block(bias, first, plan.q_block, plan.k_block)


def forward_head(
    plan: Plan,
    bounds: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    start: Any,
    segments: Any,
    rng: Any,
    bias: Any,
):
    """One head's output and logsumexp.

    Args:
      plan: the static description.
      bounds: the least and the greatest position of a first query in the batch; and which blocks
        meet, as of `documents.meeting`, or None.
      q: (Nq, q, K) float32, already times the scale.
      k: (Nk, c, K).
      v: (Nk, c, D).
      mask: (Nk, c) bool, or None.
      start: position of this row's first query, int32 ().
      segments: the document of each query (Nq, q) and key (Nk, c), int32; or None.
      rng: key of dropout, or None.
      bias: of the scores, for each distance, as of `distances.padded`; or None.

    Returns:
      The output (Nq, q, D) in the dtype of v, zero where a query sees no key; and z (Nq, q)
      float32, `tiles.FAR` where a query sees no key.
    """
    starts, meets = bounds
    masked = mask is not None or segments is not None

    def block(i, q_i, edge, j, carry):
        m, total, out = carry
        scores = tiles.capped(tiles.dot('qk,ck->qc', q_i, k[j]), plan.softcap)
        scores = biased(plan, scores, bias, i, j, start)
        if edge:
            seen = visible(plan, i, j, mask, start, segments)
            scores = jnp.where(seen, scores, -tiles.FAR)
        m_new = jnp.maximum(m, scores.max(1, keepdims=True))
        p = jnp.exp(scores - m_new)
        if edge:
            p = jnp.where(seen, p, 0.0)
        shrink = jnp.exp(m - m_new)
        total = total * shrink + p.sum(1, keepdims=True)
        p = tiles.drop(plan.dropout_rate, rng, i * plan.n_k_blocks + j, p)
        return m_new, total, out * shrink + tiles.dot('qc,cd->qd', p, v[j])

    def queries(_, i):
        q_i = q[i]
        low, middle, high = key_blocks(plan, masked, starts, i, meets and meets.of_queries)
        zeros = jnp.zeros((plan.q_block, 1), jnp.float32)
        carry = (zeros - tiles.FAR, zeros, jnp.zeros((plan.q_block, v.shape[-1]), jnp.float32))
        carry = tiles.loop(low, middle, functools.partial(block, i, q_i, False), carry)
        m, total, out = tiles.loop(middle, high, functools.partial(block, i, q_i, True), carry)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        z = jnp.where(some, m + jnp.log(total), tiles.FAR)[:, 0]
        return None, ((out / total).astype(v.dtype), z)

    return tiles.each(queries, None, plan.n_q_blocks)[1]


def backward_head(
    plan: Plan,
    bounds: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    start: Any,
    segments: Any,
    rng: Any,
    bias: Any,
    z: Any,
    d_out: Any,
    dot_out: Any,
):
    """One head's gradients, from the cotangent of its output.

    Args:
      plan, bounds, q, k, v, mask, start, segments, rng, bias: as of `forward_head`.
      z: (Nq, q) float32, the logsumexp.
      d_out: (Nq, q, D), cotangent of the output.
      dot_out: (Nq, q) float32, Σ dO ∘ O.

    Returns:
      Gradients of q (Nq, q, K) in float32, of k (Nk, K, c) and of v (Nk, D, c), both transposed,
      and in float32 if they are to be summed over a group; and of the bias, or None.
    """
    starts, meets = bounds
    masked = mask is not None or segments is not None
    dtypes = (k.dtype, v.dtype) if plan.group == 1 else (jnp.float32, jnp.float32)
    # Transpose once: on the CPU, products that contract the rows of both factors are slow.
    q_t, d_out_t = q.swapaxes(1, 2), d_out.swapaxes(1, 2)  # (Nq, K, q), (Nq, D, q)

    def block(j, edge, i, carry):
        (d_q, d_bias), d_k, d_v = carry
        number = i * plan.n_k_blocks + j
        scores = tiles.capped(tiles.dot('qk,ck->qc', q[i], k[j]), plan.softcap)
        p = jnp.exp(biased(plan, scores, bias, i, j, start) - z[i][:, None])
        if edge:
            p = jnp.where(visible(plan, i, j, mask, start, segments), p, 0.0)
        d_p = tiles.dot('qd,cd->qc', d_out[i], v[j])
        d_s = p * (tiles.drop(plan.dropout_rate, rng, number, d_p) - dot_out[i][:, None])
        if bias is not None:
            d_bias = distances.add_of_block(d_bias, d_s, first_distance(plan, i, j, start))
        d_s = tiles.uncapped(d_s, scores, plan.softcap)
        p = tiles.drop(plan.dropout_rate, rng, number, p)
        d_v = d_v + tiles.dot('dq,qc->dc', d_out_t[i], p)
        d_k = d_k + tiles.dot('kq,qc->kc', q_t[i], d_s)
        d_q_i = d_q[i] + tiles.dot('qc,ck->qk', d_s, k[j])
        return (lax.dynamic_update_index_in_dim(d_q, d_q_i, i, 0), d_bias), d_k, d_v

    def keys(sums, j):
        low, middle, high = query_blocks(plan, masked, starts, j, meets and meets.of_keys)
        d_k = jnp.zeros((k.shape[2], k.shape[1]), jnp.float32)
        d_v = jnp.zeros((v.shape[2], v.shape[1]), jnp.float32)
        carry = tiles.loop(low, middle, functools.partial(block, j, True), (sums, d_k, d_v))
        sums, d_k, d_v = tiles.loop(middle, high, functools.partial(block, j, False), carry)
        return sums, (d_k.astype(dtypes[0]), d_v.astype(dtypes[1]))

    zeros = jnp.zeros(q.shape, jnp.float32), None if bias is None else jnp.zeros_like(bias)
    (d_q, d_bias), (d_k, d_v) = tiles.each(keys, zeros, plan.n_k_blocks)
    return d_q * plan.scale, d_k, d_v, d_bias


def cut(x: jax.Array, block: int) -> jax.Array:
    """Cuts the length of x into blocks, and pads the last one with zeros.

    Args:
      x: (B, H, L, …).
      block: positions in a block, q.

    Returns:
      (B, H, ⌈L / q⌉, q, …).
    """
    n_blocks = -(-x.shape[2] // block)
    missing = n_blocks * block - x.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3)) if missing else x
    return x.reshape(*x.shape[:2], n_blocks, block, *x.shape[3:])  # (B, H, N, block, K)


def join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `cut`: (B, H, N, q, …) → (B, H, length, …), without the padding."""
    whole = x.shape[2] * x.shape[3]
    return x.reshape(*x.shape[:2], whole, *x.shape[4:])[:, :, :length]  # (B, H, L, K)


def per_head(
    plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: Any, bias: Any, segments: Any
) -> Any:
    """The arguments `bounds` and the rest of `forward_head`, with leading axes (B, G).

    Args:
      plan, q, k, v, mask, offset, rng, bias, segments: as of `attend`.

    Returns:
      `bounds`; and a tuple of q times the scale (B, G, Nq, q, K), k (B, G, Nk, c, K), v
      (B, G, Nk, c, D), mask (B, G, Nk, c) or None, start (B, G) int32, segments (B, G, Nq, q) and
      (B, G, Nk, c) or None, keys (B, G) or None, and bias (B, G, N + 2n) or None. If R is not 1, q,
      keys and bias have a third axis R.
    """
    n_rows, n_heads = k.shape[:2]
    starts: tuple[Any, Any] = (0, 0)
    start = jnp.zeros((n_rows, n_heads), jnp.int32)
    if offset is not None:
        starts = offset.min(), offset.max()
        start = jnp.broadcast_to(offset[:, None], (n_rows, n_heads))  # (B, G)
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (n_rows, n_heads, plan.n_keys))
        mask = cut(mask, plan.k_block)  # (B, G, Nk, c)
    meets = None
    if segments is not None:
        meets = documents.meeting(segments, plan.q_block, plan.k_block)
        segments = jnp.broadcast_to(segments[:, None], (n_rows, n_heads, plan.n_keys))
        segments = cut(segments, plan.q_block), cut(segments, plan.k_block)
    rng = tiles.split_group(tiles.key_per_head(rng, q.shape[:2]), plan.group)
    q = cut_queries(plan, q.astype(jnp.float32) * plan.scale)
    if bias is not None:
        bias = distances.padded(bias.astype(jnp.float32).T, plan.q_block + plan.k_block)
        bias = jnp.broadcast_to(bias[None], (n_rows, *bias.shape))  # (B, H, N + 2n)
        bias = tiles.split_group(bias, plan.group)
    k, v = cut(k, plan.k_block), cut(v, plan.k_block)
    return (starts, meets), (q, k, v, mask, start, segments, rng, bias)


def cut_queries(plan: Plan, x: jax.Array) -> jax.Array:
    """Cuts what belongs to queries: (B, H, Lq, …) → (B, H, Nq, q, …), or (B, G, R, Nq, q, …)."""
    return tiles.split_group(cut(x, plan.q_block), plan.group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    offset: jax.Array | None,
    rng: jax.Array | None,
    bias: jax.Array | None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention as `plan` says, in memory linear in both lengths.

    Args:
      plan: the static description.
      q: (B, H, Lq, K).
      k: (B, G, Lk, K).
      v: (B, G, Lk, D).
      mask: (B, Lk) bool, True = a real key; or None.
      offset: (B,) int32, the position of each row's first query; or None for zero.
      rng: the key of dropout; or None for no dropout.
      bias: of the scores, for each distance, (N, H), as the module `distances` says; or None.
      segments: (B, L) int32, the document of each position, if Lq is Lk; or None.

    Returns:
      (B, H, Lq, D), in the dtype of v; zero where a query sees no key.
    """
    return attend_forward(plan, q, k, v, mask, offset, rng, bias, segments)[0]


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(
    plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: Any, bias: Any, segments: Any
) -> Any:
    """The output (B, H, Lq, D), and the residuals of the backward pass.

    Args:
      plan, q, k, v, mask, offset, rng, bias, segments: as of `attend`.

    Returns:
      The output, and (q, k, v, mask, offset, rng, bias, segments, output, z), with z
      (B, H, Nq, q), or (B, G, R, Nq, q), float32.
    """
    given = q, k, v, mask, offset, rng, bias, segments
    if plan.native:
        ways = {'cpu': _native_forward, 'default': _forward}
        ways = {name: functools.partial(f, plan) for name, f in ways.items()}
        out, z = lax.platform_dependent(*given, **ways)
    else:
        out, z = _forward(plan, *given)
    return out, (*given, out, z)


def _forward(
    plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: Any, bias: Any, segments: Any
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp."""
    bounds, heads = per_head(plan, q, k, v, mask, offset, rng, bias, segments)
    f = functools.partial(forward_head, plan, bounds)
    n_pairs = plan.q_block * plan.k_block
    out, z = tiles.over_heads(f, heads, n_pairs, group=plan.group, shared=OF_KEYS)
    return join(tiles.join_group(out, plan.group), plan.n_queries), z


def _native_forward(
    plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: None, bias: None, segments: Any
) -> tuple[jax.Array, jax.Array]:
    out, z = layercomb_kernels.flash_forward(plan.sight, q, k, v, mask, offset, segments)
    return out, cut_queries(plan, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of the arguments of `attend`.

    Args:
      plan: the static description.
      kept: the residuals of `attend_forward`.
      d_out: (B, H, Lq, D), cotangent of the output.

    Returns:
      Gradients of q, k, v and bias, shaped and typed as these; None for the others.
    """
    if not plan.native:
        return _backward(plan, kept, d_out)
    ways = {'cpu': _native_backward, 'default': _backward}
    ways = {name: functools.partial(f, plan) for name, f in ways.items()}
    return lax.platform_dependent(kept, d_out, **ways)


def _native_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    q, k, v, mask, offset, _, _, segments, out, z = kept
    z = join(tiles.join_group(z, plan.group), plan.n_queries)
    gradients = layercomb_kernels.flash_backward(
        plan.sight, q, k, v, (out, z), d_out, mask, offset, segments
    )
    return *gradients, None, None, None, None, None


def _backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    q, k, v, mask, offset, rng, bias, segments, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    bounds, heads = per_head(plan, q, k, v, mask, offset, rng, bias, segments)
    heads = (*heads, z, cut_queries(plan, d_out), cut_queries(plan, dot_out))
    f = functools.partial(backward_head, plan, bounds)
    n_pairs = plan.q_block * plan.k_block
    grouped: Any = {'group': plan.group, 'shared': OF_KEYS, 'summed': (1, 2)}
    d_q, d_k, d_v, d_bias = tiles.over_heads(f, heads, n_pairs, **grouped)
    d_k, d_v = d_k.astype(k.dtype).swapaxes(3, 4), d_v.astype(v.dtype).swapaxes(3, 4)
    d_q = join(tiles.join_group(d_q, plan.group), plan.n_queries)
    d_q, d_k, d_v = d_q.astype(q.dtype), join(d_k, plan.n_keys), join(d_v, plan.n_keys)
    if bias is not None:
        total = tiles.join_group(d_bias, plan.group).sum(0)  # (H, N + 2n)
        d_bias = distances.unpadded(total, plan.q_block + plan.k_block).T.astype(bias.dtype)
    return d_q, d_k, d_v, None, None, None, d_bias, None


attend.defvjp(attend_forward, attend_backward)
