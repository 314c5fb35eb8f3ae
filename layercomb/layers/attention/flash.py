"""Softmax attention of whole sequences, a block of queries by a block of keys at a time.

The forward pass keeps a running maximum m and sum ℓ of every query while the blocks of keys go by
(the online softmax) and leaves the output O and the logsumexp z = m + log ℓ. The backward pass
recomputes the probabilities of each block::

    P = exp(s·Q Kᵀ − z)    dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − Σ dO ∘ O)    dQ = s·dS K    dK = s·dSᵀ Q

Everything is written for one head, on arrays already cut into blocks, and mapped over heads.
Shape letters: B batch, H heads, K depth of queries and keys, D depth of values; Nq blocks of q
queries, Nk blocks of c keys.

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

from layercomb.layers.attention import tiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about one call: who sees whom, and how the work is cut.

    Attributes:
      n_queries: Lq, before padding.
      n_keys: Lk, before padding.
      q_block: queries in a block.
      k_block: keys in a block.
      scale: factor s of the scores.
      causal: whether a query sees only keys at its own position and before.
      dropout_rate: share of the probabilities set to zero.
    """

    n_queries: int
    n_keys: int
    q_block: int
    k_block: int
    scale: float
    causal: bool = False
    dropout_rate: float = 0.0

    @property
    def n_q_blocks(self) -> int:
        """Number of blocks of queries, Nq."""
        return -(-self.n_queries // self.q_block)

    @property
    def n_k_blocks(self) -> int:
        """Number of blocks of keys, Nk; the last may be short."""
        return -(-self.n_keys // self.k_block)


def visible(plan: Plan, i: Any, j: Any, mask: Any, start: Any) -> jax.Array:
    """Which keys of block j each query of block i sees, (q or 1, c)."""
    key = j * plan.k_block + jnp.arange(plan.k_block, dtype=jnp.int32)
    seen = (key < plan.n_keys)[None]  # (1, c)
    if mask is not None:
        seen = seen & mask[j][None]
    if plan.causal:
        query = start + i * plan.q_block + jnp.arange(plan.q_block, dtype=jnp.int32)[:, None]
        seen = seen & (key[None] <= query)
    return seen


def key_blocks(plan: Plan, masked: bool, starts: tuple[Any, Any], i: Any) -> tuple[Any, Any]:
    """Blocks of keys for the i-th block of queries: (middle, high).

    Every query sees every key of the blocks before middle; those from middle to high need
    `visible`; nobody sees the others. `starts` are the least and the greatest position of a
    first query in the batch, since the bounds serve all rows together.
    """
    middle, high = 0 if masked else plan.n_keys // plan.k_block, plan.n_k_blocks
    if plan.causal:
        first = starts[0] + i * plan.q_block
        last = starts[1] + (i + 1) * plan.q_block - 1
        middle = middle and tiles.least(middle, (first + 1) // plan.k_block)
        high = tiles.least(high, last // plan.k_block + 1)
    return middle, high


def query_blocks(plan: Plan, masked: bool, starts: tuple[Any, Any], j: Any) -> tuple[Any, Any]:
    """Blocks of queries for the j-th block of keys: (low, middle).

    Those from low to middle need `visible`; the queries from middle on see every key; those
    before low see none.
    """
    low = middle = 0
    high = plan.n_q_blocks
    if plan.causal:
        first, after = j * plan.k_block, (j + 1) * plan.k_block
        low = tiles.least(tiles.most(0, (first - starts[1]) // plan.q_block), high)
        middle = -((starts[0] + 1 - after) // plan.q_block)
        middle = tiles.least(tiles.most(low, middle), high)
    n_whole = 0 if masked else plan.n_keys // plan.k_block
    if n_whole == 0:
        middle = high
    elif n_whole < plan.n_k_blocks:
        middle = jnp.where(j < n_whole, middle, high)  # type: ignore[assignment]
    return low, middle


def forward_head(plan: Plan, starts: Any, q: Any, k: Any, v: Any, mask: Any, start: Any, rng: Any):
    """One head's output (Nq, q, D) and logsumexp (Nq, q) from q (Nq, q, K), k (Nk, c, K) …"""

    def block(i, q_i, edge, j, carry):
        m, total, out = carry
        scores = tiles.dot('qk,ck->qc', q_i, k[j])
        if edge:
            seen = visible(plan, i, j, mask, start)
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
        middle, high = key_blocks(plan, mask is not None, starts, i)
        zeros = jnp.zeros((plan.q_block, 1), jnp.float32)
        carry = (zeros - tiles.FAR, zeros, jnp.zeros((plan.q_block, v.shape[-1]), jnp.float32))
        carry = tiles.loop(0, middle, functools.partial(block, i, q_i, False), carry)
        m, total, out = tiles.loop(middle, high, functools.partial(block, i, q_i, True), carry)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        z = jnp.where(some, m + jnp.log(total), tiles.FAR)[:, 0]
        return None, ((out / total).astype(v.dtype), z)

    return tiles.each(queries, None, plan.n_q_blocks)[1]


def backward_head(
    plan: Plan,
    starts: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    start: Any,
    rng: Any,
    z: Any,
    d_out: Any,
    dot_out: Any,
):
    """One head's gradients of q (Nq, q, K), of k (Nk, K, c) and of v (Nk, D, c)."""
    # Transposed once, here: products that contract the rows of both factors are slow on the CPU.
    q_t, d_out_t = q.swapaxes(1, 2), d_out.swapaxes(1, 2)  # (Nq, K, q), (Nq, D, q)

    def block(j, edge, i, carry):
        d_q, d_k, d_v = carry
        number = i * plan.n_k_blocks + j
        p = jnp.exp(tiles.dot('qk,ck->qc', q[i], k[j]) - z[i][:, None])
        if edge:
            p = jnp.where(visible(plan, i, j, mask, start), p, 0.0)
        d_p = tiles.dot('qd,cd->qc', d_out[i], v[j])
        d_s = p * (tiles.drop(plan.dropout_rate, rng, number, d_p) - dot_out[i][:, None])
        p = tiles.drop(plan.dropout_rate, rng, number, p)
        d_v = d_v + tiles.dot('dq,qc->dc', d_out_t[i], p)
        d_k = d_k + tiles.dot('kq,qc->kc', q_t[i], d_s)
        d_q_i = d_q[i] + tiles.dot('qc,ck->qk', d_s, k[j])
        return lax.dynamic_update_index_in_dim(d_q, d_q_i, i, 0), d_k, d_v

    def keys(d_q, j):
        low, middle = query_blocks(plan, mask is not None, starts, j)
        d_k = jnp.zeros((k.shape[2], k.shape[1]), jnp.float32)
        d_v = jnp.zeros((v.shape[2], v.shape[1]), jnp.float32)
        carry = tiles.loop(low, middle, functools.partial(block, j, True), (d_q, d_k, d_v))
        d_q, d_k, d_v = tiles.loop(
            middle, plan.n_q_blocks, functools.partial(block, j, False), carry
        )
        return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_q, (d_k, d_v) = tiles.each(keys, jnp.zeros(q.shape, jnp.float32), plan.n_k_blocks)
    return d_q * plan.scale, d_k, d_v


def cut(x: jax.Array, block: int) -> jax.Array:
    """Cuts the length of x (B, H, L, K) into blocks, the last one filled up with zeros."""
    n_blocks = -(-x.shape[2] // block)
    missing = n_blocks * block - x.shape[2]
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3)) if missing else x
    return x.reshape(*x.shape[:2], n_blocks, block, *x.shape[3:])  # (B, H, N, block, K)


def join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `cut`."""
    whole = x.shape[2] * x.shape[3]
    return x.reshape(*x.shape[:2], whole, *x.shape[4:])[:, :, :length]  # (B, H, L, K)


def per_head(plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: Any) -> Any:
    """The bounds `starts`, and the arguments of `forward_head`: axes (B, H) first, q times s."""
    n_rows, n_heads = q.shape[:2]
    starts: tuple[Any, Any] = (0, 0)
    start = jnp.zeros((n_rows, n_heads), jnp.int32)
    if offset is not None:
        starts = offset.min(), offset.max()
        start = jnp.broadcast_to(offset[:, None], (n_rows, n_heads))  # (B, H)
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (n_rows, n_heads, plan.n_keys))
        mask = cut(mask, plan.k_block)  # (B, H, Nk, c)
    rng = tiles.key_per_head(rng, (n_rows, n_heads))
    q = q.astype(jnp.float32) * plan.scale
    q, k, v = cut(q, plan.q_block), cut(k, plan.k_block), cut(v, plan.k_block)
    return starts, (q, k, v, mask, start, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    offset: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array:
    """Attention as `plan` says, in memory linear in both lengths.

    Args:
      plan: the static description.
      q: (B, H, Lq, K).
      k: (B, H, Lk, K).
      v: (B, H, Lk, D).
      mask: (B, Lk) bool, True = a real key; or None.
      offset: (B,) int32, the position of each row's first query; or None for zero.
      rng: the key of dropout; or None for no dropout.

    Returns:
      (B, H, Lq, D), in the dtype of v; zero where a query sees no key.
    """
    return attend_forward(plan, q, k, v, mask, offset, rng)[0]


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(plan: Plan, q: Any, k: Any, v: Any, mask: Any, offset: Any, rng: Any) -> Any:
    """The output, and what the backward pass needs."""
    starts, heads = per_head(plan, q, k, v, mask, offset, rng)
    f = functools.partial(forward_head, plan, starts)
    out, z = tiles.over_heads(f, heads, plan.q_block * plan.k_block)
    out = join(out, plan.n_queries)
    return out, (q, k, v, mask, offset, rng, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of q, k and v; None for what has none."""
    q, k, v, mask, offset, rng, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    starts, heads = per_head(plan, q, k, v, mask, offset, rng)
    heads = (*heads, z, cut(d_out, plan.q_block), cut(dot_out, plan.q_block))
    f = functools.partial(backward_head, plan, starts)
    d_q, d_k, d_v = tiles.over_heads(f, heads, plan.q_block * plan.k_block)
    d_k, d_v = d_k.swapaxes(3, 4), d_v.swapaxes(3, 4)  # (B, H, Nk, c, K)
    d_q, d_k, d_v = join(d_q, plan.n_queries), join(d_k, plan.n_keys), join(d_v, plan.n_keys)
    return d_q.astype(q.dtype), d_k, d_v, None, None, None


attend.defvjp(attend_forward, attend_backward)
