"""`HashedAttention`: LSH attention with keys of their own, and keys near by in the same softmax.

Shape letters: B batch, H heads, G heads of keys and values, N = B·H, L length or room, T new
positions, K depth of queries and keys, D depth of values, R rounds, n buckets, C keys of a bucket.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import Any, Self

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.attention import tiles
from layercomb.layers.attention.by_head import as_it_is, by_head
from layercomb.layers.attention.lsh import rings
from layercomb.layers.attention.lsh.buckets import Hashing
from layercomb.layers.attention.selected.cache import PlacedCache
from layercomb.layers.attention.selected.core import Selecting, SelectingOptions
from layercomb.layers.core.mode import Mode
from layercomb.layers.state import segments as documents
from layercomb.trees import Tree


class HashedOptions(SelectingOptions, Hashing):
    """The fields that `HashedAttention`, which describes them, and its multi-head layer share."""

    _: KW_ONLY
    n_hashes: Size = 8
    chunk_len: Size = 8
    n_buckets: int | tuple[int, ...] | None = None
    seed: int = 0
    centred: bool = False


class HashedCache(PlacedCache):
    """The decoding cache of hashed attention.

    A key is put into the ring of its own bucket, and a query reads the ring of its own: that holds
    the last C keys of the bucket. Padding is in none.

    Attributes:
      k, v, mask, position, at, n_real: as of `PlacedCache`.
      buckets: (N, L, R) unsigned, of each key in each round.
      rotations: (H, R, F, K) float32, of the hash.
      by_bucket: (N, R, n, C) int32, positions; negative where there is none.
      total: (B·G, K) float32, the sum of the real keys.
    """

    buckets: jax.Array
    rotations: jax.Array
    by_bucket: jax.Array
    total: jax.Array

    def refilled(self) -> Self:
        """The cache with rings made again from its buckets, mask and positions."""
        ring = rings.filled(self.by_bucket, self.buckets, self.mask, self.position.rows)
        return super().refilled().replace(by_bucket=ring, total=_totals(self.k, self.there()))

    def cut(self, n: int) -> Self:
        """As of `PlacedCache`, with the buckets of these positions.

        Args:
          n: how many.
        """
        return super().cut(n).replace(buckets=self.buckets[:, :n])

    def pushed(self, position: jax.Array, real: jax.Array, **new: jax.Array) -> Self:
        """The cache with the next position of each row in its rings.

        Args:
          position: (B,) int32.
          real: (B,) bool, whether it is a real one.
          **new: its keys ``k`` (B·G, K), and their ``buckets`` (N, R).
        """
        n = len(self.buckets) // len(position)
        repeated = (jnp.repeat(x, n) for x in (position, real))
        by_bucket, _ = rings.push(self.by_bucket, new['buckets'], *repeated)
        total = self.total + _totals(new['k'][:, None], real[:, None])
        made = super().pushed(position, real, **new)
        return made.replace(by_bucket=by_bucket, total=total)


class HashedAttention(HashedOptions, Selecting):
    """LSH attention: q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) → (B, H, L, D).

    G divides H; head h of the queries reads head ⌊h·G/H⌋ of keys and values, which are repeated for
    each where several positions are computed. In each of R rounds queries and keys are hashed by
    the same rotations, and a query sees the last `chunk_len` keys of its bucket. In the same
    softmax it sees the last `local_len` keys, and the first `n_sinks`: see `selected_attention`.
    Hashing sees angles and the softmax products, so queries and keys should be of one length, as
    `HashedSelfAttention` makes them.

    Rotations are drawn from `rng` in training, and from `seed` in ``EVAL`` and ``PREDICT``. Buckets
    are a decision: ``RECORD`` keeps them, ``REPLAY`` takes them. In ``PREDICT`` a causal layer
    keeps keys, values and rings of the last keys of each bucket, with room for the length of the
    signature given to `init`; a new position reads R·C + `local_len` + `n_sinks` keys, those of
    ``EVAL``. Decoding needs `n_buckets` or `max_len`: the length of a cache would give other
    buckets.

    Attributes:
      n_hashes: R; may be changed after training.
      chunk_len: C.
      n_buckets: 1, an even number, or a tuple of such factors; None makes buckets that average half
        a chunk at `max_len` positions.
      max_len: the longest sequence, from which automatic buckets are made. None takes the input's
        length; a longer input then changes the buckets, and so the outputs, of earlier positions.
      causal: whether position t sees positions up to t only.
      masked: whether a fourth input (B, L) bool says which positions are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      local_len, n_sinks, duplicates, scale, softcap, heads_together: as of `selected_attention`.
      seed: of the rotations in ``EVAL`` and ``PREDICT``; layers with one seed share rotations.
      centred: whether a key is hashed as seen from the mean of the keys of its document up to it.
        Keys of a model that was trained with full attention point nearly one way, and hashing sees
        only directions.

    Raises:
      ValueError: for a number of buckets that is odd and not 1; for a sequence longer than
        `max_len`; or for ``PREDICT`` without `n_buckets` and `max_len`.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
    """

    rotations = 'jax'

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hashing()

    @property
    def n_keys(self) -> int:
        """C."""
        return self.chunk_len

    def n_buckets_of(self, length: int) -> int:
        """The number of buckets of a sequence."""
        return math.prod(self.factors(length))

    def draw(self, rng: Any, q: jax.Array, length: int, mode: Mode) -> tuple[Any, Any]:
        """Rotations (H, R, F, K), and the keys of dropout, one a head."""
        shape = q.shape[1], q.shape[3], length
        if not mode.is_training:
            return self.drawn(None, *shape), rng
        if rng is None:
            raise ValueError(
                f'{type(self).__name__} draws rotations in training: pass '
                'rng=jax.random.key(…) to apply'
            )
        keys = jax.vmap(jax.random.split)(tiles.keys_of_heads(rng, q.shape[1]))
        return self.drawn(keys[:, 0], *shape), keys[:, 1]

    def choose(self, q: Any, k: Any, mask: Any, segments: Any, drawn: Any) -> Tree:
        """Buckets of queries and of keys, both (B, H, R, L): rotations differ by head of queries.

        Args:
          q, k, mask, segments, drawn: as of `Selecting.choose`.
        """
        length, seen = q.shape[2], self._seen(k, mask, segments)
        return {
            'q': self.hashed(q, drawn, length),
            'k': self.hashed(_for_each(q.shape[1], seen), drawn, length),
        }

    def _seen(self, k: jax.Array, mask: Any, segments: Any) -> jax.Array:
        """Keys (B, G, L, K) as they are hashed."""
        if not self.centred:
            return k
        real = jnp.ones((len(k), k.shape[2]), bool) if mask is None else mask
        sums, counts = _sums(k, real), jnp.cumsum(real, 1, dtype=jnp.float32)
        if segments is not None:  # each document for itself: differences of sums would be noise
            first = documents.places(segments) == 0
            sums = _restarted(jnp.where(real[:, None, :, None], k, 0).astype(jnp.float32), first)
            counts = _restarted(real.astype(jnp.float32)[:, None, :, None], first)[:, 0, :, 0]
        return _about_mean(k, sums, counts)

    def buckets(self, chosen: Any, mask: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        """Those that were chosen."""
        return chosen['q'], chosen['k']

    def new_cache(self, q: Any, k: Any, v: Any) -> HashedCache:
        """An empty cache for signatures of q, k and v.

        Raises:
          ValueError: without `n_buckets` and `max_len`.
        """
        return HashedCache.unfilled(k, v, **self.empty_fields(q, k))

    def empty_fields(self, q: Any, k: Any) -> dict[str, jax.Array]:
        """What an empty cache has beside a `PlacedCache`, for signatures of queries and keys.

        Raises:
          ValueError: without `n_buckets` and `max_len`.
        """
        self.check_decoding()
        b, h, length, depth = q.shape
        n_buckets = math.prod(self.factors(length))
        return {
            'buckets': jnp.zeros((b * h, length, self.n_hashes), self.bucket_dtype(length)),
            'rotations': self.drawn(None, h, depth, length),
            'by_bucket': rings.empty(b * h, self.n_hashes, n_buckets, self.chunk_len),
            'total': jnp.zeros((b * k.shape[1], depth), jnp.float32),
        }

    def kept(self, cache: HashedCache, k: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
        """The buckets of new keys, (B, H, T, R).

        Args:
          cache, k, real: as of `Selecting.kept`.
        """
        if self.centred:
            sums = cache.by_row(cache.total)[:, :, None] + _sums(k, real)
            counts = cache.n_real[:, None] + jnp.cumsum(real, 1, dtype=jnp.int32)
            k = _about_mean(k, sums, counts.astype(jnp.float32))
        k = _for_each(len(cache.rotations), k)
        return {'buckets': self.hashed(k, cache.rotations, cache.room).swapaxes(2, 3)}

    def chosen_in(self, cache: HashedCache, q: jax.Array) -> Tree:
        """Buckets of queries and of the keys in the cache, both (B, H, R, L)."""
        of_keys = cache.by_row(cache.buckets).swapaxes(2, 3)
        return {'q': self.hashed(q, cache.rotations, cache.room), 'k': of_keys}

    def found(self, cache: HashedCache, q: jax.Array) -> jax.Array:
        """The rings of the queries' buckets: (N, R·C) positions, negative where there is none."""
        buckets = self.hashed(q[:, :, None], cache.rotations, cache.room)  # (B, H, R, 1)
        buckets = buckets.reshape(-1, self.n_hashes).astype(jnp.int32)
        n = jnp.arange(len(buckets), dtype=jnp.int32)[:, None]
        rounds = jnp.arange(self.n_hashes, dtype=jnp.int32)[None]
        return cache.by_bucket[n, rounds, buckets].reshape(len(buckets), -1)


