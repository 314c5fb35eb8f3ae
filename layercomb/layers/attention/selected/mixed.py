"""`MixedAttention`: hashing finds single keys, and blocks by choice what stands together.

Shape letters: B batch, H heads, G heads of keys and values, L length, K depth of queries and keys,
D depth of values, R rounds, C keys of a bucket or block, J chosen blocks.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.attention.by_head import as_it_is, by_head
from layercomb.layers.attention.selected.blocks import BlockAttention, BlockCache
from layercomb.layers.attention.selected.hashed import (
    HashedAttention,
    HashedCache,
    HashedOptions,
)
from layercomb.trees import Tree


class MixedOptions(HashedOptions):
    """The fields that `MixedAttention`, which describes them, and its multi-head layer share."""

    _: KW_ONLY
    n_hashes: Size = 5
    n_chosen: Size = 3


class MixedCache(HashedCache, BlockCache):
    """The decoding cache of both.

    Attributes:
      k, v, mask, position, at, n_real, buckets, rotations, by_bucket, total: as of `HashedCache`.
      sums, block_len: as of `BlockCache`.
    """


class MixedAttention(MixedOptions, HashedAttention):
    """Hashing and blocks in one: q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) → (B, H, L, D).

    A query sees the last C keys of its bucket in each of R rounds, as `HashedAttention` says, the J
    blocks of C keys whose mean it likes best and its own, as `BlockAttention` says, the last
    `local_len` keys and the first `n_sinks`; a key that is found several times counts once. Not
    causal, blocks have ⌊C/2⌋ keys, so that as many are before a query as in a round.

    Blocks are learnt early and find what stands together, hashing finds single keys that lie
    anywhere. Choosing blocks takes L²·K / C products, which tells from some 100,000 positions on:
    there hashing alone is linear.

    Attributes:
      n_hashes: R.
      chunk_len: C, of buckets and of blocks.
      n_chosen: J.
      n_buckets, max_len, causal, masked, dropout, local_len, n_sinks, duplicates, scale, softcap,
        heads_together, seed, centred: as of `HashedAttention`.

    Raises:
      ValueError: for a `chunk_len` of 1 that is not causal, or as of `HashedAttention`.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
      MoBA, Lu et al. 2025, https://arxiv.org/abs/2502.13189
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal and self.chunk_len < 2:
            raise ValueError(
                f'MixedAttention: chunk_len={self.chunk_len} leaves no key behind a query: give 2 '
                'or more where causal is False'
            )

    @property
    def blocks(self) -> BlockAttention:
        """What chooses blocks."""
        return BlockAttention(
            n_chosen=self.n_chosen,
            block_len=self.chunk_len if self.causal else self.chunk_len // 2,
            local_len=self.local_len,
            causal=self.causal,
            duplicates=self.duplicates,
        )

    def n_buckets_of(self, length: int) -> int:
        """Of hashing or of blocks, whichever are more."""
        return max(super().n_buckets_of(length), self.blocks.n_buckets_of(length))

    def choose(self, q: Any, k: Any, mask: Any, segments: Any, drawn: Any) -> Tree:
        """Buckets of queries and of keys, (B, H, R, L), and the blocks of queries, (B, H, J, L).

        Args:
          q, k, mask, segments, drawn: as of `Selecting.choose`.
        """
        hashed: Any = super().choose(q, k, mask, segments, drawn)
        return {**hashed, 'blocks': self.blocks.choose(q, k, mask, segments, None)}

    def buckets(self, chosen: Any, mask: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        """Those of hashing, and then those of blocks."""
        blocks, own = self.blocks.buckets(chosen['blocks'], mask, segments)
        own = jnp.broadcast_to(own, blocks.shape)
        of_queries, of_keys = (chosen[name].astype(jnp.int32) for name in ('q', 'k'))
        return jnp.concatenate([of_queries, blocks], 2), jnp.concatenate([of_keys, own], 2)

    def new_cache(self, q: Any, k: Any, v: Any) -> MixedCache:
        """An empty cache for signatures of q, k and v.

        Raises:
          ValueError: without `n_buckets` and `max_len`.
        """
        fields = self.empty_fields(q, k) | self.blocks.empty_fields(k)
        return MixedCache.unfilled(k, v, **fields)

    def chosen_in(self, cache: Any, q: jax.Array) -> Tree:
        """As `choose`, from a cache."""
        hashed: Any = super().chosen_in(cache, q)
        return {**hashed, 'blocks': self.blocks.chosen_in(cache, q)}

    def found(self, cache: Any, q: jax.Array) -> jax.Array:
        """The positions of rings and of blocks, (B·H, R·C + J'·C); negative where there is none."""
        return jnp.concatenate([super().found(cache, q), self.blocks.found(cache, q)], 1)


by_head.register(MixedAttention)(as_it_is)
