"""The cores of attention layers: functions of queries, keys and values, with decoding caches.

Shape letters: B batch, L length, D d_model, H heads, G heads of keys and values, K head depth, M
memory length or room in a cache, T new positions.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Positive, Rate, Size
from layercomb.layers.attention.by_head import as_it_is, by_head
from layercomb.layers.attention.cached import cached_attention
from layercomb.layers.attention.devices.exchange import Exchange
from layercomb.layers.attention.devices.ring import over_devices
from layercomb.layers.attention.functions import dot_product_attention, local_attention
from layercomb.layers.attention.multihead import dropout_arguments
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import KVCache, poison_overflow, refuse_overflow
from layercomb.layers.decoding.narrow import CacheBits, Kept, is_narrow, widened
from layercomb.layers.decoding.seek import held
from layercomb.layers.facts.sequence import sequence_parts
from layercomb.layers.state.segments import segments_of
from layercomb.shapes import Signature
from layercomb.trees import Tree


class DotProductAttention(Layer):
    """y = softmax(q kᵀ / √K) v, block by block.

    q (B, H, L, K), k (B, G, M, K), v (B, G, M, V) → y (B, H, L, V). G divides H; head h of the
    queries reads head ⌊h·G/H⌋ of keys and values.

    In ``PREDICT`` a causal layer caches keys and values, with room for the length of the signature
    given to `init`, and takes the next position or positions. A call that overflows the cache
    raises a ValueError; inside `jit`, where positions are not known, the rows concerned become NaN.

    With a `window` W, position t sees positions t − W + 1 … t only. Time is linear in the length,
    and in ``PREDICT`` T new positions read T + W − 1 places of the cache.

    Attributes:
      causal: whether position t sees positions up to t only.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      masked: whether a fourth input (B, M) bool says which keys are real.
      scale: factor of the scores, 1/√K if None.
      softcap: c, which makes scores, after the scale, c·tanh(scores / c); None for no cap.
      window: how many positions one sees, itself included; causal only. None for all before it.
      relative: whether the fourth input is a bias (N, H) of the scores for each distance, which
        `RelativeBias` makes; a mask then comes after it.
      cache_bits: 16 or 8, in which keys and values are cached: bfloat16, or int8 with a scale for
        each position and head. None caches them in their dtype.

    Raises:
      ValueError: for a window without `causal`.
    """

    causal: bool = True
    dropout: Rate = 0.0
    masked: bool = False
    _: KW_ONLY
    scale: float | None = None
    softcap: Positive | None = None
    window: Size | None = None
    relative: bool = False
    cache_bits: CacheBits | None = None

    position_wise = False
    sees_segments = True
    spans_devices = True
    n_in = property(lambda self: 3 + self.relative + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and not self.causal:
            raise ValueError(
                f'window={self.window} is of causal attention: leave causal=True, or use '
                'LocalSelfAttention(…, causal=False), whose chunks see both ways'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """No weights. The state is a `KVCache` in ``PREDICT`` if causal, else ``{}``.

        Args:
          signature: of q (B, H, L, K), k (B, G, M, K), v (B, G, M, V), bias (N, H) if relative, and
            mask (B, M) if masked.
          rng: not used.
          mode: see `Mode`.
        """
        _, k, v, *_ = signature
        decodes = mode is Mode.PREDICT and self.causal
        return {}, KVCache.empty(k, v, self.masked, bits=self.cache_bits) if decodes else {}

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """y (B, H, L, V), in the dtype of v, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT``, if causal, a `KVCache` with room for M positions.
          inputs: q (B, H, L, K), k (B, G, M, K), v (B, G, M, V), bias (N, H) if relative, and mask
            (B, M) bool if masked. With a cache all but the bias hold the next T positions.
          rng: a typed key, needed in training with dropout.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, the cache overflows, or dropout has no key.
        """
        q, k, v, *more = inputs
        bias = more.pop(0) if self.relative else None
        mask = more.pop() if self.masked else None
        if mode is Mode.PREDICT and self.causal:
            return self._extend(held(state, KVCache), q, k, v, mask, bias)
        further = {'segments': segments_of(state), **dropout_arguments(self.dropout, rng, mode)}
        further |= {'causal': self.causal, 'mask': mask, 'bias': bias}
        return (over_devices(q, k, v, **self._options, **further),), state

    @property
    def _options(self) -> dict[str, Any]:
        return {'window': self.window, 'scale': self.scale, 'softcap': self.softcap}

    def _extend(self, cache: KVCache, q: Any, k: Any, v: Any, mask: Any, bias: Any) -> Any:
        position, length, room = cache.position.rows, q.shape[2], cache.room
        refuse_overflow(position, length, room)
        cache = cache.append(position, k=k, v=v, mask=mask)
        keys, values, real = cache.by_row(cache.k), cache.by_row(cache.v), cache.mask
        offset = position
        if self.window is not None and length + self.window - 1 < room:
            size = length + self.window - 1  # the keys that the new positions see
            start = jnp.clip(position - self.window + 1, 0, room - size)  # (B,)
            keys, values = pieces(keys, start, size), pieces(values, start, size)
            real = None if real is None else pieces(real, start, size)
            offset = position - start
        more = {'mask': real, 'offset': offset, 'bias': bias, **self._options}
        y = cached_attention(q, keys, values, v.dtype, **more)
        return (poison_overflow(y, position, length, room),), cache


def pieces(x: Kept, start: jax.Array, size: int) -> Kept:
    """A slice of positions of each row, each from its own start.

    Args:
      x: (B, H, L, K), or (B, L); or a tree of such.
      start: (B,) int32.
      size: how many positions.

    Returns:
      (B, H, size, K), or (B, size).
    """

    def one(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, max(x.ndim - 2, 0))

    return jax.tree.map(lambda x: jax.vmap(one)(x, start), x)


class LocalAttention(Layer):
    """Softmax attention of each position to its own chunk and the chunks around it.

    q (B, H, L, K), k (B, G, L, K), v (B, G, L, V) → y (B, H, L, V), heads as of
    `DotProductAttention`.

    The sequence is cut into chunks of `chunk_len`. Position t sees positions from the start of
    chunk ⌊t / chunk_len⌋ − look_back, up to itself if causal, else to the end of chunk
    ⌊t / chunk_len⌋ + look_ahead. Time and memory are linear in the length.

    In ``PREDICT`` a causal layer caches keys and values as `DotProductAttention` does, but a new
    position reads only the chunks it sees.

    Attributes:
      chunk_len: positions in a chunk; the length need not be a multiple.
      look_back: chunks seen before a position's own.
      look_ahead: chunks seen after it; 0 if causal.
      causal: whether position t sees positions up to t only.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      masked: whether a fourth input (B, L) bool says which keys are real.
      scale, softcap, cache_bits: as of `DotProductAttention`.

    Raises:
      ValueError: for a negative look_back or look_ahead, or a causal layer that looks ahead.
    """

    chunk_len: Size
    look_back: int = 1
    look_ahead: int = 0
    causal: bool = True
    dropout: Rate = 0.0
    masked: bool = False
    _: KW_ONLY
    scale: float | None = None
    softcap: Positive | None = None
    cache_bits: CacheBits | None = None

    position_wise = False
    sees_segments = True
    spans_devices = True
    n_in = property(lambda self: 3 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.look_back, self.look_ahead) < 0 or (self.causal and self.look_ahead):
            raise ValueError(
                f'LocalAttention: look_back={self.look_back} and look_ahead={self.look_ahead} must '
                'not be negative, and causal attention needs look_ahead=0'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """No weights. The state is a `KVCache` in ``PREDICT`` if causal, else ``{}``.

        Args:
          signature: of q (B, H, L, K), k (B, G, L, K), v (B, G, L, V) and, if masked, mask
            (B, L).
          rng: not used.
          mode: see `Mode`.
        """
        _, k, v, *_ = signature
        if mode is not Mode.PREDICT or not self.causal:
            return {}, {}
        front, behind = self._padding
        length = front + k.shape[2] + behind
        return {}, KVCache.empty(k, v, masked=True, length=length, bits=self.cache_bits)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """y (B, H, L, V), in the dtype of v, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT``, if causal, a `KVCache`.
          inputs: q (B, H, L, K), k (B, G, L, K), v (B, G, L, V) and, if masked, mask (B, L) bool.
            With a cache all of them hold the next T positions.
          rng: a typed key, needed in training with dropout.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, the cache overflows, or dropout has no key.
        """
        q, k, v, *mask = inputs
        if mode is Mode.PREDICT and self.causal:
            return self._extend(held(state, KVCache), q, k, v, *mask)
        further = {'segments': segments_of(state), **dropout_arguments(self.dropout, rng, mode)}
        real = mask[0] if mask else None
        if sequence_parts() == 1:
            return (self._attend(q, k, v, real, further),), state
        if q.shape[2] % self.chunk_len == 0:
            return (self._attend(q, k, v, real, {**further, 'neighbours': True}),), state
        return (self._exchanged(q, k, v, real, **further),), state

    def _exchanged(self, q: Any, k: Any, v: Any, mask: Any, segments: Any, **more: Any) -> Any:
        """Attention where chunks do not begin where devices' parts do."""
        heads = Exchange.of(q.shape[1], k.shape[1])
        if 'rng' in more:
            more['rng'] = heads.keys(more['rng'])
        q, k, v = heads.queries(q), heads.shared(k), heads.shared(v)
        more['segments'] = heads.rows(segments)
        return heads.back(self._attend(q, k, v, heads.rows(mask), more))

    def _attend(self, q: Any, k: Any, v: Any, mask: Any, further: dict[str, Any]) -> jax.Array:
        return local_attention(
            q,
            k,
            v,
            chunk_len=self.chunk_len,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            softcap=self.softcap,
            **further,
        )

    def _extend(self, cache: KVCache, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        """Attends from new positions to a slice of the cache that starts at a chunk boundary."""
        c, length = self.chunk_len, q.shape[2]
        front, behind = self._padding
        position, room = cache.position.rows, cache.room - front - behind
        refuse_overflow(position, length, room)
        real = jnp.ones((q.shape[0], length), bool) if mask is None else mask
        cache = cache.append(position + front, k=k, v=v, mask=real)
        start, within = position // c * c, position % c  # (B,)
        size = front + (length + c - 1 + c - 1) // c * c
        whole: Any = cache.by_row(cache.k), cache.by_row(cache.v), cache.mask
        keys, values, seen = (pieces(x, start, size) for x in whole)
        dtype = v.dtype
        if is_narrow(keys, dtype) or is_narrow(values, dtype):
            q, keys, values = q.astype(jnp.float32), widened(keys), widened(values)
        if length == 1:
            y = dot_product_attention(
                q,
                keys,
                values,
                causal=True,
                mask=seen,
                offset=front + within,
                scale=self.scale,
                softcap=self.softcap,
            )
        else:
            y = self._attend_aligned(q, keys, values, seen, front + within)
        return (poison_overflow(y.astype(dtype), position, length, room),), cache

    @property
    def _padding(self) -> tuple[int, int]:
        """Places that a cache holds before and after the positions, so that every window fits."""
        return self.look_back * self.chunk_len, 2 * self.chunk_len - 1

    def _attend_aligned(self, q: Any, k: Any, v: Any, seen: Any, at: jax.Array) -> jax.Array:
        """Places T queries beside their keys, (B, H, size, K), attends, and takes their outputs."""
        length = q.shape[2]

        def place(q: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((q.shape[0], k.shape[2], q.shape[2]), q.dtype)
            return jax.lax.dynamic_update_slice_in_dim(empty, q, at, 1)

        def take(y: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(y, at, length, 1)

        y = self._attend(jax.vmap(place)(q, at), k, v, seen, {})
        return jax.vmap(take)(y, at)


@by_head.register(DotProductAttention)
def _unless_relative(layer, weights):
    return None if layer.relative else weights  # a bias is of all heads


by_head.register(LocalAttention)(as_it_is)