by_head.register(HashedAttention)(as_it_is)


def _about_mean(k: jax.Array, sums: jax.Array, counts: jax.Array) -> jax.Array:
    """k − sums / counts, for keys and sums (B, G, T, K) and counts (B, T)."""
    mean = sums / jnp.maximum(counts, 1.0)[:, None, :, None]
    return k - mean.astype(k.dtype)


def _sums(k: jax.Array, real: jax.Array) -> jax.Array:
    """Sums of the real keys (B, G, T, K) up to each, float32."""
    counted = jnp.where(real[:, None, :, None], k, 0).astype(jnp.float32)
    return jnp.cumsum(counted, 2)


def _restarted(x: jax.Array, first: jax.Array) -> jax.Array:
    """Sums of x (B, G, L, K) up to each position, from the last one that is a first one (B, L)."""

    def join(before: Any, after: Any) -> Any:
        (x, new), (y, its_new) = before, after
        return jnp.where(its_new, y, x + y), new | its_new

    new = jnp.broadcast_to(first[:, None, :, None], x.shape)
    return jax.lax.associative_scan(join, (x, new), axis=2)[0]


def _totals(k: jax.Array, real: jax.Array) -> jax.Array:
    """Sums of the real keys (B·G, L, K) of rows (B, L): (B·G, K) float32."""
    real = jnp.repeat(real, len(k) // len(real), 0)
    return jnp.where(real[..., None], k, 0).astype(jnp.float32).sum(1)


def _for_each(n_heads: int, k: jax.Array) -> jax.Array:
    """Keys (B, G, T, K) for each head of queries, (B, H, T, K)."""
    return jnp.repeat(k, n_heads // k.shape[1], 1)
