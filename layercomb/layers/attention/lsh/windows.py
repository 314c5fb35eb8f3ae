"""Softmax attention of each query to its neighbours in sorted buckets, one round at a time.

A round sorts positions by (bucket, position) and cuts the sorted sequence into chunks. The keys of
a query are in its chunk and the one before it (and the one after, if not causal). All rounds share
one softmax over the union of their windows; a pair that meets twice counts twice::

    z = log Σ_r Σ_{c ∈ W_r(t)} exp s[t, c]        P_r = exp(s − z) on W_r(t)

The backward pass keeps queries, values, buckets, the output and z, and nothing per round: it
recomputes probabilities round by round and tile by tile, as `flash` does.

Functions named `…_head` compute one head. Shape letters: B batch, H heads of queries, G' heads of
values, which H/G' heads of queries share; L length, padded to whole tiles; K depth of queries and
keys, D depth of values, R rounds, C chunk, N tiles of G chunks, W window, P the
length with the chunks that the first and the last window need.

References:
    Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers.attention import local as chunkwise
from layercomb.layers.attention import tiles
from layercomb.layers.attention.lsh.rounds import (
    UNIT_EPSILON,
    Plan,
    Tile,
    alone,
    cut,
    distance,
    ends_of_rounds,
    in_order,
    make_round,
    n_chunks,
    n_positions,
    pairs,
    places_in_order,
    queries,
)
from layercomb.layers.quantized.rows import add, put, rows
from layercomb.shapes import as_deep

# A position's score with itself, which counts only if it sees nothing else. The paper's −1e5 is too
# low: float32 has a resolution of 0.008 there, and z would have it too. e⁻¹⁰⁰ is negligible enough.
SELF = -100.0
# The place of v among the arguments of `forward_head`, after the plan, and of its gradient; and the
# places of what heads that share v share.
OF_VALUES, SHARED = (1,), (1, 3)


def visible(plan: Plan, tile: Tile) -> jax.Array:
    """Which keys of its window each query of a tile sees, (G, C, W) bool."""
    query, key = pairs(plan, tile.bucket)
    if plan.by_bucket:
        apart = distance(plan)
        low = 0 if plan.causal else 1 - plan.chunk_len
        near: Any = (apart >= low) & (apart < plan.chunk_len)
        query = jnp.where(query < plan.n_buckets, query, -1)  # padding sees nothing
        seen: jax.Array = as_deep(near, key) & (query == key)
    else:
        seen = (key < plan.n_buckets) & (query < plan.n_buckets)
    if tile.document is not None:
        seen = seen & chunkwise.in_document(plan, tile.document, tile.chunk)
    if plan.causal and not plan.by_bucket:
        query, key = pairs(plan, tile.position)
        seen = seen & (query >= key)
    return seen


def meetings(plan: Plan, places: Any, buckets: Any, tile: Tile) -> jax.Array:
    """In how many rounds each pair of a tile meets, at least 1: (G, C, W) float32.

    `places` (R, L) int32 are the places of positions in each round's sorted sequence, or in those
    of their documents.
    """
    if plan.circle:
        return meetings_in_circle(plan, places, n_chunks(plan, buckets), tile)
    count: Any = 0
    for r in range(places.shape[0]):
        query, key = pairs(plan, rows(places[r], tile.position))
        if plan.by_bucket:
            bucket_q, bucket_k = pairs(plan, rows(buckets[r], tile.position))
            meets = (bucket_q == bucket_k) & (jnp.abs(query - key) < plan.chunk_len)
        else:
            apart = query // plan.chunk_len - key // plan.chunk_len
            meets = (apart <= plan.reach[0]) & (apart >= -plan.reach[1])
        count = count + meets.astype(jnp.float32)
    return jnp.maximum(count, 1.0)


def meetings_in_circle(plan: Plan, places: Any, n: Any, tile: Tile) -> jax.Array:
    """The `meetings` of rounds of n chunks that make a circle."""
    chunks = [pairs(plan, rows(x, tile.position) // plan.chunk_len) for x in places]
    count: Any = 0
    for r, (query, key) in enumerate(chunks):
        (_, before), (_, after) = chunks[r - 1], chunks[(r + 1) % len(chunks)]
        apart = query - key
        count = count + ((apart <= 1) & (apart >= -plan.look_ahead)).astype(jnp.float32)
        count = count + ((query == 0) & (before == n - 1)).astype(jnp.float32)
        if plan.look_ahead:
            count = count + ((query == n - 1) & (after == 0)).astype(jnp.float32)
    return jnp.maximum(count, 1.0)


def similarities(plan: Plan, q: Any, k: Any) -> jax.Array:
    """Scores before the rules of `scores`: (G, C, W) float32 of q (G, C, K) and k (G, W, K)."""
    s = tiles.dot('gqk,gwk->gqw', q, k)
    return tiles.capped(s if plan.scale == 1 else s * plan.scale, plan.softcap)


def scores(plan: Plan, similar: Any, rounds: Any, tile: Tile) -> jax.Array:
    """Scores (G, C, W) float32 from `similarities`; −`tiles.FAR` if not seen.

    `rounds` is the result of `all_rounds`.
    """
    s: jax.Array = jnp.where(alone(plan, tile), SELF, similar)
    if plan.once:
        places, buckets = rounds
        s = s - jnp.log(meetings(plan, places, buckets, tile))
    return jnp.where(visible(plan, tile), s, -tiles.FAR)


def unit(x: jax.Array, epsilon: Any = UNIT_EPSILON) -> jax.Array:
    """Keys from queries: x / √(‖x‖² + ε), (…, K) → (…, K), in the dtype of x."""
    wide = x.astype(jnp.float32)
    norm = lax.rsqrt((wide * wide).sum(-1, keepdims=True) + epsilon)
    return (wide * norm).astype(x.dtype)


def all_rounds(plan: Plan, buckets: Any, segments: Any) -> Any:
    """Places and buckets for `meetings`, both (R, L) int32; None if the plan needs none."""
    if not plan.once:
        return None

    def place(buckets: jax.Array) -> jax.Array:
        order, _ = in_order(plan, buckets, segments)
        at = places_in_order(plan, order, segments)
        return jnp.zeros_like(at).at[order].set(at, unique_indices=True)

    return lax.map(place, buckets), buckets


def over_tiles(
    plan: Plan, buckets: Any, segments: Any, body: Callable[[Any, Tile], Any], carry: Any
) -> Any:
    """Carries a value through ``body(carry, tile)`` for each tile of each round; buckets (R, L)."""

    ends = ends_of_rounds(plan, buckets, segments)

    def one_round(carry: Any, r: Any) -> tuple[Any, None]:
        round_ = make_round(plan, buckets[r], r, ends, segments)

        def one_tile(carry: Any, i: Any) -> tuple[Any, None]:
            return body(carry, cut(plan, round_, i, segments)), None

        return tiles.each(one_tile, carry, plan.n_tiles)[0], None

    return tiles.each(one_round, carry, buckets.shape[0])[0]


def forward_head(plan: Plan, q: Any, v: Any, buckets: Any, segments: Any, rng: Any) -> Any:
    """One head's output and logsumexp.

    Args:
      plan: the static description.
      q: (L, K).
      v: (L, D).
      buckets: (R, L) int32.
      segments: (L,) int32, the document of each position; or None.
      rng: key of dropout, or None.

    Returns:
      The output (L, D) in the dtype of v, zero where a query sees no key; and z (L,) float32,
      `tiles.FAR` where a query sees no key.
    """
    rounds = all_rounds(plan, buckets, segments)

    def add_tile(carry: Any, tile: Tile) -> Any:
        out, z = carry
        x, v_i = rows(q, tile.position), rows(v, tile.position)  # (G, W, K), (G, W, D)
        s = scores(plan, similarities(plan, queries(plan, x), unit(x, plan.epsilon)), rounds, tile)
        at = queries(plan, tile.position)
        # The result of the earlier rounds enters as one more value, with score z.
        z_old = rows(z, at)[..., None]  # (G, C, 1)
        m = jnp.maximum(s.max(-1, keepdims=True), z_old)
        p, old = jnp.exp(s - m), jnp.exp(z_old - m)
        total = p.sum(-1, keepdims=True) + old
        p = tiles.drop(plan.dropout_rate, rng, tile.number, p)
        out_i = (tiles.dot('gqw,gwd->gqd', p, v_i) + old * rows(out, at)) / total
        return put(out, at, out_i), put(z, at, (m + jnp.log(total))[..., 0])

    start = (
        jnp.zeros((plan.padded, v.shape[-1]), jnp.float32),
        jnp.full(plan.padded, -tiles.FAR, jnp.float32),
    )
    out, z = over_tiles(plan, buckets, segments, add_tile, start)
    blind = z < -tiles.FAR / 2
    if plan.rounded:
        out, z = round_alone(plan, buckets, out, z)
    out = jnp.where(blind[:, None], 0.0, out).astype(v.dtype)
    return out, jnp.where(blind, tiles.FAR, z)  # so that P is 0 where nothing is seen


def round_alone(plan: Plan, buckets: Any, out: Any, z: Any) -> tuple[Any, Any]:
    """Output and logsumexp of `forward_head` with `rounded_shares` at positions that are alone.

    Such a position sees nothing but itself, N times in R rounds: z = SELF + log N.
    """
    n_rounds = len(buckets)
    times = jnp.exp(jnp.minimum(z - SELF, 10.0)).round().astype(jnp.int32)
    shares = rows(rounded_shares(n_rounds), jnp.clip(times - n_rounds, 0, n_rounds))
    lone = (
        (times <= 2 * n_rounds)
        & (times >= n_rounds)
        & (n_positions(plan, buckets) > plan.chunk_len)
    )
    shares = jnp.where(lone, shares, 1.0)
    return out * shares[:, None], z - jnp.log(shares)


def rounded_shares(n_rounds: int) -> jax.Array:
    """What the probabilities of a position that sees itself alone add up to elsewhere.

    Its score is −10⁵ there, beside which float32 rounds log 2 to 89/128: the probabilities of R
    rounds add up to 1 within 0.4 %, and not to 1.

    Args:
      n_rounds: R.

    Returns:
      (R + 1,) float32: the sum where it sees itself twice in 0, 1, … R of the rounds.
    """
    one = np.float32(-1e5)
    two = one + np.log(np.float32(2))
    within = {one: np.float32(1), two: 2 * np.exp(one - two)}
    made = []
    for n in range(n_rounds + 1):
        z = np.array([one] * (n_rounds - n) + [two] * n, np.float32)
        p = np.exp(z - (z.max() + np.log(np.exp(z - z.max()).sum())))
        made.append(sum(x * within[score] for x, score in zip(p, z, strict=True)))
    return jnp.asarray(np.array(made, np.float32))


def backward_head(
    plan: Plan,
    q: Any,
    v: Any,
    buckets: Any,
    segments: Any,
    rng: Any,
    z: Any,
    d_out: Any,
    dot_out: Any,
) -> Any:
    """One head's gradients, from the cotangent of its output.

    Args:
      plan, q, v, buckets, segments, rng: as of `forward_head`.
      z: (L,) float32, the logsumexp.
      d_out: (L, D), cotangent of the output.
      dot_out: (L,) float32, Σ dO ∘ O.

    Returns:
      Gradients of q (L, K) and v (L, D), in their dtypes; that of v in float32 if it is to be
      summed over a group.
    """
    dtype = v.dtype if plan.group == 1 else jnp.float32
    rounds = all_rounds(plan, buckets, segments)

    def add_tile(carry: Any, tile: Tile) -> Any:
        d_q, d_v = carry
        x, v_i = rows(q, tile.position), rows(v, tile.position)  # (G, W, K), (G, W, D)
        k_i, pull = jax.vjp(lambda x: unit(x, plan.epsilon), x.astype(jnp.float32))
        q_i, k_i = queries(plan, x), k_i.astype(x.dtype)
        at = queries(plan, tile.position)
        d_out_i = rows(d_out, at)
        z_i, dot_out_i = rows(z, at)[..., None], rows(dot_out, at)[..., None]  # (G, C, 1)
        similar = similarities(plan, q_i, k_i)
        p = jnp.exp(scores(plan, similar, rounds, tile) - z_i)
        d_p = tiles.dot('gqd,gwd->gqw', d_out_i, v_i)
        d_p = tiles.drop(plan.dropout_rate, rng, tile.number, d_p)
        # Scores with oneself are constant.
        d_s = jnp.where(alone(plan, tile), 0.0, p * (d_p - dot_out_i))
        d_s = tiles.uncapped(d_s, similar, plan.softcap)
        d_s = d_s if plan.scale == 1 else d_s * plan.scale
        p = tiles.drop(plan.dropout_rate, rng, tile.number, p)
        (d_x,) = pull(tiles.dot('gqw,gqk->gwk', d_s, q_i))
        d_q = add(d_q, tile.position, d_x)
        d_q = add(d_q, at, tiles.dot('gqw,gwk->gqk', d_s, k_i))
        return d_q, add(d_v, tile.position, tiles.dot('gqw,gqd->gwd', p, d_out_i))

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_q, d_v = over_tiles(plan, buckets, segments, add_tile, start)
    return d_q.astype(q.dtype), d_v.astype(dtype)


def fill(plan: Plan, x: jax.Array, value: Any = 0, axis: int = 2) -> jax.Array:
    """Pads axis `axis` of x, its length, with `value` to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, plan.padded - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def per_head(plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any, segments: Any) -> Any:
    """The arguments of `forward_head`, with leading axes (B, H), or (B, G', H/G') if H is not G'.

    Args:
      plan, q, v, buckets, mask, rng, segments: as of `attend`.

    Returns:
      q (B, H, L, K), v (B, G', L, D), buckets (B, H, R, L) int32, padding having bucket n_buckets,
      segments (B, G', L) or None, and keys (B, H) or None.
    """
    buckets = buckets.astype(jnp.int32)
    if mask is not None:
        buckets = jnp.where(mask[:, None, None], buckets, jnp.maximum(buckets, plan.n_buckets))
    rng = tiles.key_per_head(rng, q.shape[:2])
    own = fill(plan, q), fill(plan, buckets, plan.last_bucket, axis=3), rng
    q, buckets, rng = tiles.split_group(own, plan.group)
    if segments is not None:
        segments = fill(plan, segments[:, None])
        segments = jnp.broadcast_to(segments, (*v.shape[:2], plan.padded))
    return q, fill(plan, v), buckets, segments, rng


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any, segments: Any = None
) -> jax.Array:
    """LSH attention as `plan` says, in time and memory linear in the length, apart from the sort.

    Args:
      plan: the static description.
      q: (B, H, L, K), queries, which serve as keys too.
      v: (B, G', L, D).
      buckets: (B, H, R, L), integers as of `lsh_attention`.
      mask: (B, L) bool, True = a real position; or None.
      rng: the key of dropout; or None for no dropout.
      segments: (B, L) int32, the document of each position; or None.

    Returns:
      (B, H, L, D), in the dtype of v; zero where the mask is False.
    """
    return attend_forward(plan, q, v, buckets, mask, rng, segments)[0]


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(
    plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any, segments: Any
) -> Any:
    """The output (B, H, L, D), and the residuals of the backward pass.

    The residuals are (q, v, buckets, mask, rng, segments, output, z), with z (B, H, L), or
    (B, G', H/G', L), float32.
    """
    heads = per_head(plan, q, v, buckets, mask, rng, segments)
    out, z = tiles.over_heads(
        functools.partial(forward_head, plan),
        heads,
        plan.n_pairs,
        plan.heads_together,
        group=plan.group,
        shared=SHARED,
    )
    out = tiles.join_group(out, plan.group)[:, :, : plan.length]
    return out, (q, v, buckets, mask, rng, segments, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of q and v, from the cotangent (B, H, L, D); None for the other arguments."""
    q, v, buckets, mask, rng, segments, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    cts = tiles.split_group((fill(plan, d_out), fill(plan, dot_out)), plan.group)
    heads = (*per_head(plan, q, v, buckets, mask, rng, segments), z, *cts)
    d_q, d_v = tiles.over_heads(
        functools.partial(backward_head, plan),
        heads,
        plan.n_pairs,
        plan.heads_together,
        group=plan.group,
        shared=SHARED,
        summed=OF_VALUES,
    )
    d_q, d_v = tiles.join_group(d_q, plan.group), d_v.astype(v.dtype)
    return d_q[:, :, : plan.length], d_v[:, :, : plan.length], None, None, None, None


attend.defvjp(attend_forward, attend_backward)
