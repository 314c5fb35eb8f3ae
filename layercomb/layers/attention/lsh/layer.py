"""`LSHAttention` and `LSHSelfAttention`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layercomb.checks import Positive, Rate, Size
from layercomb.layers.attention import tiles
from layercomb.layers.attention.by_head import as_it_is, by_head
from layercomb.layers.attention.devices.exchange import Exchange
from layercomb.layers.attention.lsh import rings
from layercomb.layers.attention.lsh import windows as bucketwise
from layercomb.layers.attention.lsh.buckets import Hashing
from layercomb.layers.attention.lsh.cache import LSHCache
from layercomb.layers.attention.lsh.function import check_circle, lsh_attention
from layercomb.layers.attention.lsh.hashing import rotated_buckets
from layercomb.layers.attention.lsh.rounds import UNIT_EPSILON
from layercomb.layers.attention.multihead import MultiHead, dropout_arguments, shared_heads
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.core.combinator import Call, Stack
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


class LSHOptions(Hashing):
    """The fields that `LSHAttention`, which describes them, and `LSHSelfAttention` share."""

    _: KW_ONLY
    n_hashes: Size = 4
    chunk_len: Size = 64
    n_buckets: int | tuple[int, ...] | None = None
    max_len: Size | None = None
    causal: bool = True
    masked: bool = False
    dropout: Rate = 0.0
    neighbourhood: Literal['bucket', 'chunk', 'circle'] = 'bucket'
    duplicates: Literal['count', 'once'] = 'count'
    seed: int = 0
    chunks_together: Size | None = None
    heads_together: Size | None = None
    scale: float | None = None
    softcap: Positive | None = None
    epsilon: Positive = UNIT_EPSILON
    alone: Literal['exact', 'rounded'] = 'exact'
    round_len: Size | None = None
    rotations: Literal['jax', 'torch'] = 'jax'

    sees_padding = property(lambda self: self.neighbourhood != 'bucket')


class LSHAttention(LSHOptions):
    """LSH attention with queries as keys: q (B, H, L, K), v (B, G, L, D) → (B, H, L, D).

    G divides H; head h of the queries reads head ⌊h·G/H⌋ of the values. It computes
    `lsh_attention`. Rotations are drawn from `rng` in training, and from `seed` in ``EVAL`` and
    ``PREDICT``. The buckets are a decision: ``RECORD`` keeps them, ``REPLAY`` takes them.

    In ``PREDICT`` a causal layer caches queries, values and buckets, with room for the length of
    the signature given to `init`. With ``neighbourhood='bucket'`` it also keeps `rings`: one new
    position then reads R·C keys, the same as in ``EVAL``, at any position. With ``'chunk'`` and
    ``'circle'`` it reads all keys, and sees what the last position of ``EVAL`` sees. Decoding needs
    `n_buckets` or `max_len`: the length of a cache would give another number of buckets than
    training.

    Attributes:
      n_hashes: R; may be changed after training.
      chunk_len: C.
      n_buckets: 1, an even number, or a tuple of such factors; None makes buckets that average half
        a chunk at `max_len` positions.
      max_len: the longest sequence, from which automatic buckets are made. None takes the input's
        length; a longer input then changes the buckets, and so the outputs, of earlier positions.
      causal: whether position t sees positions up to t only.
      masked: whether a third input (B, L) bool says which positions are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      neighbourhood, duplicates, chunks_together, heads_together, scale, softcap, epsilon, alone,
        round_len: as of `lsh_attention`.
      seed: of the rotations in ``EVAL`` and ``PREDICT``; layers with one seed share rotations.
      rotations: which generator draws them from `seed`: JAX's, or torch's as in transformers
        (`torch_rotations`); in training it is always JAX's.

    Raises:
      ValueError: for `alone` or `round_len` without what they go with; for a number of buckets that
        is odd and not 1, or is 1 with torch's rotations; for a sequence longer than `max_len`; or
        for ``PREDICT`` without `n_buckets` and `max_len`.
    """

    position_wise = False
    sees_segments = True
    spans_devices = True
    n_in = property(lambda self: 2 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_circle(
            self.alone,
            self.round_len,
            self.neighbourhood,
            self.chunk_len,
            self.causal,
            self.duplicates,
        )
        self.check_hashing()

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """No weights. The state is an `LSHCache` in ``PREDICT`` if causal, else ``{}``.

        Args:
          signature: of q (B, H, L, K), v (B, G, L, D) and, if masked, mask (B, L).
          rng: not used; rotations come from `seed`.
          mode: see `Mode`.

        Raises:
          ValueError: if L exceeds `max_len`, or in ``PREDICT`` without `n_buckets` and `max_len`.
        """
        q, v, *_ = signature
        b, h, length, _ = q.shape
        check_length('LSHAttention', length, self.max_len)
        if mode is not Mode.PREDICT or not self.causal:
            return {}, {}
        self.check_decoding()
        made = None
        if self.neighbourhood == 'bucket':
            n_buckets = math.prod(self.factors(length))
            made = rings.empty(b * h, self.n_hashes, n_buckets, self.chunk_len)
        return {}, LSHCache.empty(
            q,
            v,
            masked=True,
            buckets=jnp.zeros((b * h, length, self.n_hashes), self.bucket_dtype(length)),
            rotations=self.drawn(None, h, q.shape[3], length),
            rings=made,
        )

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """y (B, H, L, D), in the dtype of v, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT``, if causal, an `LSHCache`; in ``REPLAY`` the recorded buckets.
          inputs: q (B, H, L, K), v (B, G, L, D) and, if masked, mask (B, L) bool. With a cache all
            of them hold the next T positions.
          rng: a typed key, or one for every head (H,); needed in training.
          mode: see `Mode`.

        Raises:
          ValueError: if L exceeds `max_len`, the cache overflows, or training has no key.
        """
        q, v, *mask = inputs
        if mode is Mode.PREDICT and self.causal:
            return self._extend(held(state, LSHCache), q, v, *mask)
        length = q.shape[2] * sequence_parts()
        check_length('LSHAttention', length, self.max_len)
        key = None
        if mode.is_training:
            if rng is None:
                raise ValueError(
                    'LSHAttention draws rotations in training: pass rng=jax.random.key(…) to apply'
                )
            keys = jax.vmap(jax.random.split)(tiles.keys_of_heads(rng, q.shape[1]))
            key, rng = keys[:, 0], keys[:, 1]
        buckets, state = decide(mode, state, 'buckets', lambda: self._hash(q, key, length))
        heads = Exchange.of(q.shape[1], v.shape[1])
        further = dropout_arguments(self.dropout, heads.keys(rng), mode)
        y = self._attend(
            heads.queries(q),
            heads.shared(v),
            heads.queries(buckets, 3),
            *map(heads.rows, mask),
            segments=heads.rows(segments_of(state)),
            **further,
        )
        return (heads.back(y),), state

    def _hash(self, q: jax.Array, rng: Any, length: int) -> jax.Array:
        return self.hashed(q, self.drawn(rng, q.shape[1], q.shape[3], length), length)

    def _attend(self, q: Any, v: Any, buckets: Any, mask: Any = None, **further: Any) -> jax.Array:
        return lsh_attention(
            q,
            v,
            buckets,
            n_buckets=math.prod(self.factors(q.shape[2])),
            chunk_len=self.chunk_len,
            causal=self.causal,
            mask=mask,
            neighbourhood=self.neighbourhood,
            duplicates=self.duplicates,
            chunks_together=self.chunks_together,
            heads_together=self.heads_together,
            scale=self.scale,
            softcap=self.softcap,
            epsilon=self.epsilon,
            alone=self.alone,
            round_len=self.round_len,
            **further,
        )

    def _extend(self, cache: LSHCache, q: jax.Array, v: jax.Array, mask: Any = None) -> Any:
        position, length, room = cache.position.rows, q.shape[2], cache.room
        refuse_overflow(position, length, room)
        real = jnp.ones((q.shape[0], length), bool) if mask is None else mask
        n_buckets = self.factors(room)
        buckets = rotated_buckets(q, cache.rotations, n_buckets=n_buckets)
        by_position = buckets.swapaxes(2, 3)  # (B, H, T, R)
        cache = cache.append(position, k=q, v=v, mask=real, buckets=by_position)
        if length == 1 and cache.rings is not None:
            y, cache = self._next(cache, cache.rings, q, buckets, position, real)
        else:
            filled = jnp.arange(room, dtype=jnp.int32)[None] < (position + length)[:, None]
            by_round = cache.by_row(cache.buckets).swapaxes(2, 3)  # (B, H, R, L)
            if self.neighbourhood == 'circle':  # it closes behind the last position so far
                n = math.prod(n_buckets)
                by_round = jnp.where(filled[:, None, None], by_round.astype(jnp.int32), n + 1)
            keys, values = cache.by_row(cache.k), cache.by_row(cache.v)
            y = self._attend(keys, values, by_round, cache.mask & filled)
            y = jax.vmap(lambda y, at: jax.lax.dynamic_slice_in_dim(y, at, length, 1))(y, position)
            cache = cache.refilled()
        return (poison_overflow(y, position, length, room),), cache

    def _next(
        self, cache: LSHCache, before: jax.Array, q: Any, buckets: Any, position: Any, real: Any
    ) -> tuple[jax.Array, LSHCache]:
        """Attention of one position per row to its rings, (B, H, 1, D), and the new cache."""
        b, h, _, depth = q.shape
        position, real = jnp.repeat(position, h), jnp.repeat(real[:, 0], h)  # (N,), N = B·H
        after, at = rings.push(before, buckets.reshape(b * h, -1), position, real)
        at = at.reshape(b * h, -1)  # (N, R·C)
        there = jnp.clip(at, 0, cache.room - 1)
        s = rings.cosines(q.reshape(b * h, depth), there, cache.k, self.epsilon)
        s = tiles.capped(s if self.scale is None else s * self.scale, self.softcap)
        s = jnp.where(at == position[:, None], bucketwise.SELF, s)
        if self.duplicates == 'once':
            s = s - jnp.log((at[:, None] == at[:, :, None]).sum(-1, dtype=jnp.float32))
        p = tiles.softmax_of((at >= 0) & real[:, None], s)
        y = rings.means(p, there, cache.v)
        return y.reshape(b, h, 1, -1).astype(cache.v.dtype), cache.replace(rings=after)


by_head.register(LSHAttention)(as_it_is)


class LSHSelfAttention(LSHOptions, MultiHead):
    """Multi-head LSH attention of a sequence to itself: (B, L, D) → (B, L, D).

    One projection makes queries, which serve as keys too, and another makes values, around an
    `LSHAttention`.

    Attributes:
      n_heads: H.
      n_hashes, chunk_len, n_buckets, max_len, causal, dropout, neighbourhood, duplicates, seed,
        chunks_together, heads_together, scale, softcap, epsilon, alone, round_len, rotations: as
        of `LSHAttention`.
      masked: whether a second input (B, L) bool says which positions are real.
      d_head: K, by default D / H.
      rotary: positions applied to queries, e.g. `RotaryPositions()`.
      query, value, core, output: the parts, to be replaced; None for the default ones.
      n_kv_heads: G, heads of values, which H/G heads of queries each share; it divides H. None for
        H. Keys have H heads, since they are the queries.
      qkv_bias, out_bias: whether the projections to heads, and the one from heads, have a bias.
      query_norm: a layer applied to queries (B, H, L, K) before rotary, e.g. `RMSNorm()`; or None.
        Keys are its outputs at length 1.

    Raises:
      ValueError: if G does not divide H, or as of `LSHAttention`.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
    """

    n_heads: Size
    _: KW_ONLY
    d_head: Size | None = None
    rotary: Layer | None = None
    query: Layer | None = None
    value: Layer | None = None
    core: Layer | None = None
    output: Layer | None = None
    n_kv_heads: Size | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    query_norm: Layer | None = None

    shown_before = {'d_head': 'masked'}
    n_in = property(lambda self: 1 + self.masked)

    def parts(self) -> dict[str, Layer]:
        """The default parts, around an `LSHAttention`."""
        query = SplitHeads(self.n_heads, self.d_head, self.qkv_bias)
        options = (field.name for field in dataclasses.fields(LSHOptions) if field.name != 'name')
        core = LSHAttention(**{name: getattr(self, name) for name in options})
        output = MergeHeads(self.out_bias)
        return {'query': query, 'value': shared_heads(self), 'core': core, 'output': output}

    def route(self, call: Call, stack: Stack) -> Stack:
        """Attends from the input (B, L, D) to itself: (B, L, D) on the stack.

        Args:
          call: as of `Combinator.route`.
          stack: x (B, L, D) and, if masked, mask (B, L) bool; then any others, which stay.
        """
        x, *mask = stack[: self.n_in]
        at = self.keys.index
        (q,) = call(at('query'), (x,))
        (v,) = call(at('value'), (x,))
        if self.query_norm is not None:
            (q,) = call(at('query_norm'), (q,))
        if self.rotary is not None:
            q, _ = call(at('rotary'), (q, q))
        (y,) = call(at('core'), (q, v, *mask))
        return call(at('output'), (y, x)) + stack[self.n_in :]
