"""The cache of LSH attention: keys, values, and their buckets."""

from __future__ import annotations

import jax

from layercomb.layers.attention.lsh import rings
from layercomb.layers.decoding.caches import KVCache


class LSHCache(KVCache):
    """The decoding cache of LSH attention, with N = B·H lines.

    Attributes:
      k: (N, L, K), the queries, which serve as keys.
      v: (N, L, V).
      mask: (B, L) bool, True = a real position.
      position: how many positions each row has taken.
      buckets: (N, L, R) unsigned, of each position in each round.
      rotations: (H, R, F, K) float32, of the hash.
      rings: (N, R, n, C) int32, see `rings`; None where each position reads all others.
    """

    mask: jax.Array
    buckets: jax.Array
    rotations: jax.Array
    rings: jax.Array | None

    def seek(self, lengths: jax.Array) -> LSHCache:
        """The cache with each row at another position, and rings of the positions before it.

        Args:
          lengths: (B,) int32.
        """
        return super().seek(lengths).refilled()

    def refilled(self) -> LSHCache:
        """The cache with rings made again from its buckets, mask and positions."""
        if self.rings is None:
            return self
        made = rings.filled(self.rings, self.buckets, self.mask, self.position.rows)
        return self.replace(rings=made)
