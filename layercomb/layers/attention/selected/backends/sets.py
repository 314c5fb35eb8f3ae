"""Which keys each query sees in a round, as a range of ranks; and the pairs of tiles for it.

Keys are sorted by (bucket, document, position), and a key's place in that order is its rank. A
query sees ranks low … high − 1: the last keys of its own bucket and document up to its position. No
later token changes that set. Along queries in the same order neither bound falls, so neighbours, a
tile of C, see one range of ranks, which pieces of P keys cover. With n keys a query, the ranges of
all tiles add up to at most N·n + M ranks, whatever the buckets: a list of (tile, piece) pairs.

Heads are further buckets of one longer sequence.

Shape letters: M keys and Q queries of the heads together; L length, R rounds, C tile, P piece, N
tiles, of which the last is nobody's; W pairs that there can be.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.quantized.rows import IN_BOUNDS, rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of one call.

    Attributes:
      length: L.
      n_heads: heads of keys that are computed as one sequence.
      group: heads of queries that share one of keys.
      n_buckets: of a head.
      n_rounds: R, with buckets of their own.
      n_keys: how many keys of its bucket a query sees in a round.
      local_len: how many keys near by it sees; 0 for none.
      n_sinks: how many of the first keys it sees.
      causal: whether a query sees positions up to its own only.
      once: whether a key that is found several times counts once.
      scale: of the products.
      softcap: of the scores; None for no cap.
      dropout_rate: share of the probabilities that are set to zero.
      tile_len, piece_len: C and P.
      together: pairs that are computed at a time.
    """

    length: int
    n_heads: int
    group: int
    n_buckets: int
    n_rounds: int
    n_keys: int
    local_len: int
    n_sinks: int
    causal: bool
    once: bool
    scale: float
    softcap: float | None
    dropout_rate: float
    tile_len: int
    piece_len: int
    together: int

    @property
    def n_k(self) -> int:
        """Keys of the heads together, M."""
        return self.n_heads * self.length

    @property
    def n_q(self) -> int:
        """Queries of the heads together, Q."""
        return self.n_k * self.group

    @property
    def n_tiles(self) -> int:
        """Tiles that hold queries; the one after them is nobody's."""
        return -(-self.n_q // self.tile_len)

    @property
    def windows(self) -> tuple[tuple[int, bool], ...]:
        """How many keys are seen in each round, and whether these are the first of the bucket."""
        made = [(self.n_keys, False)] * self.n_rounds
        made += [(self.local_len, False)] * (self.local_len > 0)
        return (*made, *[(self.n_sinks, True)] * (self.n_sinks > 0))

    @property
    def max_pairs(self) -> int:
        """The most pairs that there can be, in whole groups of `together`."""
        n, widest = self.n_tiles, max(n for n, _ in self.windows)
        pairs = (n * widest + self.n_k) // self.piece_len + n
        return -(-pairs // self.together) * self.together


class Sets(NamedTuple):
    """The sets of one round.

    Attributes:
      query: ((N + 1)·C,) int32, the number of each query, sorted.
      low, high: ((N + 1)·C,) int32, the ranks that it sees.
      query_place: (Q,) int32, the place of each query in that order.
      key: (M + P,) int32, the number of the key of each rank.
      key_rank: (M,) int32, the rank of each key.
    """

    query: Any
    low: Any
    high: Any
    query_place: Any
    key: Any
    key_rank: Any


class Pairs(NamedTuple):
    """The pairs of tiles and pieces of one round.

    Attributes:
      tile: (W,) int32, the tile of each pair; N for no pair.
      start: (W,) int32, the rank of the piece's first key.
      n: () int32, how many there are.
    """

    tile: Any
    start: Any
    n: Any


def make_sets(plan: Plan, buckets: Any, segments: Any, window: Any, first: Any) -> Sets:
    """The sets of one round.

    Args:
      plan: the static description.
      buckets: of queries (Q,) and of keys (M,), int32, from 1 to n_heads·n_buckets; 0 for a query
        that sees nothing, and one more than all others for a key that nobody sees.
      segments: (M,) int32, the document of each key, never less than the one before; or None.
      window: () int32, how many keys a query sees.
      first: () bool, whether these are the first of its bucket.
    """
    by_group = _sorted(plan, buckets, segments)
    number, is_key, new = by_group
    n_before = jnp.cumsum(is_key, dtype=jnp.int32)  # keys up to each entry, itself included
    begin = lax.cummax(jnp.where(new, n_before - is_key.astype(jnp.int32), 0))
    last = jnp.append(new[1:], True)
    end = lax.cummin(jnp.where(last, n_before, plan.n_k), reverse=True)
    if plan.causal:
        low, high = jnp.maximum(begin, n_before - window), n_before
    else:
        before = (window + 1) // 2
        low = jnp.maximum(begin, n_before - before)
        high = jnp.minimum(end, n_before + window - before)
    low = jnp.where(first, begin, low)
    high = jnp.where(first, jnp.minimum(high if plan.causal else end, begin + window), high)
    # Entries in two orders of their own: those that are queries, and those that are keys.
    place = jnp.arange(len(number), dtype=jnp.int32)
    of_queries = _chosen(place, ~is_key, place - n_before, plan.n_q)
    of_keys = _chosen(place, is_key, n_before - 1, plan.n_k)
    query, low, high = (rows(x, of_queries) for x in (number, low, high))
    key = rows(number, of_keys)
    spare = (plan.n_tiles + 1) * plan.tile_len - plan.n_q
    return Sets(
        query=jnp.pad(query, (0, spare)),
        low=jnp.pad(jnp.minimum(low, high), (0, spare)),
        high=jnp.pad(high, (0, spare)),
        query_place=_inverse(query),
        key=jnp.pad(key, (0, plan.piece_len)),
        key_rank=_inverse(key),
    )


def make_pairs(plan: Plan, sets: Sets) -> Pairs:
    """The pairs of a tile of queries and a piece of keys in which something is seen."""
    n, c, p = plan.n_tiles, plan.tile_len, plan.piece_len
    seeing = sets.low < sets.high
    first = jnp.where(seeing, sets.low, plan.n_k).reshape(n + 1, c).min(1)
    last = jnp.where(seeing, sets.high, 0).reshape(n + 1, c).max(1)
    pieces = jnp.maximum(0, -(-(last - first) // p))
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    number = jnp.arange(plan.max_pairs, dtype=jnp.int32)
    tile = jnp.minimum(jnp.searchsorted(ends, number, side='right').astype(jnp.int32), n)
    start = rows(first, tile) + (number - rows(ends - pieces, tile)) * p
    return Pairs(tile, jnp.where(tile < n, start, 0), ends[-1])


def _sorted(plan: Plan, buckets: Any, segments: Any) -> tuple[Any, Any, Any]:
    """Keys and queries in one order: by bucket, document and position, a key before the queries.

    They come by position already, and so by document: a stable sort by bucket is enough.

    Returns:
      The number of each among the keys or the queries, whether it is a key, and whether it is the
      first of its bucket and document; (M + Q,).
    """
    length, group, kinds = plan.length, plan.group, plan.group + 1
    of_queries, of_keys = buckets
    of_queries = of_queries.reshape(plan.n_heads, group, length).swapaxes(1, 2)  # (G, L, group)
    bucket = jnp.concatenate([of_keys.reshape(plan.n_heads, length, 1), of_queries], 2)
    entry = jnp.arange(plan.n_k + plan.n_q, dtype=jnp.int32)
    bucket, entry = lax.sort((bucket.reshape(-1), entry), num_keys=1, is_stable=True)
    at, kind = entry // kinds, entry % kinds  # head · L + position; 0 for a key
    new = bucket != jnp.roll(bucket, 1)
    if segments is not None:
        document = rows(segments, at)
        new = new | (document != jnp.roll(document, 1))
    query = (at // length * group + kind - 1) * length + at % length
    return jnp.where(kind == 0, at, query), kind == 0, new.at[0].set(True)


def _chosen(values: Any, chosen: Any, place: Any, n: int) -> jax.Array:
    """The values that are chosen, n of them, each at its place."""
    at = jnp.where(chosen, place, n)
    return jnp.zeros(n, values.dtype).at[at].set(values, mode='drop')


def _inverse(order: jax.Array) -> jax.Array:
    """The place of each number in a permutation."""
    place = jnp.arange(len(order), dtype=jnp.int32)
    return jnp.zeros_like(order).at[order].set(place, unique_indices=True, **IN_BOUNDS)
