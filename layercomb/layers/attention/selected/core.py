"""`Selecting`: what cores that select their keys have in common.

Shape letters: B batch, H heads, G heads of keys and values, L length, T new positions, K depth of
queries and keys, D depth of values, J keys that one query finds.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Positive, Rate, Size
from layercomb.layers.attention.devices.exchange import Exchange
from layercomb.layers.attention.multihead import dropout_arguments
from layercomb.layers.attention.selected.arrays import check_arrays
from layercomb.layers.attention.selected.cache import PlacedCache, parts, placed
from layercomb.layers.attention.selected.function import selected_attention
from layercomb.layers.attention.selected.reading import next_attention
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import poison_overflow, refuse_overflow
from layercomb.layers.decoding.seek import held
from layercomb.layers.facts.sequence import sequence_parts
from layercomb.layers.positions.position import check_length
from layercomb.layers.state.decisions import decide
from layercomb.layers.state.segments import segments_of
from layercomb.shapes import Signature
from layercomb.trees import Tree
from layercomb_kernels import Reading


class SelectingOptions(Layer):
    """The fields that all cores that select, and their multi-head layers, share."""

    _: KW_ONLY
    max_len: Size | None = None
    local_len: int = 32
    n_sinks: int = 0
    causal: bool = True
    masked: bool = False
    dropout: Rate = 0.0
    duplicates: Literal['once', 'count'] = 'once'
    scale: float | None = None
    softcap: Positive | None = None
    heads_together: Size | None = None


class Selecting(SelectingOptions):
    """Base of the cores: q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) → (B, H, L, D).

    A subclass says by buckets what a query sees (`choose`), and what its cache keeps (`new_cache`,
    `kept`, `found`). Buckets are a decision: ``RECORD`` keeps them, ``REPLAY`` takes them.
    """

    position_wise = False
    sees_segments = True
    spans_devices = True
    n_in = property(lambda self: 3 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_len < 0 or self.n_sinks < 0:
            raise ValueError(
                f'local_len={self.local_len} and n_sinks={self.n_sinks} are at least 0'
            )

    def n_buckets_of(self, length: int) -> int:
        """The number of buckets of a sequence."""
        raise NotImplementedError

    @property
    def n_keys(self) -> int:
        """How many keys of a bucket a query sees."""
        raise NotImplementedError

    def choose(self, q: Any, k: Any, mask: Any, segments: Any, drawn: Any) -> Any:
        """The decision: a tree of integers (B, H, …).

        Args:
          q, k: (B, H, L, K) and (B, G, L, K).
          mask: (B, L) bool; or None.
          segments: (B, L) int32; or None.
          drawn: what `draw` gave, (H, …).
        """
        raise NotImplementedError

    def buckets(self, chosen: Any, mask: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
        """The buckets of queries (B, H, R, L) and of keys, likewise or (B, 1, 1, L).

        Args:
          chosen: what `choose` gave.
          mask, segments: as of `choose`.
        """
        raise NotImplementedError

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """No weights. The state is a cache in ``PREDICT`` if causal, else ``{}``.

        Args:
          signature: of q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) and, if masked, mask (B, L).
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if L exceeds `max_len`; or as the class says, in ``PREDICT``.
        """
        q, k, v, *_ = signature
        check_length(type(self).__name__, q.shape[2], self.max_len)
        if mode is not Mode.PREDICT or not self.causal:
            return {}, {}
        return {}, self.new_cache(q, k, v)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """y (B, H, L, D), in the dtype of v, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT``, if causal, a cache; in ``REPLAY`` the recorded buckets.
          inputs: q (B, H, L, K), k (B, G, L, K), v (B, G, L, D) and, if masked, mask (B, L) bool.
            With a cache all of them hold the next T positions; several take as long as all that
            came before them, in steps of 512, 4,096, 32,768 … positions.
          rng: a typed key, or one for every head (H,); needed in training if anything is drawn.
          mode: see `Mode`.

        Raises:
          ValueError: if L exceeds `max_len`, the cache overflows, or training has no key.
        """
        q, k, v, *masks = inputs
        check_arrays(q, k, v, masks[0] if masks else None, segments_of(state))
        if mode is Mode.PREDICT and self.causal:
            return self._extend(held(state, PlacedCache), q, k, v, *masks)
        length = q.shape[2] * sequence_parts()
        check_length(type(self).__name__, length, self.max_len)
        drawn, rng = self.draw(rng, q, length, mode)
        heads = Exchange.of(q.shape[1], k.shape[1])
        q, k, v = heads.queries(q), heads.shared(k), heads.shared(v)
        drawn = None if drawn is None else heads.its(drawn)
        mask, segments = heads.rows(masks[0] if masks else None), heads.rows(segments_of(state))
        chosen, state = decide(
            mode, state, 'buckets', lambda: self.choose(q, k, mask, segments, drawn)
        )
        further = dropout_arguments(self.dropout, heads.keys(rng), mode)
        return (heads.back(self._attend(q, k, v, chosen, mask, segments, **further)),), state

    def draw(self, rng: Any, q: jax.Array, length: int, mode: Mode) -> tuple[Any, Any]:
        """What the choice draws, (H, …), and the random key of dropout; by default nothing.

        Args:
          rng: a typed key, or one a head; None outside training.
          q: (B, H, …, K).
          length: of the sequence.
          mode: see `Mode`.
        """
        return None, rng

    def _attend(
        self, q: Any, k: Any, v: Any, chosen: Any, mask: Any, segments: Any = None, **more: Any
    ) -> jax.Array:
        of_queries, of_keys = self.buckets(chosen, mask, segments)
        if of_keys.shape[1] == q.shape[1]:  # each head of queries sorts keys in its own way
            k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
        shape = (*k.shape[:2], *of_queries.shape[2:])
        return selected_attention(
            q,
            k,
            v,
            of_queries,
            jnp.broadcast_to(of_keys, shape),
            n_buckets=self.n_buckets_of(q.shape[2]),
            n_keys=self.n_keys,
            local_len=self.local_len,
            n_sinks=self.n_sinks,
            causal=self.causal,
            mask=mask,
            segments=segments,
            duplicates=self.duplicates,
            scale=self.scale,
            softcap=self.softcap,
            heads_together=self.heads_together,
            **more,
        )

    # In PREDICT.

    def new_cache(self, q: Any, k: Any, v: Any) -> Any:
        """An empty cache for signatures of q, k and v."""
        raise NotImplementedError

    def kept(self, cache: Any, k: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
        """What the cache keeps of new keys (B, G, T, K) beside them, by name, (B, heads, T, …).

        Args:
          cache: before them.
          k: the keys.
          real: (B, T) bool, which of them are real.
        """
        raise NotImplementedError

    def chosen_in(self, cache: Any, q: jax.Array) -> Any:
        """As `choose`, from a cache: q (B, H, L, K) has zeros but for the new positions."""
        raise NotImplementedError

    def found(self, cache: Any, q: jax.Array) -> jax.Array:
        """Positions that the queries (B, H, K) of the last position choose; (B·H, J), or < 0."""
        raise NotImplementedError

    def _extend(self, cache: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        position, length, room = cache.position.rows, q.shape[2], cache.room
        refuse_overflow(position, length, room)
        real = jnp.ones((q.shape[0], length), bool) if mask is None else mask
        kept = self.kept(cache, k, real)
        cache = cache.append(position, k=k, v=v, mask=real, **kept)
        if length == 1:
            # The first new key of each head, without its axis of positions.
            new = {name: x.reshape(-1, *x.shape[3:]) for name, x in {'k': k, **kept}.items()}
            cache = cache.pushed(position, real[:, 0], **new)
            y = self._next(cache, q, real[:, 0])
        else:
            lengths = parts(length, room)
            which = (position.max() + length > np.array(lengths[:-1], np.int32)).sum()
            among = [functools.partial(self._among, n) for n in lengths]
            y = jax.lax.switch(which.astype(jnp.int32), among, cache, q, position)
            cache = cache.refilled()
        return (poison_overflow(y, position, length, room),), cache

    def _among(self, n: int, cache: Any, q: jax.Array, position: jax.Array) -> jax.Array:
        """Attention of T positions of each row, which are among the first n: (B, H, T, D)."""
        cache = cache.cut(n)
        queries, there = placed(q, position, n), cache.there()
        keys, values = cache.by_row(cache.k), cache.by_row(cache.v)
        y = self._attend(queries, keys, values, self.chosen_in(cache, queries), there)
        return jax.vmap(lambda y, at: jax.lax.dynamic_slice_in_dim(y, at, q.shape[2], 1))(
            y, position
        )

    def _next(self, cache: Any, q: jax.Array, real: jax.Array) -> jax.Array:
        """Attention of one position of each row, (B, H, 1, D)."""
        b, h, _, depth = q.shape
        q = q.reshape(b, h, depth)
        reading = Reading(
            local_len=self.local_len,
            n_sinks=self.n_sinks,
            once=self.duplicates == 'once',
            scale=depth**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
        )
        y = next_attention(reading, q.reshape(b * h, depth), self.found(cache, q), cache, real)
        return y.reshape(b, h, 1, -1).astype(cache.v.dtype)
