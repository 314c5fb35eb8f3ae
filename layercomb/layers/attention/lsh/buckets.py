"""What layers that hash have in common: their numbers of buckets, and their rotations."""

from __future__ import annotations

import math
from typing import Any

import jax

from layercomb.layers.attention.lsh.hashing import (
    automatic_buckets,
    check_buckets,
    factors_of,
    lsh_rotations,
    rotated_buckets,
    smallest_dtype,
    torch_rotations,
)
from layercomb.layers.core.layer import Layer


class Hashing(Layer):
    """Base of layers with fields n_hashes, chunk_len, n_buckets, max_len and seed."""

    needs_max_len = property(lambda self: self.n_buckets is None is self.max_len)

    def check_hashing(self: Any) -> None:
        """Raises ValueError for numbers of buckets that cannot be."""
        if self.n_buckets is not None:
            check_buckets(self.n_buckets)
        if self.rotations == 'torch' and 1 in factors_of(self.n_buckets or 2):
            raise ValueError(
                f"n_buckets={self.n_buckets!r}: torch's rotations make even numbers of buckets"
            )

    def check_decoding(self: Any) -> None:
        """Raises ValueError unless decoding has the number of buckets of training."""
        if self.needs_max_len:
            raise ValueError(
                f'{type(self).__name__}: decoding needs the number of buckets of training: give '
                'max_len= (or n_buckets=) when making the layer'
            )

    def factors(self: Any, length: int) -> tuple[int, ...]:
        """The factors of the number of buckets for a sequence of some length."""
        if self.n_buckets is None:
            return automatic_buckets(self.max_len or length, self.chunk_len)
        return factors_of(self.n_buckets)

    def bucket_dtype(self: Any, length: int) -> Any:
        """The smallest integer dtype that holds a bucket."""
        return smallest_dtype(math.prod(self.factors(length)))

    def drawn(self: Any, rng: Any, n_heads: int, depth: int, length: int) -> jax.Array:
        """Rotations (H, R, F, K): from a key, or keys of heads; from `seed` without one."""
        sizes: Any = {'n_buckets': self.factors(length), 'n_hashes': self.n_hashes}
        if rng is None and self.rotations == 'torch':
            return torch_rotations(self.seed, n_heads, depth, **sizes)
        key = jax.random.key(self.seed) if rng is None else rng
        return lsh_rotations(key, n_heads, depth, **sizes)

    def hashed(self: Any, x: jax.Array, rotations: jax.Array, length: int) -> jax.Array:
        """The buckets (B, H, R, T) of x (B, H, T, K), in the smallest dtype that holds one."""
        buckets = rotated_buckets(x, rotations, n_buckets=self.factors(length))
        return buckets.astype(self.bucket_dtype(length))
