"""Multi-head layers around cores that select their keys, by hashing, by blocks, or by both.

Shape letters: B batch, L length, D d_model, H heads, G heads of keys and values, K head depth.
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY
from typing import Any

from layercomb.checks import Size
from layercomb.layers.attention.multihead import MultiHead, heads
from layercomb.layers.attention.selected.blocks import BlockAttention, BlockOptions
from layercomb.layers.attention.selected.hashed import HashedAttention, HashedOptions
from layercomb.layers.attention.selected.keys import KeyConv, UnitNorm
from layercomb.layers.attention.selected.mixed import MixedAttention, MixedOptions
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.printing import set_field
from layercomb.layers.core.wrapper import unwrapped


class OwnKeys(MultiHead):
    """Base of multi-head layers that select their keys: (B, L, D) → (B, L, D).

    q, k and v are projections of x. Keys go through a short causal convolution; queries and keys
    get length 1, and queries a learned scale a head; then positions are rotated, and a core
    attends.

    Attributes:
      n_heads, d_head, rotary, key_kernel, query, key, value, core, output, n_kv_heads, qkv_bias,
        out_bias, key_conv, query_norm, key_norm: as of `HashedSelfAttention`.
      causal: whether position t sees positions up to t only; with another core, what that says.
    """

    n_heads: Size
    _: KW_ONLY
    d_head: Size | None = None
    rotary: Layer | None = None
    key_kernel: Size = 3
    query: Layer | None = None
    key: Layer | None = None
    value: Layer | None = None
    core: Layer | None = None
    output: Layer | None = None
    n_kv_heads: Size | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    key_conv: Layer | None = None
    query_norm: Layer | None = None
    key_norm: Layer | None = None

    shown_before = {'d_head': 'masked'}
    n_in = property(lambda self: 1 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self  # whose core, if it was given, says whether it looks ahead
        set_field(self, 'causal', getattr(unwrapped(given.core), 'causal', given.causal))

    def core_of(self, options: dict[str, Any]) -> Layer:
        """The core with the options that it shares with the layer."""
        raise NotImplementedError

    def parts(self) -> dict[str, Layer]:
        """The default parts."""
        own = {f.name for f in dataclasses.fields(OwnKeys) if f.name != 'masked'}
        options = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own
        }
        scaled = self.query_norm is None or getattr(self.query_norm, 'scaled', False)
        if scaled and options['scale'] is None:
            options['scale'] = 1.0
        norms = {'query_norm': UnitNorm(scaled=True), 'key_norm': UnitNorm()}
        conv = (
            {'key_conv': KeyConv(self.key_kernel, options['masked'])} if self.key_kernel > 1 else {}
        )
        return {**heads(self, self.core_of(options)), **norms, **conv}

    def route(self, call: Call, stack: Stack) -> Stack:
        """Attends from the input (B, L, D) to itself: (B, L, D) on the stack.

        Args:
          call: as of `Combinator.route`.
          stack: x (B, L, D) and, if masked, mask (B, L) bool; then any others, which stay.
        """
        x, *mask = stack[: self.n_in]
        at = self.keys.index
        (q,), (k,), (v,) = (call(at(name), (x,)) for name in ('query', 'key', 'value'))
        if self.key_conv is not None:
            (k,) = call(at('key_conv'), (k, *mask)[: self.key_conv.n_in])
        (q,), (k,) = call(at('query_norm'), (q,)), call(at('key_norm'), (k,))
        if self.rotary is not None:
            q, k = call(at('rotary'), (q, k))
        (y,) = call(at('core'), (q, k, v, *mask))
        return call(at('output'), (y, x)) + stack[self.n_in :]


class HashedSelfAttention(HashedOptions, OwnKeys):
    """Multi-head attention of a sequence to itself by hashing: (B, L, D) → (B, L, D).

    q, k and v are projections of x. Keys go through a short causal convolution; queries and keys
    get length 1, and queries a learned scale a head; then positions are rotated, and a
    `HashedAttention` attends: in each round to the last keys of a query's bucket, and in the same
    softmax to the keys near by. It is exactly causal, and linear in the length.

    Attributes:
      n_heads: H.
      n_hashes, chunk_len, n_buckets, max_len, local_len, n_sinks, causal, dropout, duplicates,
        seed, centred, scale, softcap, heads_together: as of `HashedAttention`; the scale is 1 by
        default where queries have one of their own.
      masked: whether a second input (B, L) bool says which positions are real.
      d_head: K, by default D / H.
      rotary: positions applied to queries and keys, e.g. `RotaryPositions()`.
      key_kernel: how many positions the convolution of keys sees; 1 for none.
      query, key, value, core, output: the parts, to be replaced; None for the default ones. With
        another core, `causal` is what that core says.
      n_kv_heads: G, which divides H; None for H.
      qkv_bias, out_bias: whether the projections to heads, and the one from heads, have a bias.
      key_conv: the convolution; None for a `KeyConv` of `key_kernel`.
      query_norm, key_norm: layers applied to queries (B, H, L, K) and keys (B, G, L, K) before
        rotary; None for `UnitNorm`.

    Raises:
      ValueError: if G does not divide H, or as of `HashedAttention`.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451, whose queries serve as keys:
      `LSHSelfAttention`
    """

    def core_of(self, options: dict[str, Any]) -> Layer:
        """A `HashedAttention`."""
        return HashedAttention(**options)


class BlockSelfAttention(BlockOptions, OwnKeys):
    """Multi-head attention of a sequence to blocks by choice: (B, L, D) → (B, L, D).

    q, k and v are projections of x. Keys go through a short causal convolution; queries and keys
    get length 1, and queries a learned scale a head; then positions are rotated, and a
    `BlockAttention` attends: to a query's own block and to those whose mean key it likes best, and
    in the same softmax to the keys near by. It is exactly causal; choosing takes L² / C products.

    Attributes:
      n_heads: H.
      n_chosen, block_len, max_len, local_len, n_sinks, causal, dropout, duplicates, scale, softcap,
        heads_together: as of `BlockAttention`; the scale as of `HashedSelfAttention`.
      masked, d_head, rotary, key_kernel, query, key, value, core, output, n_kv_heads, qkv_bias,
        out_bias, key_conv, query_norm, key_norm: as of `HashedSelfAttention`.

    Raises:
      ValueError: if G does not divide H, or as of `BlockAttention`.

    References:
      MoBA, Lu et al. 2025, https://arxiv.org/abs/2502.13189
    """

    def core_of(self, options: dict[str, Any]) -> Layer:
        """A `BlockAttention`."""
        return BlockAttention(**options)


class MixedSelfAttention(MixedOptions, OwnKeys):
    """Multi-head attention of a sequence to itself by hashing and blocks: (B, L, D) → (B, L, D).

    q, k and v are projections of x. Keys go through a short causal convolution; queries and keys
    get length 1, and queries a learned scale a head; then positions are rotated, and a
    `MixedAttention` attends: to the last keys of a query's buckets, to the blocks whose mean key it
    likes best, and in the same softmax to the keys near by. It is exactly causal; choosing blocks
    takes L² / C products.

    Attributes:
      n_heads: H.
      n_hashes, n_chosen, chunk_len, n_buckets, max_len, local_len, n_sinks, causal, dropout,
        duplicates, seed, centred, scale, softcap, heads_together: as of `MixedAttention`; the scale
        as of `HashedSelfAttention`.
      masked, d_head, rotary, key_kernel, query, key, value, core, output, n_kv_heads, qkv_bias,
        out_bias, key_conv, query_norm, key_norm: as of `HashedSelfAttention`.

    Raises:
      ValueError: if G does not divide H, or as of `HashedAttention`.
    """

    def core_of(self, options: dict[str, Any]) -> Layer:
        """A `MixedAttention`."""
        return MixedAttention(**options)
