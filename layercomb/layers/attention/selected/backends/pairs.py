"""Softmax attention over sets of keys: pair by pair of a tile of queries and a piece of keys.

All rounds share one softmax::

    z = log Σ_r Σ_{c ∈ S_r(t)} exp s[t, c]        P_r = exp(s − z) on S_r(t)

where each round leaves out, with `once`, what an earlier one has seen. A round's sums are kept in
its own sorted order, so that whole tiles are written; one gather puts them back. The backward pass
keeps z and the output, and computes scores again, pair by pair.

Shape letters: Q queries and M keys of the heads together, K depth of queries and keys, D depth of
values; R rounds, N tiles of C queries, P keys of a piece, G pairs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.attention.selected.backends.sets import (
    Pairs,
    Plan,
    Sets,
    make_pairs,
    make_sets,
)
from layercomb.layers.quantized.rows import IN_BOUNDS, rows


def forward(
    plan: Plan, q: Any, k: Any, v: Any, buckets: Any, segments: Any, rng: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention of the heads together.

    Args:
      plan: the static description.
      q, k, v: (Q, K), (M, K) and (M, D).
      buckets: of queries (R', Q) and of keys (R', M), of all rounds: those of `Plan.windows`.
      segments: (M,) int32, the document of each key; or None.
      rng: the key of dropout; or None.

    Returns:
      (Q, D) in the dtype of v, zero for a query that sees nothing; and the logsumexp (Q,) float32,
      `tiles.FAR` there.
    """
    n, c = plan.n_tiles + 1, plan.tile_len
    rounds = _all_rounds(plan, buckets, segments) if plan.once else None

    def one_round(carry: Any, x: Any) -> tuple[Any, None]:
        number, sets, pairs = _round(plan, x, segments)

        def body(carry: Any, pair: _Pair) -> Any:
            out, z = carry  # (N, C, D), (N, C, 1), sorted
            s = _scores(plan, rows(q, pair.queries), rows(k, pair.keys))
            s = jnp.where(_seen(plan, sets, rounds, number, pair), s, -tiles.FAR)
            # Pairs of one tile share a maximum and a sum, and write the same.
            same = pair.tile[:, None] == pair.tile[None]
            z_old = rows(z, pair.tile)
            m = jnp.where(same[:, :, None, None], s.max(-1, keepdims=True), -tiles.FAR).max(1)
            m = jnp.maximum(z_old, m)
            p, old = jnp.exp(s - m), jnp.exp(z_old - m)
            shares = same.astype(jnp.float32)
            total = tiles.dot('gh,hcx->gcx', shares, p.sum(-1, keepdims=True)) + old
            p = tiles.drop(plan.dropout_rate, rng, pair.number, p)
            new = tiles.dot('gh,hcd->gcd', shares, tiles.dot('gcp,gpd->gcd', p, rows(v, pair.keys)))
            out_i = (new + old * rows(out, pair.tile)) / total
            return _put(out, pair.tile, out_i), _put(z, pair.tile, m + jnp.log(total))

        start = (
            jnp.zeros((n, c, v.shape[-1]), jnp.float32),
            jnp.full((n, c, 1), -tiles.FAR, jnp.float32),
        )
        made = _over_pairs(plan, number, sets, pairs, body, start)
        out_r, z_r = (rows(x.reshape(n * c, -1), sets.query_place) for x in made)
        out, z = carry
        both = jnp.logaddexp(z, z_r)
        return (jnp.exp(z - both) * out + jnp.exp(z_r - both) * out_r, both), None

    start = (
        jnp.zeros((plan.n_q, v.shape[-1]), jnp.float32),
        jnp.full((plan.n_q, 1), -tiles.FAR, jnp.float32),
    )
    (out, z), _ = lax.scan(one_round, start, of_rounds(plan, buckets))
    blind = z < -tiles.FAR / 2
    return jnp.where(blind, 0.0, out).astype(v.dtype), jnp.where(blind, tiles.FAR, z)[:, 0]


