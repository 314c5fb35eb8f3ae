"""Attention layers: projections around an attention function, and what decoding keeps.

`SelfAttention`, `LocalSelfAttention` and `CrossAttention` are combinators of the same parts, each
of which can be replaced: ``query``, ``key``, ``value`` (B, L, D) → (B, H, L, K), a ``core`` that
attends, and ``output`` back to (B, L, D). Shape letters: B batch, L length, D d_model, H heads,
K head depth, M memory length or room in a cache, T new positions.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.attention_functions import dot_product_attention, local_attention
from layercomb.layers.base import Layer, Mode, _set
from layercomb.layers.caches import append, init_cache, poison_overflow, refuse_overflow
from layercomb.layers.combinators import Combinator
from layercomb.layers.fields import Rate, Size
from layercomb.layers.initializers import Initializer, glorot_uniform
from layercomb.layers.positional import position_of
from layercomb.shapes import check_float


class SplitHeads(Layer):
    """A projection to heads: y[b, h, l] = x[b, l] W[:, h] + b[h], (B, L, D) → (B, H, L, K).

    Weights: ``kernel`` (D, H, K), ``bias`` (H, K).

    Attributes:
      n_heads: H.
      d_head: K; None takes D / H, which must be whole.
      use_bias: whether b is there.
    """

    n_heads: Size
    d_head: Size | None = None
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('SplitHeads', x)
        d = x.shape[-1]
        if self.d_head is None and d % self.n_heads:
            fitting = [h for h in range(1, d + 1) if d % h == 0]
            nearest = min(fitting, key=lambda h: abs(h - self.n_heads))
            raise ValueError(
                f'{self.n_heads} heads do not divide the width {d}: use {nearest}, or say d_head='
            )
        k = self.d_head or d // self.n_heads
        kernel = self.kernel_init(rng, (d, self.n_heads * k)).reshape(d, self.n_heads, k)
        bias = {'bias': jnp.zeros((self.n_heads, k))} if self.use_bias else {}
        return {'kernel': kernel, **bias}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        kernel = weights['kernel']
        y = jnp.einsum('bld,dhk->bhlk', x, kernel, preferred_element_type=jnp.float32)
        y = y.astype(x.dtype)  # (B, H, L, K)
        return (y + weights['bias'][:, None] if self.use_bias else y,), state


class MergeHeads(Layer):
    """A projection from heads: y[b, l] = Σ_h x[b, h, l] W[h] + b, (B, H, L, K) → (B, L, D).

    Its second input, (B, L, D), only says how wide to be, so that heads of any depth fit any model.

    Weights: ``kernel`` (H, K, D), ``bias`` (D,).
    """

    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    n_in = 2

    def init(self, signature, rng, mode=Mode.TRAIN):
        x, like = signature
        _, h, _, k = x.shape
        d = like.shape[-1]
        kernel = self.kernel_init(rng, (h * k, d)).reshape(h, k, d)
        return {'kernel': kernel, **({'bias': jnp.zeros(d)} if self.use_bias else {})}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        x, _ = inputs
        kernel = weights['kernel']
        y = jnp.einsum('bhlk,hkd->bld', x, kernel, preferred_element_type=jnp.float32)
        y = y.astype(x.dtype)
        return (y + weights['bias'] if self.use_bias else y,), state


class DotProductAttention(Layer):
    """y = softmax(q kᵀ / √K) v, block by block.

    q (B, H, L, K), k (B, H, M, K), v (B, H, M, V) → y (B, H, L, V).

    In ``PREDICT`` a causal one keeps keys and values in a cache as long as the signature given to
    `init`, and takes the next positions, many or one. To run past it is refused; inside `jit`,
    where positions are not known, the rows concerned become NaN.

    Attributes:
      causal: whether position t sees positions up to t only.
      dropout: the rate at which probabilities are dropped in training.
      masked: whether a fourth input (B, M) boolean says which keys are real.
    """

    causal: bool = True
    dropout: Rate = 0.0
    masked: bool = False

    mixes_positions = True
    n_in = property(lambda self: 3 + self.masked)

    def init(self, signature, rng, mode=Mode.TRAIN):
        _, k, v, *_ = signature
        return {}, init_cache(k, v, self.masked) if mode is Mode.PREDICT and self.causal else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        q, k, v, *mask = inputs
        if mode is Mode.PREDICT and self.causal:
            return self._extend(state, q, k, v, *mask)
        y = dot_product_attention(
            q,
            k,
            v,
            causal=self.causal,
            mask=mask[0] if mask else None,
            **dropout_arguments(self.dropout, rng, mode),
        )
        return (y,), state

    def _extend(self, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array):
        position, length, room = position_of(cache), q.shape[2], cache['k'].shape[2]
        refuse_overflow(position, length, room)
        new = {'k': k, 'v': v, **({'mask': mask[0]} if mask else {})}
        cache = append(cache, new, position)
        y = dot_product_attention(
            q, cache['k'], cache['v'], causal=True, mask=cache.get('mask'), offset=position
        )
        return (poison_overflow(y, position, length, room),), cache


class LocalAttention(Layer):
    """Attention within a chunk and a few before it: (B, H, L, K) thrice → (B, H, L, V).

    The sequence is cut into chunks of `chunk_len`; position t sees positions from the start of
    chunk ⌊t / chunk_len⌋ − look_back on, up to itself if causal, else to the end of chunk
    ⌊t / chunk_len⌋ + look_ahead. Cost and memory are linear in the length.

    In ``PREDICT`` keys and values are kept as in `DotProductAttention`, and a new position reads
    its chunks alone.
    """

    chunk_len: Size
    look_back: int = 1
    look_ahead: int = 0
    causal: bool = True
    dropout: Rate = 0.0
    masked: bool = False

    mixes_positions = True
    n_in = property(lambda self: 3 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.look_back, self.look_ahead) < 0 or (self.causal and self.look_ahead):
            raise ValueError(
                f'LocalAttention: look_back={self.look_back} and look_ahead={self.look_ahead} must '
                'not be negative, and causal attention looks ahead by 0'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
        _, k, v, *_ = signature
        if mode is not Mode.PREDICT or not self.causal:
            return {}, {}
        front, behind = self._padding
        return {}, init_cache(k, v, masked=True, length=front + k.shape[2] + behind)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        q, k, v, *mask = inputs
        if mode is Mode.PREDICT and self.causal:
            return self._extend(state, q, k, v, *mask)
        y = self._attend(
            q, k, v, mask[0] if mask else None, dropout_arguments(self.dropout, rng, mode)
        )
        return (y,), state

    def _attend(self, q: Any, k: Any, v: Any, mask: Any, dropout: dict[str, Any]) -> jax.Array:
        return local_attention(
            q,
            k,
            v,
            chunk_len=self.chunk_len,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            causal=self.causal,
            mask=mask,
            **dropout,
        )

    def _extend(self, cache: Any, q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array):
        """Attends from new positions, on a piece of the cache that begins where a chunk does."""
        c, length = self.chunk_len, q.shape[2]
        front, behind = self._padding
        position, room = position_of(cache), cache['k'].shape[2] - front - behind
        refuse_overflow(position, length, room)
        real = mask[0] if mask else jnp.ones((q.shape[0], length), bool)
        cache = append(cache, {'k': k, 'v': v, 'mask': real}, position + front)
        start, within = position // c * c, position % c  # (B,)
        size = front + (length + c - 1 + c - 1) // c * c

        def piece(x: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 2 if x.ndim > 1 else 0)

        keys, values, seen = (jax.vmap(piece)(cache[n], start) for n in ('k', 'v', 'mask'))
        if length == 1:
            y = dot_product_attention(
                q, keys, values, causal=True, mask=seen, offset=front + within
            )
        else:
            y = self._attend_aligned(q, keys, values, seen, front + within)
        return (poison_overflow(y, position, length, room),), cache

    @property
    def _padding(self) -> tuple[int, int]:
        """How much a cache holds before and after the positions: no window then ends outside."""
        return self.look_back * self.chunk_len, 2 * self.chunk_len - 1

    def _attend_aligned(self, q: Any, k: Any, v: Any, seen: Any, at: jax.Array) -> jax.Array:
        """Puts T queries where their keys stand, (B, H, size, K), and takes their outputs back."""
        length = q.shape[2]

        def place(q: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((q.shape[0], k.shape[2], q.shape[2]), q.dtype)
            return jax.lax.dynamic_update_slice_in_dim(empty, q, at, 1)

        def take(y: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(y, at, length, 1)

        y = self._attend(jax.vmap(place)(q, at), k, v, seen, {})
        return jax.vmap(take)(y, at)


class MultiHead(Combinator):
    """What multi-head layers share: parts that nobody chose follow the other fields."""

    def parts(self) -> dict[str, Layer]:
        """The query, key, value, core and output of the other fields' making."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field, part in self.parts().items():
            if getattr(self, field) is None:
                _set(self, field, part)
        super().__post_init__()

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields, and in the parts made from these."""
        made = {f: None for f, part in self.parts().items() if getattr(self, f) == part}
        return super().replace(**{**made, **changes})


class SelfAttention(MultiHead):
    """Multi-head attention of a sequence to itself: (B, L, D) → (B, L, D).

    y = concat_h(softmax(q_h k_hᵀ / √K) v_h) W_o, with q_h, k_h, v_h projections of x.

    Attributes:
      n_heads: H.
      causal: whether position t sees positions up to t only.
      d_head: K, by default D / H; any other is possible.
      masked: whether a second input (B, L) boolean says which positions are real.
      dropout: the rate at which probabilities are dropped in training.
      rotary: positions put into queries and keys, e.g. `RotaryPositions()`.
      query, key, value, core, output: the parts, to be replaced.

    References:
      Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    n_heads: Size
    causal: bool = True
    _: KW_ONLY
    d_head: Size | None = None
    masked: bool = False
    dropout: Rate = 0.0
    rotary: Layer | None = None
    query: Layer | None = None
    key: Layer | None = None
    value: Layer | None = None
    core: Layer | None = None
    output: Layer | None = None

    n_in = property(lambda self: 1 + self.masked)

    def parts(self) -> dict[str, Layer]:
        return heads(self, DotProductAttention(self.causal, self.dropout, self.masked))

    def route(self, call, stack):
        x, *mask = stack[: self.n_in]
        return attend(self, call, x, x, *mask) + stack[self.n_in :]


