"""Triton kernels: softmax attention of each query to a range of ranks, for GPUs.

Queries and keys have orders of their own in each round, and in that of round r query i sees the
ranks low_i … high_i − 1. Along the queries neither bound falls, so that a tile of queries sees one
range of keys, and a tile of keys is seen by one range of queries: hashing, blocks and windows are
the same. Rows are read and written where they lie, by their numbers. Each program owns the rows
that it writes, so nothing is added by two of them and sums have one order.

A call adds one round, number r, to what the rounds before gave. With `ONCE`, what a query has seen
in these is left out: `bounds` holds low and high of each query in each round, and `place` the rank
of each key.

Shape letters: F folds, each of which is a sequence of its own; Q queries and M keys; S and T these
with the padding of the orders; R rounds; C queries and P keys of a tile; K depth of queries and
keys, D depth of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1e30)  # as `tiles.FAR`


@triton.jit
def scores(q, k, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores (C, P) float32 of q (C, K) and k (P, K)."""
    s = tl.dot(q, tl.trans(k), input_precision='tf32x3') * SCALE
    if SOFTCAP > 0:  # tanh x = 2 σ(2x) − 1
        s = SOFTCAP * (2 * tl.sigmoid(2 * s / SOFTCAP) - 1)
    return s


@triton.jit
def seen(
    low, high, ranks, query, key, bounds, place, r, R: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """Which keys each query sees in round r, and saw in none before: (C, P)."""
    found = (low[:, None] <= ranks[None, :]) & (ranks[None, :] < high[:, None])
    if ONCE:
        for e in range(r):
            begin = tl.load(bounds + 2 * (query * R + e))
            end = tl.load(bounds + 2 * (query * R + e) + 1)
            at = tl.load(place + key * R + e)
            found &= ~((begin[:, None] <= at[None, :]) & (at[None, :] < end[:, None]))
    return found


@triton.jit
def places(at, DEPTH: tl.constexpr):
    """Where the numbers of rows `at` lie in an array (…, DEPTH)."""
    return at[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]


@triton.jit
def forward(
    q, k, v, low, high, query, key, bounds, place, number, S, T, Q, M, out_before, z_before, out, z,
    R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """The output (F, Q, D) and the logsumexp (F, Q), float32, with one round more."""
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    at = tl.program_id(0) * C + tl.arange(0, C)
    begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
    query_i = fold * Q + tl.load(query + fold * S + at)
    q_i = tl.load(q + places(query_i, K))
    m, mean = tl.load(z_before + query_i), tl.load(out_before + places(query_i, D))
    total = tl.where(m <= -FAR / 2, 0.0, 1.0)  # 1 for NaN: it stays
    first = tl.min(tl.where(begin < end, begin, M))
    last = tl.max(tl.where(begin < end, end, 0))
    for start in range(first, last, P):
        ranks = start + tl.arange(0, P)
        key_j = fold * M + tl.load(key + fold * T + ranks)
        s = scores(q_i, tl.load(k + places(key_j, K)), SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, bounds, place, r, R, ONCE)
        s = tl.where(is_seen, s, -FAR)
        m_new = tl.maximum(m, tl.max(s, 1))
        p, old = tl.where(is_seen, tl.exp(s - m_new[:, None]), 0.0), tl.exp(m - m_new)
        v_j = tl.load(v + places(key_j, D))
        new = tl.dot(p.to(v_j.dtype), v_j, input_precision='tf32x3')
        mean = mean * old[:, None] + new
        total, m = total * old + tl.sum(p, 1), m_new
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    there = at < Q
    tl.store(out + places(query_i, D), mean / total[:, None], mask=there[:, None])
    tl.store(z + query_i, tl.where(blind, -FAR, m + tl.log(total)), mask=there)


@triton.jit
def probabilities(s, is_seen, z):
    """Probabilities (C, P) of scores, from the logsumexp (C,) over all rounds."""
    return tl.where(is_seen, tl.exp(tl.where(is_seen, s - z[:, None], 0.0)), 0.0)


@triton.jit
def slopes(p, d_p, s, is_seen, dot_out, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """The gradient (C, P) of the products q·k."""
    d_s = tl.where(is_seen, p * (d_p - dot_out[:, None]), 0.0)
    if SOFTCAP > 0:
        d_s = tl.where(is_seen, d_s * (1 - (s / SOFTCAP) * (s / SOFTCAP)), 0.0)
    return d_s * SCALE


@triton.jit
def backward_queries(
    q, k, v, low, high, query, key, bounds, place, number, S, T, Q, M, z, d_out, dot_out,
    d_q_before, d_q, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """The gradient of the queries (F, Q, K), float32, with one round more."""
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    at = tl.program_id(0) * C + tl.arange(0, C)
    begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
    query_i = fold * Q + tl.load(query + fold * S + at)
    q_i, d_out_i = tl.load(q + places(query_i, K)), tl.load(d_out + places(query_i, D))
    z_i, dot_i = tl.load(z + query_i), tl.load(dot_out + query_i)
    total = tl.load(d_q_before + places(query_i, K))
    first = tl.min(tl.where(begin < end, begin, M))
    last = tl.max(tl.where(begin < end, end, 0))
    for start in range(first, last, P):
        ranks = start + tl.arange(0, P)
        key_j = fold * M + tl.load(key + fold * T + ranks)
        k_j, v_j = tl.load(k + places(key_j, K)), tl.load(v + places(key_j, D))
        s = scores(q_i, k_j, SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, bounds, place, r, R, ONCE)
        d_p = tl.dot(d_out_i, tl.trans(v_j), input_precision='tf32x3')
        p = probabilities(s, is_seen, z_i)
        d_s = slopes(p, d_p, s, is_seen, dot_i, SCALE, SOFTCAP)
        total += tl.dot(d_s.to(k_j.dtype), k_j, input_precision='tf32x3')
    tl.store(d_q + places(query_i, K), total, mask=(at < Q)[:, None])


@triton.jit
def backward_keys(
    q, k, v, low, high, query, key, bounds, place, number, S, T, Q, M, z, d_out, dot_out, first,
    last, d_k_before, d_v_before, d_k, d_v, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ONCE: tl.constexpr
):  # fmt: skip
    """The gradients of keys (F, M, K) and values (F, M, D), float32, with one round more.

    The queries of a tile of keys are those from `first` to `last`, (F, T / P) int32.
    """
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    ranks = tl.program_id(0) * P + tl.arange(0, P)
    key_j = fold * M + tl.load(key + fold * T + ranks)
    k_j, v_j = tl.load(k + places(key_j, K)), tl.load(v + places(key_j, D))
    total_k = tl.load(d_k_before + places(key_j, K))
    total_v = tl.load(d_v_before + places(key_j, D))
    own = fold * (T // P) + tl.program_id(0)
    for start in range(tl.load(first + own), tl.load(last + own), C):
        at = start + tl.arange(0, C)
        begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
        query_i = fold * Q + tl.load(query + fold * S + at)
        q_i, d_out_i = tl.load(q + places(query_i, K)), tl.load(d_out + places(query_i, D))
        z_i, dot_i = tl.load(z + query_i), tl.load(dot_out + query_i)
        s = scores(q_i, k_j, SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, bounds, place, r, R, ONCE)
        p = probabilities(s, is_seen, z_i)
        d_p = tl.dot(d_out_i, tl.trans(v_j), input_precision='tf32x3')
        d_s = slopes(p, d_p, s, is_seen, dot_i, SCALE, SOFTCAP)
        total_k += tl.dot(tl.trans(d_s.to(q_i.dtype)), q_i, input_precision='tf32x3')
        total_v += tl.dot(tl.trans(p.to(d_out_i.dtype)), d_out_i, input_precision='tf32x3')
    there = (ranks < M)[:, None]
    tl.store(d_k + places(key_j, K), total_k, mask=there)
    tl.store(d_v + places(key_j, D), total_v, mask=there)