def backward(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    buckets: Any,
    segments: Any,
    rng: Any,
    z: Any,
    d_out: Any,
    dot_out: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, in float32, from the cotangent of the output.

    Args:
      plan, q, k, v, buckets, segments, rng: as of `forward`.
      z: (Q,) float32, the logsumexp.
      d_out: (Q, D), the cotangent of the output.
      dot_out: (Q,) float32, Σ dO ∘ O.
    """
    n, c = plan.n_tiles + 1, plan.tile_len
    rounds = _all_rounds(plan, buckets, segments) if plan.once else None

    def one_round(carry: Any, x: Any) -> tuple[Any, None]:
        number, sets, pairs = _round(plan, x, segments)

        def body(carry: Any, pair: _Pair) -> Any:
            d_q, d_k, d_v = carry  # (N, C, K), (M + P, K), (M + P, D), sorted
            q_i, k_i, v_i = rows(q, pair.queries), rows(k, pair.keys), rows(v, pair.keys)
            d_out_i = rows(d_out, pair.queries)
            z_i, dot_i = (rows(x, pair.queries)[..., None] for x in (z, dot_out))
            s, seen = _scores(plan, q_i, k_i), _seen(plan, sets, rounds, number, pair)
            p = jnp.where(seen, jnp.exp(jnp.where(seen, s - z_i, 0.0)), 0.0)
            d_p = tiles.dot('gcd,gpd->gcp', d_out_i, v_i)
            d_p = tiles.drop(plan.dropout_rate, rng, pair.number, d_p)
            d_s = jnp.where(seen, p * (d_p - dot_i), 0.0)
            d_s = tiles.uncapped(d_s, s, plan.softcap)
            d_s = d_s if plan.scale == 1 else d_s * plan.scale
            p = tiles.drop(plan.dropout_rate, rng, pair.number, p)
            d_q = d_q.at[pair.tile].add(tiles.dot('gcp,gpk->gck', d_s, k_i), **IN_BOUNDS)
            d_k = _add_pieces(d_k, pair.start, tiles.dot('gcp,gck->gpk', d_s, q_i))
            return d_q, d_k, _add_pieces(d_v, pair.start, tiles.dot('gcp,gcd->gpd', p, d_out_i))

        n_keys = plan.n_k + plan.piece_len
        shapes = (n, c, q.shape[-1]), (n_keys, k.shape[-1]), (n_keys, v.shape[-1])
        start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        d_q, d_k, d_v = _over_pairs(plan, number, sets, pairs, body, start)
        parts = (
            rows(d_q.reshape(n * c, -1), sets.query_place),
            *(rows(x, sets.key_rank) for x in (d_k, d_v)),
        )
        return jax.tree.map(jnp.add, carry, parts), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (d_q, d_k, d_v), _ = lax.scan(one_round, start, of_rounds(plan, buckets))
    return d_q, d_k, d_v


class _Pair(NamedTuple):
    """G pairs of tiles and pieces.

    Attributes:
      number: of the group among those of all rounds, int32 ().
      tile, start: (G,) int32, as of `Pairs`.
      places, ranks: (G, C) and (G, P) int32, of queries and keys in the sorted orders.
      queries, keys: (G, C) and (G, P) int32, their numbers.
    """

    number: Any
    tile: Any
    start: Any
    places: Any
    ranks: Any
    queries: Any
    keys: Any


def _pair(plan: Plan, sets: Sets, tile: Any, start: Any, number: Any) -> _Pair:
    places = tile[:, None] * plan.tile_len + np.arange(plan.tile_len, dtype=np.int32)[None]
    ranks = start[:, None] + np.arange(plan.piece_len, dtype=np.int32)[None]
    numbers = rows(sets.query, places), rows(sets.key, ranks)
    return _Pair(number, tile, start, places, ranks, *numbers)


def of_rounds(plan: Plan, buckets: Any) -> Any:
    """What a scan over rounds takes."""
    windows = np.array([n for n, _ in plan.windows], np.int32)
    firsts = np.array([first for _, first in plan.windows])
    return np.arange(len(windows), dtype=np.int32), buckets, windows, firsts


def _round(plan: Plan, x: Any, segments: Any) -> tuple[Any, Sets, Pairs]:
    number, buckets, window, first = x
    sets = make_sets(plan, buckets, segments, window, first)
    return number, sets, make_pairs(plan, sets)


def _all_rounds(plan: Plan, buckets: Any, segments: Any) -> tuple[Any, Any, Any]:
    """low and high of each query, (R, Q), and the rank of each key, (R, M), in all rounds."""

    def one(x: Any) -> Any:
        _, *given = x
        sets = make_sets(plan, given[0], segments, *given[1:])
        return *(rows(bound, sets.query_place) for bound in (sets.low, sets.high)), sets.key_rank

    low, high, rank = lax.map(one, of_rounds(plan, buckets))
    return low, high, rank


def _over_pairs(
    plan: Plan,
    number: Any,
    sets: Sets,
    pairs: Pairs,
    body: Callable[[Any, _Pair], Any],
    carry: Any,
) -> Any:
    """Carries through all pairs of a round, `together` at a time, as many as there are."""
    g = plan.together
    n_groups = plan.max_pairs // g

    def group(i: Any, carry: Any) -> Any:
        tile, start = (lax.dynamic_slice_in_dim(x, i * g, g) for x in (pairs.tile, pairs.start))
        return body(carry, _pair(plan, sets, tile, start, number * n_groups + i))

    return lax.fori_loop(np.int32(0), (pairs.n + g - 1) // g, group, carry)


def _scores(plan: Plan, q: jax.Array, k: jax.Array) -> jax.Array:
    """(G, C, P) float32 of q (G, C, K) and k (G, P, K)."""
    s = tiles.dot('gck,gpk->gcp', q, k)
    return tiles.capped(s if plan.scale == 1 else s * plan.scale, plan.softcap)


def _seen(plan: Plan, sets: Sets, rounds: Any, number: Any, pair: _Pair) -> jax.Array:
    """Which keys each query sees in a round, (G, C, P) bool."""

    def within(low: Any, high: Any, rank: Any) -> Any:
        return (low[..., None] <= rank[:, None]) & (rank[:, None] < high[..., None])

    low, high = (rows(x, pair.places) for x in (sets.low, sets.high))
    seen = within(low, high, pair.ranks)
    if rounds is not None:
        for r in range(len(plan.windows) - 1):
            low, high = (rows(x[r], pair.queries) for x in rounds[:2])
            before = within(low, high, rows(rounds[2][r], pair.keys))
            seen = seen & ~(before & (r < number))
    return seen


def _put(x: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """x with x[at] = values; those for one place are the same."""
    return x.at[at].set(values, **IN_BOUNDS)


def _add_pieces(x: jax.Array, start: jax.Array, pieces: jax.Array) -> jax.Array:
    """x (M + P, K) with pieces (G, P, K) added from the rows `start` (G,) on; they may overlap."""
    dims = lax.ScatterDimensionNumbers((1, 2), (), (0,))
    return lax.scatter_add(x, start[:, None], pieces, dims, mode='promise_in_bounds')