class LocalSelfAttention(MultiHead):
    """Multi-head attention of a sequence to the chunks around each position: (B, L, D) → (B, L, D).

    As `SelfAttention`, with `LocalAttention` for a core: linear in the length.

    Attributes:
      n_heads: H.
      chunk_len: the length of a chunk.
      causal: whether position t sees positions up to t only.
      look_back: how many chunks before its own a position sees.
      look_ahead: how many chunks after it, if not causal.
    """

    n_heads: Size
    chunk_len: Size
    causal: bool = True
    _: KW_ONLY
    look_back: int = 1
    look_ahead: int = 0
    d_head: Size | None = None
    masked: bool = False
    dropout: Rate = 0.0
    rotary: Layer | None = None
    query: Layer | None = None
    key: Layer | None = None
    value: Layer | None = None
    core: Layer | None = None
    output: Layer | None = None

    n_in = property(lambda self: 1 + self.masked)

    def parts(self) -> dict[str, Layer]:
        core = LocalAttention(
            self.chunk_len, self.look_back, self.look_ahead, self.causal, self.dropout, self.masked
        )
        return heads(self, core)

    def route(self, call, stack):
        x, *mask = stack[: self.n_in]
        return attend(self, call, x, x, *mask) + stack[self.n_in :]


class CrossAttention(MultiHead):
    """Multi-head attention to another sequence: (B, L, D), (B, M, E) → (B, L, D).

    Queries come from the first value, keys and values from the second, the memory.

    Attributes:
      n_heads: H.
      d_head: K, by default D / H, which needs a memory as wide as the sequence.
      masked: whether a third input (B, M) boolean says which positions of the memory are real.
      dropout: the rate at which probabilities are dropped in training.
    """

    n_heads: Size
    _: KW_ONLY
    d_head: Size | None = None
    masked: bool = False
    dropout: Rate = 0.0
    query: Layer | None = None
    key: Layer | None = None
    value: Layer | None = None
    core: Layer | None = None
    output: Layer | None = None

    rotary = None  # positions of two sequences have no distance
    n_in = property(lambda self: 2 + self.masked)

    def parts(self) -> dict[str, Layer]:
        return heads(self, DotProductAttention(False, self.dropout, self.masked))

    def route(self, call, stack):
        x, memory, *mask = stack[: self.n_in]
        return attend(self, call, x, memory, *mask) + stack[self.n_in :]


