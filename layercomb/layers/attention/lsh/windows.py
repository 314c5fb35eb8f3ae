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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers.attention import local as chunkwise
from layercomb.layers.attention import tiles
from layercomb.layers.quantized.rows import add, put, rows
from layercomb.shapes import as_deep

# A position's score with itself: it counts where nothing else is seen. The paper's −1e5 would put
# z there, where float32 holds no fraction finer than 0.008; e⁻¹⁰⁰ is as good as nothing.
SELF = -100.0
UNIT_EPSILON = 1e-6  # beside the square of a length


@dataclasses.dataclass(frozen=True)
class Plan(chunkwise.Plan):
    """What is static about one call.

    Attributes:
      n_buckets: buckets of real positions; padding has bucket n_buckets.
      by_bucket: whether a query sees its own bucket alone, or all of its window.
      once: whether a pair that meets in N rounds counts once instead of N times.
      heads_together: heads taken at a time, at most; None for what `tiles.over_heads` chooses.
    """

    n_buckets: int = 1
    by_bucket: bool = True
    once: bool = False
    heads_together: int | None = None

    @property
    def padded(self) -> int:
        """The length of all tiles, L."""
        return self.n_tiles * self.tile_len

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key in a tile."""
        return self.tile_len * self.window_len


class Round(NamedTuple):
    """One round's order, with a margin for what the first and the last window look for.

    Attributes:
      position: (P,) the position that stands at each place of the sorted sequence.
      bucket: (P,) the bucket at each place; that of the margin is padding.
      number: of the round.
    """

    position: Any
    bucket: Any
    number: Any


class Tile(NamedTuple):
    """What stands in a tile's windows.

    Attributes:
      position: (G, W) of each key.
      bucket: (G, W) of each key.
      number: of the tile among those of all rounds.
    """

    position: Any
    bucket: Any
    number: Any


def sorted_by_bucket(buckets: jax.Array, n_buckets: int) -> tuple[jax.Array, jax.Array]:
    """The positions (L,) in the order of (bucket, position), and their buckets.

    Args:
      buckets: (L,) int32, from 0 to `n_buckets`, inclusive: that one is padding's.
      n_buckets: how many there are.
    """
    length = len(buckets)
    position = jnp.arange(length, dtype=jnp.int32)
    if (n_buckets + 1) * length < 2**31:
        packed = jnp.sort(buckets * length + position)  # one key: four times as fast as a pair
        return packed % length, packed // length
    bucket, order = lax.sort_key_val(buckets, position, is_stable=True)
    return order, bucket


def make_round(plan: Plan, buckets: jax.Array, number: Any) -> Round:
    """A round from its buckets (L,)."""
    order, bucket = sorted_by_bucket(buckets, plan.n_buckets)
    margin = (plan.look_back * plan.chunk_len, plan.look_ahead * plan.chunk_len)
    bucket = jnp.pad(bucket, margin, constant_values=plan.n_buckets)
    return Round(jnp.pad(order, margin), bucket, number)


def cut(plan: Plan, round_: Round, i: Any) -> Tile:
    """Tile i of a round."""
    position, bucket = (
        chunkwise.windows(plan, chunkwise.slice_of_tile(plan, x, i)) for x in round_[:2]
    )
    return Tile(position, bucket, round_.number * plan.n_tiles + i)


def queries(plan: Plan, x: jax.Array) -> jax.Array:
    """What belongs to queries, (G, C, ...), of what belongs to keys, (G, W, ...)."""
    first = plan.look_back * plan.chunk_len
    return x[:, first : first + plan.chunk_len]


def pairs(plan: Plan, x: jax.Array) -> tuple[Any, Any]:
    """Of x (G, W), that of queries (G, C, 1) and that of keys (G, 1, W)."""
    return queries(plan, x)[:, :, None], x[:, None]


def distance(plan: Plan) -> np.ndarray:
    """Places from each key of a window to each query of its chunk, (C, W): 0 is the query."""
    c = plan.chunk_len
    return np.arange(c)[:, None] + plan.look_back * c - np.arange(plan.window_len)


def visible(plan: Plan, tile: Tile) -> jax.Array:
    """Which keys of its window each query of a tile sees, (G, C, W)."""
    query, key = pairs(plan, tile.bucket)
    if plan.by_bucket:
        apart = distance(plan)
        low = 0 if plan.causal else 1 - plan.chunk_len
        near: Any = (apart >= low) & (apart < plan.chunk_len)
        query = jnp.where(query < plan.n_buckets, query, -1)  # padding sees nothing
        return as_deep(near, key) & (query == key)
    seen: jax.Array = (key < plan.n_buckets) & (query < plan.n_buckets)
    if plan.causal:
        query, key = pairs(plan, tile.position)
        seen = seen & (query >= key)
    return seen


def meetings(plan: Plan, places: Any, buckets: Any, tile: Tile) -> jax.Array:
    """In how many rounds each pair of a tile meets, (G, C, W), of `places` and `buckets` (R, L)."""
    count: Any = 0
    for r in range(places.shape[0]):
        query, key = pairs(plan, rows(places[r], tile.position))
        if plan.by_bucket:
            bucket_q, bucket_k = pairs(plan, rows(buckets[r], tile.position))
            meets = (bucket_q == bucket_k) & (jnp.abs(query - key) < plan.chunk_len)
        else:
            apart = query // plan.chunk_len - key // plan.chunk_len
            meets = (apart <= plan.look_back) & (apart >= -plan.look_ahead)
        count = count + meets.astype(jnp.float32)
    return jnp.maximum(count, 1.0)


def scores(plan: Plan, q: Any, k: Any, rounds: Any, tile: Tile) -> jax.Array:
    """Scores (G, C, W) of queries (G, C, K) and keys (G, W, K); far below all where not seen."""
    s: jax.Array = jnp.where(distance(plan) == 0, SELF, tiles.dot('gqk,gwk->gqw', q, k))
    if plan.once:
        places, buckets = rounds
        s = s - jnp.log(meetings(plan, places, buckets, tile))
    return jnp.where(visible(plan, tile), s, -tiles.FAR)


def unit(x: jax.Array) -> jax.Array:
    """Keys from queries: x / ‖x‖, in the dtype of x."""
    wide = x.astype(jnp.float32)
    norm = lax.rsqrt((wide * wide).sum(-1, keepdims=True) + UNIT_EPSILON)
    return (wide * norm).astype(x.dtype)


def all_rounds(plan: Plan, buckets: Any) -> Any:
    """What `meetings` needs: every round's places, (R, L), and buckets."""
    if not plan.once:
        return None

    def place(buckets: jax.Array) -> jax.Array:
        order, _ = sorted_by_bucket(buckets, plan.n_buckets)
        at = jnp.arange(plan.padded, dtype=jnp.int32)
        return jnp.zeros_like(at).at[order].set(at, unique_indices=True)

    return lax.map(place, buckets), buckets


