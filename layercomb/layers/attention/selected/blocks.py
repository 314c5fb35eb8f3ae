"""`BlockAttention`: each query sees the blocks of keys whose mean it likes best.

Shape letters: B batch, H heads, G heads of keys and values, L length or room, K depth of queries
and keys, D depth of values, C block, N whole blocks that there can be, J chosen blocks.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, Self

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.attention.by_head import as_it_is, by_head
from layercomb.layers.attention.lsh.hashing import smallest_dtype
from layercomb.layers.attention.selected.cache import PlacedCache
from layercomb.layers.attention.selected.choice import (
    Blocks,
    best_blocks,
    block_numbers,
    chosen_blocks,
)
from layercomb.layers.attention.selected.core import Selecting, SelectingOptions


class BlockOptions(SelectingOptions):
    """The fields that `BlockAttention`, which describes them, and its multi-head layer share."""

    _: KW_ONLY
    n_chosen: Size = 4
    block_len: Size = 16


class BlockCache(PlacedCache):
    """The decoding cache of attention to blocks.

    The sum of a block's keys is kept in C rows of w = ⌈K/C⌉ numbers, one after the other, so that
    every array has the length of the room.

    Attributes:
      k, v, mask, position, at, n_real: as of `PlacedCache`.
      sums: (B·G, L, w) float32, of the keys of each block so far.
      block_len: (B,) int32, C.
    """

    sums: jax.Array
    block_len: jax.Array

    def refilled(self) -> Self:
        """The cache with sums made again from its keys, mask and positions."""
        there = self.there()
        place = jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
        to = self._starts(jnp.where(there, place // self.block_len[:, None], self.room))

        def added(k: jax.Array, at: jax.Array) -> jax.Array:  # (L, K), (L,) → (L·w,)
            zeros = jnp.zeros(self.sums.shape[1] * self.sums.shape[2], jnp.float32)
            at = at[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
            return zeros.at[at].add(k.astype(jnp.float32), mode='drop')

        sums = jax.vmap(added)(self.k, to).reshape(self.sums.shape)
        return super().refilled().replace(sums=sums)

    def pushed(self, position: jax.Array, real: jax.Array, **new: jax.Array) -> Self:
        """The cache with the next key of each row in the sum of its block.

        Args:
          position: (B,) int32.
          real: (B,) bool, whether it is a real one.
          **new: its keys ``k`` (B·G, K).
        """
        block = jnp.where(real, self.n_real // self.block_len, self.room)
        to = self._starts(block[:, None])  # (B·G, 1)
        at = to + jnp.arange(self.k.shape[2], dtype=jnp.int32)[None]
        row = jnp.arange(len(to), dtype=jnp.int32)[:, None]
        flat = self.sums.reshape(len(to), -1)  # (B·G, L·w)
        flat = flat.at[row, at].add(new['k'].astype(jnp.float32), mode='drop')
        made = super().pushed(position, real, **new)
        return made.replace(sums=flat.reshape(self.sums.shape))

    def _starts(self, block: jax.Array) -> jax.Array:
        """Where the sums of blocks (B, T) begin among the L·w numbers of a head: (B·G, T)."""
        starts = block * self.block_len[:, None] * self.sums.shape[2]
        return jnp.repeat(starts, len(self.k) // len(starts), 0)

    def blocks(self, block_len: int) -> Blocks:
        """Its blocks of C keys; those that are unfinished have numbers too."""
        n, width = max(1, self.room // block_len), block_len * self.sums.shape[2]
        flat = self.sums.reshape(len(self.sums), -1)
        flat = jnp.pad(flat, ((0, 0), (0, max(0, n * width - flat.shape[1]))))
        sums = flat[:, : n * width].reshape(-1, n, width)[..., : self.k.shape[2]]  # (B·G, N, K)
        b = len(self.n_real)
        number = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (b, n))
        return Blocks(self.by_row(sums) / block_len, jnp.zeros_like(number), number)


class BlockAttention(BlockOptions, Selecting):
    """Attention to blocks by choice: q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) → (B, H, L, D).

    G divides H; head h of the queries reads head ⌊h·G/H⌋ of keys and values. Keys are cut into
    blocks of C. A query t sees its own block and the J whole ones b with the greatest
    q_t · mean(k in b): if causal of those before its own, and of its own block no later keys. In
    the same softmax it sees the last `local_len` keys, and the first `n_sinks`. See
    `chosen_blocks` for the choice and `selected_attention` for the rest. No gradient goes through
    the choice: a block is liked as its keys are.

    The choice is a decision: ``RECORD`` keeps it, ``REPLAY`` takes it. In ``PREDICT`` a causal
    layer keeps keys, values and the sums of blocks, with room for the length of the signature given
    to `init`; a new position compares L/C means, and reads (J + 1)·C + `local_len` + `n_sinks`
    keys, those of ``EVAL``.

    Attributes:
      n_chosen: J; may be changed after training.
      block_len: C. Small blocks are chosen best; L²·K / C products choose.
      max_len: the longest sequence; None for any.
      causal: whether position t sees positions up to t only.
      masked: whether a fourth input (B, L) bool says which positions are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      local_len, n_sinks, duplicates, scale, softcap, heads_together: as of `selected_attention`.

    Raises:
      ValueError: for a sequence longer than `max_len`.

    References:
      MoBA, Lu et al. 2025, https://arxiv.org/abs/2502.13189
      FlashMoBA, Xiao et al. 2025, https://arxiv.org/abs/2511.11571
      NSA, Yuan et al. 2025, https://arxiv.org/abs/2502.11089
    """

    @property
    def n_keys(self) -> int:
        """A block, on both sides of a position that is not in it."""
        return self.block_len if self.causal else 2 * self.block_len

    @property
    def own_is_near(self) -> bool:
        """Whether what a query sees of its own block is among the last `local_len` keys."""
        return self.causal and self.duplicates == 'once' and self.local_len >= self.block_len

    def n_buckets_of(self, length: int) -> int:
        """Blocks of a sequence, and one for what is missing."""
        return -(-length // self.block_len) + 1

    def choose(self, q: Any, k: Any, mask: Any, segments: Any, drawn: Any) -> jax.Array:
        """The blocks of queries, (B, H, R, L).

        Args:
          q, k, mask, segments, drawn: as of `Selecting.choose`.
        """
        n = self.n_buckets_of(q.shape[2])
        found = chosen_blocks(
            q,
            k,
            block_len=self.block_len,
            n_chosen=self.n_chosen,
            causal=self.causal,
            mask=mask,
            segments=segments,
        )
        return found.astype(smallest_dtype(n))

    def buckets(self, chosen: Any, mask: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        """The chosen blocks and its own, of each query; and the block of each key (B, 1, 1, L)."""
        b, h, _, length = chosen.shape
        own = block_numbers(b, length, self.block_len, mask, segments)
        chosen = chosen.astype(jnp.int32)
        if not self.own_is_near:
            of_each = jnp.broadcast_to(own[:, None, None], (b, h, 1, length))
            chosen = jnp.concatenate([chosen, of_each], 2)
        return chosen, own[:, None, None]

    def new_cache(self, q: Any, k: Any, v: Any) -> BlockCache:
        """An empty cache for signatures of q, k and v."""
        return BlockCache.unfilled(k, v, **self.empty_fields(k))

    def empty_fields(self, k: Any) -> dict[str, jax.Array]:
        """What an empty cache has beside a `PlacedCache`, for the signature of the keys."""
        b, g, length, depth = k.shape
        sums = jnp.zeros((b * g, length, -(-depth // self.block_len)), jnp.float32)
        return {'sums': sums, 'block_len': jnp.full(b, self.block_len, jnp.int32)}

    def kept(self, cache: BlockCache, k: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
        """Nothing beside keys."""
        return {}

    def chosen_in(self, cache: BlockCache, q: jax.Array) -> jax.Array:
        """As `choose`, from the keys of a cache."""
        return self.choose(q, cache.by_row(cache.k), cache.there(), None, None)

    def found(self, cache: BlockCache, q: jax.Array) -> jax.Array:
        """The positions of the blocks that queries choose, and of their own: (B·H, J'·C)."""
        b, h, _ = q.shape
        own = jnp.maximum(cache.n_real - 1, 0)[:, None] // self.block_len  # (B, 1)
        blocks, ids = cache.blocks(self.block_len), jnp.zeros_like(own)
        n = min(self.n_chosen, blocks.number.shape[1])
        numbers = best_blocks(q[:, :, None], blocks, ids, own, n, True, -1)[..., 0]  # (B, H, n)
        if not self.own_is_near:
            own = jnp.broadcast_to(own[:, None], (b, h, 1))
            numbers = jnp.concatenate([numbers, own], 2)
        within = jnp.arange(self.block_len, dtype=jnp.int32)[None, None, None]
        places = numbers[..., None] * self.block_len + within  # (B, H, J', C)
        return cache.of_places(places).reshape(b * h, -1)


by_head.register(BlockAttention)(as_it_is)
