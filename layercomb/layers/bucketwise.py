"""Softmax attention of each query to its neighbours in sorted buckets, a round at a time.

A round sorts positions by (bucket, position) and cuts the sorted sequence into chunks; the keys of
a query lie in its chunk and the one before it (and the one after, if not causal). Several rounds
are one softmax over the union of their windows, in which a pair that meets twice counts twice::

    z = log Σ_r Σ_{c ∈ W_r(t)} exp s[t, c]        P_r = exp(s − z) on W_r(t)

so the backward pass needs queries, values, the output, z and Σ dO ∘ O, and goes round by round and
tile by tile, as `blockwise` does: nothing is kept for a round.

Everything is written for one head. Shape letters: L length, padded; K depth of queries and keys,
D depth of values, R rounds, C chunk, N tiles of G chunks, W window, P the length with the chunks
that the first and the last window need.

References:
    Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers import chunkwise, tiles

# A position's score with itself: it counts where nothing else is seen. The paper's −1e5 would put
# z there, where float32 holds no fraction finer than 0.008; e⁻¹⁰⁰ is as good as nothing.
SELF = -100.0


@dataclasses.dataclass(frozen=True)
class Plan(chunkwise.Plan):
    """What is static about one call.

    Attributes:
      n_buckets: buckets of real positions; padding has bucket n_buckets.
      by_bucket: whether a query sees its own bucket alone, or all of its window.
      once: whether a pair that meets in N rounds counts once instead of N times.
      value_depth: D.
    """

    n_buckets: int = 1
    value_depth: int = 1
    by_bucket: bool = True
    once: bool = False

    @property
    def padded(self) -> int:
        """The length of all tiles, L."""
        return self.n_tiles * self.tile_len

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key in a tile."""
        return self.tile_len * self.window_len


class Round(NamedTuple):
    """One round's order.

    Attributes:
      order: (L,) the position that stands at each place of the sorted sequence.
      place: (L,) its inverse.
      position: (P,) `order` with a margin.
      bucket: (P,) the bucket at each place, with a margin of padding.
      number: of the round.
    """

    order: Any
    place: Any
    position: Any
    bucket: Any
    number: Any


