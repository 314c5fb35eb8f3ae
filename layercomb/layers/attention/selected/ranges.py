"""Triton kernels: softmax attention of each query to a range of ranks, for GPUs.

Queries and keys lie in orders of their own, and query i sees the ranks low_i … high_i − 1. Along
the queries neither bound falls, so that a tile of queries sees one range of keys, and a tile of
keys is seen by one range of queries: hashing, blocks and windows alike. Each program owns the tile
that it writes, so nothing is added by two of them and sums have one order.

One round of several is computed, number r. With `ONCE`, what a query has seen in the rounds before
is left out: `before` holds the bounds of each query in each round, and `place` the rank of each
key.

Shape letters: F folds, each of which is a sequence of its own; S queries and T keys with the
padding behind them; Q and M of these without; R rounds; C queries and P keys of a tile; K depth of
queries and keys, D depth of values.
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
    low, high, ranks, query, key, before, place, fold, r, Q: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """Which keys each query sees in round r, and saw in none before: (C, P)."""
    found = (low[:, None] <= ranks[None, :]) & (ranks[None, :] < high[:, None])
    if ONCE:
        of_query, of_key = (fold * Q + query) * R, (fold * M + key) * R
        for e in range(r):
            begin, end = (
                tl.load(before + 2 * (of_query + e)),
                tl.load(before + 2 * (of_query + e) + 1),
            )
            at = tl.load(place + of_key + e)
            found &= ~((begin[:, None] <= at[None, :]) & (at[None, :] < end[:, None]))
    return found


@triton.jit
def rows_of(x, first, at, DEPTH: tl.constexpr):
    """Rows `at` of x (…, DEPTH), counted from row `first`."""
    return tl.load(x + (first + at)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])


@triton.jit
def forward(
    q, k, v, low, high, query, key, before, place, number, out, z, S: tl.constexpr, T: tl.constexpr,
    Q: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ONCE: tl.constexpr
):  # fmt: skip
    """The output (F, S, D) and the logsumexp (F, S), float32, of one round; a tile of queries."""
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    at = tl.program_id(0) * C + tl.arange(0, C)
    begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
    query_i, q_i = tl.load(query + fold * S + at), rows_of(q, fold * S, at, K)
    first = tl.min(tl.where(begin < end, begin, M))
    last = tl.max(tl.where(begin < end, end, 0))
    m, total = tl.full((C,), -FAR, tl.float32), tl.zeros((C,), tl.float32)
    mean = tl.zeros((C, D), tl.float32)
    for start in range(first, last, P):
        ranks = start + tl.arange(0, P)
        key_j = tl.load(key + fold * T + ranks)
        s = scores(q_i, rows_of(k, fold * T, ranks, K), SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, before, place, fold, r, Q, M, R, ONCE)
        s = tl.where(is_seen, s, -FAR)
        m_new = tl.maximum(m, tl.max(s, 1))
        p, old = tl.where(is_seen, tl.exp(s - m_new[:, None]), 0.0), tl.exp(m - m_new)
        v_j = rows_of(v, fold * T, ranks, D)
        new = tl.dot(p.to(v_j.dtype), v_j, input_precision='tf32x3')
        mean = mean * old[:, None] + new
        total, m = total * old + tl.sum(p, 1), m_new
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    to = (fold * S + at)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + to, mean / total[:, None])
    tl.store(z + fold * S + at, tl.where(blind, -FAR, m + tl.log(total)))


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
    q, k, v, low, high, query, key, before, place, number, z, d_out, dot_out, d_q, S: tl.constexpr,
    T: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ONCE: tl.constexpr
):  # fmt: skip
    """The gradient of the queries (F, S, K) float32 by one round; a tile of queries."""
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    at = tl.program_id(0) * C + tl.arange(0, C)
    begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
    query_i, q_i = tl.load(query + fold * S + at), rows_of(q, fold * S, at, K)
    z_i, dot_i = tl.load(z + fold * S + at), tl.load(dot_out + fold * S + at)
    d_out_i = rows_of(d_out, fold * S, at, D)
    first = tl.min(tl.where(begin < end, begin, M))
    last = tl.max(tl.where(begin < end, end, 0))
    total = tl.zeros((C, K), tl.float32)
    for start in range(first, last, P):
        ranks = start + tl.arange(0, P)
        key_j, k_j = tl.load(key + fold * T + ranks), rows_of(k, fold * T, ranks, K)
        s = scores(q_i, k_j, SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, before, place, fold, r, Q, M, R, ONCE)
        d_p = tl.dot(d_out_i, tl.trans(rows_of(v, fold * T, ranks, D)), input_precision='tf32x3')
        d_s = slopes(probabilities(s, is_seen, z_i), d_p, s, is_seen, dot_i, SCALE, SOFTCAP)
        total += tl.dot(d_s.to(k_j.dtype), k_j, input_precision='tf32x3')
    tl.store(d_q + (fold * S + at)[:, None] * K + tl.arange(0, K)[None, :], total)


@triton.jit
def backward_keys(
    q, k, v, low, high, query, key, before, place, number, z, d_out, dot_out, first, last, d_k, d_v,
    S: tl.constexpr, T: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """The gradients of keys (F, T, K) and values (F, T, D), float32, by one round; a tile of keys.

    Its queries are those from `first` to `last`, (F, T / P) int32.
    """
    fold, r = tl.program_id(1).to(tl.int64), tl.load(number)
    ranks = tl.program_id(0) * P + tl.arange(0, P)
    key_j = tl.load(key + fold * T + ranks)
    k_j, v_j = rows_of(k, fold * T, ranks, K), rows_of(v, fold * T, ranks, D)
    total_k, total_v = tl.zeros((P, K), tl.float32), tl.zeros((P, D), tl.float32)
    own = fold * tl.num_programs(0) + tl.program_id(0)
    for start in range(tl.load(first + own), tl.load(last + own), C):
        at = start + tl.arange(0, C)
        begin, end = tl.load(low + fold * S + at), tl.load(high + fold * S + at)
        query_i, q_i = tl.load(query + fold * S + at), rows_of(q, fold * S, at, K)
        z_i, dot_i = tl.load(z + fold * S + at), tl.load(dot_out + fold * S + at)
        d_out_i = rows_of(d_out, fold * S, at, D)
        s = scores(q_i, k_j, SCALE, SOFTCAP)
        is_seen = seen(begin, end, ranks, query_i, key_j, before, place, fold, r, Q, M, R, ONCE)
        p = probabilities(s, is_seen, z_i)
        d_p = tl.dot(d_out_i, tl.trans(v_j), input_precision='tf32x3')
        d_s = slopes(p, d_p, s, is_seen, dot_i, SCALE, SOFTCAP)
        total_k += tl.dot(tl.trans(d_s.to(q_i.dtype)), q_i, input_precision='tf32x3')
        total_v += tl.dot(tl.trans(p.to(d_out_i.dtype)), d_out_i, input_precision='tf32x3')
    to = (fold * T + ranks)[:, None]
    tl.store(d_k + to * K + tl.arange(0, K)[None, :], total_k)
    tl.store(d_v + to * D + tl.arange(0, D)[None, :], total_v)
