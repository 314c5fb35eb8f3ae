"""The cache of LSH attention: keys, values, and their buckets."""

from __future__ import annotations

import jax

from layercomb.layers.attention.lsh import rings
from layercomb.layers.decoding.caches import KVCache


class LSHCache(KVCache):
    """What LSH attention keeps for decoding, with N = B·H lines.

    Attributes:
      mask: (B, L) bool, which positions are real.
      buckets: (N, L, R) unsigned, of each position in each round.
      rotations: (H, R, F, K), which make the buckets.
      rings: (N, R, n, C) int32, see `rings`; None where each position reads all others.
    """

    mask: jax.Array
    buckets: jax.Array
    rotations: jax.Array
    rings: jax.Array | None

    def seek(self, lengths: jax.Array) -> LSHCache:
        """The cache with rows at other positions, and rings of what is before these."""
        return super().seek(lengths).refilled()

    def refilled(self) -> LSHCache:
        """The cache with rings that hold the last positions before its own of each bucket."""
        if self.rings is None:
            return self
        made = rings.filled(self.rings, self.buckets, self.mask, self.position.rows)
        return self.replace(rings=made)