def heads(layer: Any, core: Layer) -> dict[str, Layer]:
    """The usual parts around a core: three projections to heads, and one from them."""
    split = SplitHeads(layer.n_heads, layer.d_head)
    return {'query': split, 'key': split, 'value': split, 'core': core, 'output': MergeHeads()}


def attend(layer: Any, call: Any, x: Any, memory: Any, *mask: Any) -> tuple[Any, ...]:
    """The route that all multi-head layers share, from `x` to what it reads of `memory`."""
    at = layer.keys.index
    (q,) = call(at('query'), (x,))
    (k,) = call(at('key'), (memory,))
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f'{type(layer).__name__}: queries of a sequence {x.shape[-1]} wide and keys of one '
            f'{memory.shape[-1]} wide have {q.shape[-1]} and {k.shape[-1]} features a '
            'head: say d_head='
        )
    (v,) = call(at('value'), (memory,))
    if layer.rotary is not None:
        q, k = call(at('rotary'), (q, k))
    (y,) = call(at('core'), (q, k, v, *mask))
    return call(at('output'), (y, x))


def dropout_arguments(rate: float, rng: jax.Array | None, mode: Mode) -> dict[str, Any]:
    """What an attention function needs to drop probabilities: nothing outside training."""
    if not rate or not mode.is_training:
        return {}
    if rng is None:
        raise ValueError(
            f'attention with dropout={rate} draws in training: pass rng=jax.random.key(…) to apply'
        )
    return {'dropout_rate': rate, 'rng': rng}