def margin(plan: Plan, x: jax.Array, fill: Any = 0) -> jax.Array:
    """(L, ...) → (P, ...): room for the chunks that the first and the last window look for."""
    c = plan.chunk_len
    before_after = (plan.look_back * c, plan.look_ahead * c)
    return jnp.pad(x, [before_after] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def sort(plan: Plan, buckets: jax.Array, number: Any) -> Round:
    """Orders positions by (bucket, position)."""
    length = plan.padded
    position = jnp.arange(length, dtype=jnp.int32)
    if (plan.n_buckets + 1) * length < 2**31:
        packed = jnp.sort(buckets * length + position)  # one key: four times as fast as a pair
        order, bucket = packed % length, packed // length
    else:
        bucket, order = lax.sort_key_val(buckets, position, is_stable=True)
    place = jnp.zeros(length, jnp.int32).at[order].set(position, unique_indices=True)
    return Round(order, place, margin(plan, order), margin(plan, bucket, plan.n_buckets), number)


def distance(plan: Plan) -> np.ndarray:
    """Places from each key of a window to each query of its chunk, (C, W): 0 is the query."""
    c = plan.chunk_len
    return np.arange(c)[:, None] + plan.look_back * c - np.arange(plan.window_len)


def both(plan: Plan, x: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
    """Of tile i, what x (P, ...) holds for the queries (G, C, ...) and for the keys (G, W, ...)."""
    wide = chunkwise.windows(plan, chunkwise.slice_of_tile(plan, x, i))
    first = plan.look_back * plan.chunk_len
    return wide[:, first : first + plan.chunk_len], wide


def visible(plan: Plan, round_: Round, i: Any) -> jax.Array:
    """Which keys of its window each query of tile i sees, (G, C, W)."""
    query, key = both(plan, round_.bucket, i)
    seen = (key < plan.n_buckets)[:, None] & (query < plan.n_buckets)[:, :, None]
    if plan.by_bucket:
        apart = distance(plan)
        low = 0 if plan.causal else 1 - plan.chunk_len
        near = (apart >= low) & (apart < plan.chunk_len)
        return seen & near & (query[:, :, None] == key[:, None])
    if plan.causal:
        query, key = both(plan, round_.position, i)
        seen = seen & (query[:, :, None] >= key[:, None])
    return seen


def meetings(plan: Plan, places: Any, buckets: Any, round_: Round, i: Any) -> jax.Array:
    """In how many rounds each pair of tile i meets, (G, C, W), of `places` and `buckets` (R, L)."""
    query, key = both(plan, round_.position, i)
    count: Any = 0
    for r in range(places.shape[0]):
        place_q, place_k = places[r][query][:, :, None], places[r][key][:, None]
        if plan.by_bucket:
            same = buckets[r][query][:, :, None] == buckets[r][key][:, None]
            meets = same & (jnp.abs(place_q - place_k) < plan.chunk_len)
        else:
            apart = place_q // plan.chunk_len - place_k // plan.chunk_len
            meets = (apart <= plan.look_back) & (apart >= -plan.look_ahead)
        count = count + meets.astype(jnp.float32)
    return jnp.maximum(count, 1.0)


def scores(plan: Plan, q: Any, k: Any, rounds: Any, round_: Round, i: Any) -> tuple[Any, Any]:
    """Scores (G, C, W) of tile i, and which of them are seen."""
    s: jax.Array = jnp.where(distance(plan) == 0, SELF, tiles.dot('gqk,gwk->gqw', q, k))
    if plan.once:
        places, buckets = rounds
        s = s - jnp.log(meetings(plan, places, buckets, round_, i))
    return s, visible(plan, round_, i)


def unit(x: jax.Array) -> jax.Array:
    """Keys from queries: x / ‖x‖, in the dtype of x."""
    wide = x.astype(jnp.float32)
    norm = lax.rsqrt((wide * wide).sum(-1, keepdims=True) + 1e-6)
    return (wide * norm).astype(x.dtype)


def all_rounds(plan: Plan, buckets: Any) -> Any:
    """What `meetings` needs: every round's places, (R, L), and buckets."""
    if not plan.once:
        return None
    return lax.map(lambda b: sort(plan, b, 0).place, buckets), buckets


def tile_number(plan: Plan, round_: Round, i: Any) -> Any:
    """A number for the dropout of a tile."""
    return round_.number * plan.n_tiles + i


def forward_round(plan: Plan, qv: Any, rounds: Any, round_: Round, rng: Any) -> Any:
    """One round's output and logsumexp, (L, D + 1), from queries and values (L, K + D)."""
    depth = qv.shape[-1] - plan.value_depth
    x = margin(plan, qv[round_.order])
    k, v = unit(x[:, :depth]), x[:, depth:]

    def tile(_, i):
        q_i, _ = both(plan, x[:, :depth], i)
        k_i, v_i = (chunkwise.windows(plan, chunkwise.slice_of_tile(plan, y, i)) for y in (k, v))
        s, seen = scores(plan, q_i, k_i, rounds, round_, i)
        s = jnp.where(seen, s, -tiles.FAR)
        m = s.max(-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(s - m), 0.0)
        total = p.sum(-1, keepdims=True)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        p = tiles.drop(plan.dropout_rate, rng, tile_number(plan, round_, i), p)
        z = jnp.where(some, m + jnp.log(total), -tiles.FAR)
        return None, jnp.concatenate([tiles.dot('gqw,gwd->gqd', p, v_i) / total, z], -1)

    out = tiles.each(tile, None, plan.n_tiles)[1]  # (N, G, C, D + 1)
    return out.reshape(plan.padded, -1)[round_.place]


def forward_head(plan: Plan, q: Any, v: Any, buckets: Any, rng: Any) -> Any:
    """One head's output (L, D) and logsumexp (L,), from q (L, K), v (L, D) and buckets (R, L)."""
    qv = jnp.concatenate([q, v], -1)
    rounds = all_rounds(plan, buckets)

    def add_round(carry, r):
        out, z = carry
        y = forward_round(plan, qv, rounds, sort(plan, buckets[r], r), rng)
        z_r = y[:, -1:]
        z_new = jnp.logaddexp(z, z_r)
        return (out * jnp.exp(z - z_new) + y[:, :-1] * jnp.exp(z_r - z_new), z_new), None

    start = jnp.zeros(v.shape, jnp.float32), jnp.full((plan.padded, 1), -tiles.FAR)
    (out, z), _ = tiles.each(add_round, start, buckets.shape[0])
    z = jnp.where(z > -tiles.FAR / 2, z, tiles.FAR)  # what sees nothing has no probabilities
    return out.astype(v.dtype), z[:, 0]


def backward_round(
    plan: Plan, pack: Any, depth: int, dtype: Any, rounds: Any, round_: Round, rng: Any
) -> Any:
    """One round's gradients of queries, keys and values, (L, 2K + D).

    From (L, K + 2D + 2): queries, values, d_out, z and Σ dO ∘ O. `dtype` is the queries' own, to
    which forward rounds keys.
    """
    d = plan.value_depth
    x = margin(plan, pack[round_.order])
    q, v = x[:, :depth], x[:, depth : depth + d]
    k = unit(q.astype(dtype))
    alone = distance(plan) == 0

    def tile(d_kv, i):
        x_i, _ = both(plan, x, i)
        q_i, d_out = x_i[..., :depth], x_i[..., depth + d : depth + 2 * d]
        z, dot_out = x_i[..., -2:-1], x_i[..., -1:]
        k_i, v_i = (chunkwise.windows(plan, chunkwise.slice_of_tile(plan, y, i)) for y in (k, v))
        s, seen = scores(plan, q_i, k_i, rounds, round_, i)
        number = tile_number(plan, round_, i)
        p = jnp.where(seen, jnp.exp(s - z), 0.0)
        d_p = tiles.dot('gqd,gwd->gqw', d_out, v_i)
        d_s = p * (tiles.drop(plan.dropout_rate, rng, number, d_p) - dot_out)
        d_s = jnp.where(alone, 0.0, d_s)  # that score is a constant
        p = tiles.drop(plan.dropout_rate, rng, number, p)
        d_k_i = tiles.dot('gqw,gqk->gwk', d_s, q_i)
        d_v_i = tiles.dot('gqw,gqd->gwd', p, d_out)
        d_kv = chunkwise.add_windows(plan, d_kv, i, jnp.concatenate([d_k_i, d_v_i], -1))
        return d_kv, tiles.dot('gqw,gwk->gqk', d_s, k_i)

    zeros = jnp.zeros((x.shape[0], depth + d), jnp.float32)
    d_kv, d_q = tiles.each(tile, zeros, plan.n_tiles)
    before = plan.look_back * plan.chunk_len
    d_kv = d_kv[before : before + plan.padded]
    return jnp.concatenate([d_q.reshape(plan.padded, depth), d_kv], -1)[round_.place]


def backward_head(
    plan: Plan, q: Any, v: Any, buckets: Any, rng: Any, z: Any, d_out: Any, dot_out: Any
) -> Any:
    """One head's gradients of q (L, K) and v (L, D)."""
    depth = q.shape[-1]
    narrow = (x.astype(jnp.float32) for x in (q, v, d_out, z[:, None], dot_out[:, None]))
    pack = jnp.concatenate(list(narrow), -1)
    rounds = all_rounds(plan, buckets)

    def add_round(total, r):
        round_ = sort(plan, buckets[r], r)
        return total + backward_round(plan, pack, depth, q.dtype, rounds, round_, rng), None

    start = jnp.zeros((plan.padded, 2 * depth + plan.value_depth), jnp.float32)
    total, _ = tiles.each(add_round, start, buckets.shape[0])
    d_q, d_k, d_v = jnp.split(total, [depth, 2 * depth], -1)
    _, pull = jax.vjp(unit, q.astype(jnp.float32))
    return (d_q + pull(d_k)[0]).astype(q.dtype), d_v.astype(v.dtype)


def fill(plan: Plan, x: jax.Array, value: Any = 0, axis: int = 2) -> jax.Array:
    """Fills up the length of x with `value` to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, plan.padded - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def per_head(plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any) -> Any:
    """The arguments of `forward_head`, each with leading axes (B, H)."""
    buckets = buckets.astype(jnp.int32)
    if mask is not None:
        buckets = jnp.where(mask[:, None, None], buckets, plan.n_buckets)
    rng = tiles.key_per_head(rng, q.shape[:2])
    return fill(plan, q), fill(plan, v), fill(plan, buckets, plan.n_buckets, axis=3), rng


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any) -> jax.Array:
    """LSH attention as `plan` says, in time and memory linear in the length (but for the sort).

    Args:
      plan: the static description.
      q: (B, H, L, K), queries; keys are made of them.
      v: (B, H, L, D).
      buckets: (B, H, R, L), integers from 0 to n_buckets, exclusive.
      mask: (B, L) bool, True = a real position; or None.
      rng: the key of dropout; or None for no dropout.

    Returns:
      (B, H, L, D), in the dtype of v; zero where the mask is False.
    """
    return attend_forward(plan, q, v, buckets, mask, rng)[0]


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(plan: Plan, q: Any, v: Any, buckets: Any, mask: Any, rng: Any) -> Any:
    """The output, and what the backward pass needs."""
    heads = per_head(plan, q, v, buckets, mask, rng)
    out, z = tiles.over_heads(functools.partial(forward_head, plan), heads, plan.n_pairs)
    out = out[:, :, : plan.length]
    return out, (q, v, buckets, mask, rng, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of q and v; None for what has none."""
    q, v, buckets, mask, rng, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    heads = (*per_head(plan, q, v, buckets, mask, rng), z, fill(plan, d_out), fill(plan, dot_out))
    d_q, d_v = tiles.over_heads(functools.partial(backward_head, plan), heads, plan.n_pairs)
    return d_q[:, :, : plan.length], d_v[:, :, : plan.length], None, None, None


attend.defvjp(attend_forward, attend_backward)
