"""The sorted order of positions in one round of LSH attention, cut into tiles of chunks.

Shape letters: L length, padded to whole tiles; R rounds, C chunk, G chunks in a tile, W window, P
the length with the chunks that the first and the last window need.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers.attention import local as chunkwise
from layercomb.layers.quantized.rows import rows
from layercomb.layers.state import segments as documents

UNIT_EPSILON = 1e-6  # ε, added to the square of a length


@dataclasses.dataclass(frozen=True)
class Plan(chunkwise.Plan):
    """The static part of one call, beside the fields of `local.Plan`.

    Attributes:
      n_buckets: buckets of real positions. Padding has bucket n_buckets; what is no position at all
        has bucket n_buckets + 1 in a circle, where the two differ.
      by_bucket: whether a query sees only its own bucket, or all of its window.
      circle: whether the chunks of all rounds follow each other in a circle, so that the first and
        the last chunk of a round see into its neighbours.
      once: whether a pair that meets in N rounds counts once instead of N times.
      step: a round in a circle has a multiple of this many chunks.
      epsilon: ε.
      rounded: whether a position that sees itself alone gets its `rounded_shares`.
      heads_together: heads computed at a time, at most; None for the default of `tiles.over_heads`.
    """

    n_buckets: int = 1
    by_bucket: bool = True
    circle: bool = False
    once: bool = False
    step: int = 1
    epsilon: float = UNIT_EPSILON
    rounded: bool = False
    heads_together: int | None = None

    @property
    def padded(self) -> int:
        """The length of all tiles together, L."""
        return self.n_tiles * self.tile_len

    @property
    def last_bucket(self) -> int:
        """The bucket that is sorted behind all others, of places that hold no position."""
        return self.n_buckets + self.circle

    @property
    def n_pairs(self) -> int:
        """(query, key) pairs in a tile, G·C·W."""
        return self.tile_len * self.window_len


class Round(NamedTuple):
    """The sorted order of one round, padded for the first and the last window.

    Attributes:
      position: (P,) int32, the position at each place of the sorted sequence.
      bucket: (P,) int32, the bucket at each place; n_buckets in the padding.
      chunk: (P,) int32, the chunk of its document that each place is in; None if all of a window is
        in reach.
      number: of the round, int32 ().
    """

    position: Any
    bucket: Any
    chunk: Any
    number: Any


class Ends(NamedTuple):
    """The first and the last chunk of each round, as sorted: positions and buckets.

    Attributes:
      first, last: (R, 2, C) int32.
    """

    first: Any
    last: Any


class Tile(NamedTuple):
    """The keys in a tile's windows.

    Attributes:
      position: (G, W) int32, of each key.
      bucket: (G, W) int32, of each key.
      document: (G, W) int32, of each key; None without segments.
      chunk: (G, W) int32, of each key, as of `Round`; or None.
      number: of the tile among those of all rounds, int32 ().
    """

    position: Any
    bucket: Any
    document: Any
    chunk: Any
    number: Any


def in_order(plan: Plan, buckets: jax.Array, segments: Any) -> tuple[jax.Array, jax.Array]:
    """The positions in the order of one round, and their buckets: `sorted_by_bucket`.

    With segments, documents come one after the other, unless a query sees its own bucket alone:
    there, positions of a document stand together in each bucket anyway.

    Args:
      plan: the static description.
      buckets: (L,) int32.
      segments: (L,) int32, the document of each position; or None.
    """
    if segments is None or plan.by_bucket:
        return sorted_by_bucket(buckets, plan.last_bucket)
    document = jnp.where(buckets < plan.n_buckets, segments, jnp.iinfo(jnp.int32).max)
    position = jnp.arange(len(buckets), dtype=jnp.int32)
    _, bucket, order = lax.sort((document, buckets, position), num_keys=2, is_stable=True)
    return order, bucket


def places_in_order(plan: Plan, order: jax.Array, segments: Any) -> jax.Array:
    """The place of each entry of a round's order: in its document, where chunks are those of it.

    Args:
      plan: the static description.
      order: (L,) int32, as of `in_order`.
      segments: (L,) int32, the document of each position; or None.

    Returns:
      (L,) int32.
    """
    if segments is None or plan.by_bucket or plan.circle:
        return jnp.arange(len(order), dtype=jnp.int32)
    return documents.places(rows(segments, order)[None])[0]


def sorted_by_bucket(buckets: jax.Array, n_buckets: int) -> tuple[jax.Array, jax.Array]:
    """The positions in the order of (bucket, position), and their buckets.

    Args:
      buckets: (L,) int32, from 0 to `n_buckets`, which is the bucket of padding.
      n_buckets: number of buckets.

    Returns:
      Positions (L,) and buckets (L,), int32.
    """
    length = len(buckets)
    position = jnp.arange(length, dtype=jnp.int32)
    if (n_buckets + 1) * length < 2**31:
        packed = jnp.sort(buckets * length + position)  # one sort key: 4 times as fast as two
        return packed % length, packed // length
    bucket, order = lax.sort_key_val(buckets, position, is_stable=True)
    return order, bucket


def make_round(
    plan: Plan, buckets: jax.Array, number: Any, ends: Ends | None, segments: Any
) -> Round:
    """The sorted order of round `number`.

    Args:
      plan: the static description.
      buckets: (L,) int32, of this round.
      number: int32 ().
      ends: of all rounds, if they make a circle.
      segments: (L,) int32, the document of each position; or None.
    """
    order, bucket = in_order(plan, buckets, segments)
    if ends is None:
        margin = (plan.look_back * plan.chunk_len, plan.look_ahead * plan.chunk_len)
        bucket = jnp.pad(bucket, margin, constant_values=plan.n_buckets)
        chunk = None
        if segments is not None and not plan.by_bucket:
            chunk = jnp.pad(places_in_order(plan, order, segments) // plan.chunk_len, margin)
        return Round(jnp.pad(order, margin), bucket, chunk, number)
    n_rounds = len(ends.last)
    parts = [ends.last[(number - 1) % n_rounds], jnp.stack([order, bucket])]
    if plan.look_ahead:
        parts.append(ends.first[(number + 1) % n_rounds])
    whole = jnp.concatenate(parts, 1)  # (2, P)
    return Round(whole[0], whole[1], None, number)


def n_chunks(plan: Plan, buckets: jax.Array) -> jax.Array:
    """How many chunks a round of a circle has, int32 ().

    Args:
      plan: the static description.
      buckets: (R, L) int32.
    """
    n = n_positions(plan, buckets) + plan.step * plan.chunk_len - 1
    return jnp.maximum(n // (plan.step * plan.chunk_len), 1) * plan.step


def n_positions(plan: Plan, buckets: jax.Array) -> jax.Array:
    """How many positions there are, int32 (); the arguments are as of `n_chunks`."""
    return (buckets[0] <= plan.n_buckets).sum(dtype=jnp.int32)


def ends_of_rounds(plan: Plan, buckets: jax.Array, segments: Any) -> Ends | None:
    """Where the rounds, (R, L) int32 buckets, meet in a circle; None if they make none."""
    if not plan.circle:
        return None
    c, n = plan.chunk_len, n_chunks(plan, buckets)

    def one(buckets: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jnp.stack(in_order(plan, buckets, segments))  # (2, L)
        return both[:, :c], lax.dynamic_slice_in_dim(both, (n - 1) * c, c, 1)

    return Ends(*lax.map(one, buckets))


def cut(plan: Plan, round_: Round, i: Any, segments: Any) -> Tile:
    """Tile `i` of a round, int32 (), with its windows (G, W); `segments` as of `make_round`."""

    def of_windows(x: jax.Array) -> jax.Array:
        return chunkwise.windows(plan, chunkwise.slice_of_tile(plan, x, i))

    position, bucket = of_windows(round_.position), of_windows(round_.bucket)
    document = None if segments is None else rows(segments, position)
    chunk = None if round_.chunk is None else of_windows(round_.chunk)
    return Tile(position, bucket, document, chunk, round_.number * plan.n_tiles + i)


def queries(plan: Plan, x: jax.Array) -> jax.Array:
    """The places of a window that are queries: (G, W, …) → (G, C, …)."""
    first = plan.look_back * plan.chunk_len
    return x[:, first : first + plan.chunk_len]


def pairs(plan: Plan, x: jax.Array) -> tuple[Any, Any]:
    """x (G, W) at the queries, (G, C, 1), and at the keys, (G, 1, W)."""
    return queries(plan, x)[:, :, None], x[:, None]


def alone(plan: Plan, tile: Tile) -> Any:
    """Where a query meets its own position: (C, W) bool, or (G, C, W) in a circle."""
    if not plan.circle:
        return distance(plan) == 0
    query, key = pairs(plan, tile.position)
    return query == key


def distance(plan: Plan) -> np.ndarray:
    """Places from each key of a window to each query of its chunk, (C, W) int; 0 is the query."""
    c = plan.chunk_len
    return np.arange(c)[:, None] + plan.look_back * c - np.arange(plan.window_len)