def over_tiles(plan: Plan, buckets: Any, body: Callable[[Any, Tile], Any], carry: Any) -> Any:
    """Carries through `body` the tiles of all rounds, from buckets (R, L)."""

    def one_round(carry: Any, r: Any) -> tuple[Any, None]:
        round_ = make_round(plan, buckets[r], r)

        def one_tile(carry: Any, i: Any) -> tuple[Any, None]:
            return body(carry, cut(plan, round_, i)), None

        return tiles.each(one_tile, carry, plan.n_tiles)[0], None

    return tiles.each(one_round, carry, buckets.shape[0])[0]


def forward_head(plan: Plan, q: Any, v: Any, buckets: Any, rng: Any) -> Any:
    """One head's output (L, D) and logsumexp (L,), from q (L, K), v (L, D) and buckets (R, L)."""
    rounds = all_rounds(plan, buckets)

    def add_tile(carry: Any, tile: Tile) -> Any:
        out, z = carry
        x, v_i = rows(q, tile.position), rows(v, tile.position)  # (G, W, K), (G, W, D)
        s = scores(plan, queries(plan, x), unit(x), rounds, tile)
        at = queries(plan, tile.position)
        # What the rounds before have made is one more value to weigh.
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
    out, z = over_tiles(plan, buckets, add_tile, start)
    blind = z < -tiles.FAR / 2
    out = jnp.where(blind[:, None], 0.0, out).astype(v.dtype)
    return out, jnp.where(blind, tiles.FAR, z)  # what sees nothing has no probabilities


def backward_head(
    plan: Plan, q: Any, v: Any, buckets: Any, rng: Any, z: Any, d_out: Any, dot_out: Any
) -> Any:
    """One head's gradients of q (L, K) and v (L, D)."""
    rounds = all_rounds(plan, buckets)
    alone = distance(plan) == 0

    def add_tile(carry: Any, tile: Tile) -> Any:
        d_q, d_v = carry
        x, v_i = rows(q, tile.position), rows(v, tile.position)  # (G, W, K), (G, W, D)
        k_i, pull = jax.vjp(unit, x.astype(jnp.float32))
        q_i, k_i = queries(plan, x), k_i.astype(x.dtype)
        at = queries(plan, tile.position)
        d_out_i = rows(d_out, at)
        z_i, dot_out_i = rows(z, at)[..., None], rows(dot_out, at)[..., None]  # (G, C, 1)
        p = jnp.exp(scores(plan, q_i, k_i, rounds, tile) - z_i)
        d_p = tiles.dot('gqd,gwd->gqw', d_out_i, v_i)
        d_p = tiles.drop(plan.dropout_rate, rng, tile.number, d_p)
        d_s = jnp.where(alone, 0.0, p * (d_p - dot_out_i))  # one's own score is a constant
        p = tiles.drop(plan.dropout_rate, rng, tile.number, p)
        (d_x,) = pull(tiles.dot('gqw,gqk->gwk', d_s, q_i))
        d_q = add(d_q, tile.position, d_x)
        d_q = add(d_q, at, tiles.dot('gqw,gwk->gqk', d_s, k_i))
        return d_q, add(d_v, tile.position, tiles.dot('gqw,gqd->gwd', p, d_out_i))

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_q, d_v = over_tiles(plan, buckets, add_tile, start)
    return d_q.astype(q.dtype), d_v.astype(v.dtype)


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
    out, z = tiles.over_heads(
        functools.partial(forward_head, plan), heads, plan.n_pairs, plan.heads_together
    )
    out = out[:, :, : plan.length]
    return out, (q, v, buckets, mask, rng, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of q and v; None for what has none."""
    q, v, buckets, mask, rng, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    heads = (*per_head(plan, q, v, buckets, mask, rng), z, fill(plan, d_out), fill(plan, dot_out))
    d_q, d_v = tiles.over_heads(
        functools.partial(backward_head, plan), heads, plan.n_pairs, plan.heads_together
    )
    return d_q[:, :, : plan.length], d_v[:, :, : plan.length], None, None, None


attend.defvjp(attend_forward, attend_backward)
