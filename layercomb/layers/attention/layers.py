"""Multi-head layers around the cores of attention.

Shape letters: B batch, L length, D d_model, H heads, G heads of keys and values, K head depth, M
memory length or room in a cache, T new positions.
"""

from __future__ import annotations

from dataclasses import KW_ONLY

from layercomb.checks import Positive, Rate, Size
from layercomb.layers.attention.cores import DotProductAttention, LocalAttention
from layercomb.layers.attention.multihead import MultiHead, attend, heads
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.printing import set_field
from layercomb.layers.core.wrapper import wrapped
from layercomb.layers.decoding.once import Once


class DenseHeads(MultiHead):
    """Base of multi-head layers with dense projections: their common fields.

    Attributes:
      n_heads: H.
      d_head: K, by default D / H; any other is possible.
      masked: whether a last input, bool, says which keys are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      query, key, value, core, output: the parts, to be replaced; None for the default ones.
      n_kv_heads: G, heads of keys and values, which H/G heads of queries each share (grouped-query
        attention); it divides H. None for H. Decoding caches hold G heads.
      qkv_bias: whether the projections to queries, keys and values have a bias.
      out_bias: whether the projection from heads has a bias.
      query_norm, key_norm: layers applied to queries (B, H, L, K) and keys (B, G, M, K) before
        rotary, e.g. `RMSNorm()`, whose weight (K,) all heads share; or None.
      scale: factor of the scores, 1/√K if None.
      softcap: c, which makes scores, after the scale, c·tanh(scores / c); None for no cap.

    Raises:
      ValueError: if G does not divide H.
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
    n_kv_heads: Size | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    query_norm: Layer | None = None
    key_norm: Layer | None = None
    scale: float | None = None
    softcap: Positive | None = None


class OfItself(DenseHeads):
    """Base of multi-head attention of a sequence to itself.

    Attributes:
      rotary: positions applied to queries and keys, e.g. `RotaryPositions()`.
    """

    _: KW_ONLY
    rotary: Layer | None = None

    shown_before = {'rotary': 'query'}
    n_in = property(lambda self: 1 + self.masked)

    def route(self, call: Call, stack: Stack) -> Stack:
        """Attends from the input (B, L, D) to itself: (B, L, D) on the stack.

        Args:
          call: as of `Combinator.route`.
          stack: x (B, L, D), the other inputs of the core, e.g. a mask (B, L) bool; then any
            others, which stay.
        """
        x, *more = stack[: self.n_in]
        return attend(self, call, x, x, *more) + stack[self.n_in :]


class SelfAttention(OfItself):
    """Multi-head attention of a sequence to itself: (B, L, D) → (B, L, D).

    y = concat_h(softmax(q_h k_gᵀ / √K) v_g) W_o, with q_h, k_g, v_g projections of x, g = ⌊h·G/H⌋,
    and as many heads of keys and values as of queries, G = H, by default.

    Attributes:
      n_heads: H.
      causal: whether position t sees positions up to t only.
      d_head: K, by default D / H; any other is possible.
      masked: whether a second input (B, L) bool says which positions are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      rotary: positions applied to queries and keys, e.g. `RotaryPositions()`.
      window: position t sees positions t − window + 1 … t only; causal only. None for all before.
      relative: whether the second input is a bias (N, H) of the scores for each distance, as of
        `RelativeBias`, which tells how a T5 stack is made of it; a mask then comes after it.
      query, key, value, core, output: the parts, to be replaced; None for the default ones.
      n_kv_heads: G, heads of keys and values, which H/G heads of queries each share (grouped-query
        attention); it divides H. None for H. Decoding caches hold G heads.
      qkv_bias: whether the projections to queries, keys and values have a bias.
      out_bias: whether the projection from heads has a bias.
      query_norm, key_norm: layers applied to queries (B, H, L, K) and keys (B, G, L, K) before
        rotary, e.g. `RMSNorm()`, whose weight (K,) all heads share; or None.
      scale: factor of the scores, 1/√K if None.
      softcap: c, which makes scores, after the scale, c·tanh(scores / c); None for no cap.

    Raises:
      ValueError: if G does not divide H, or for a window without `causal`.

    References:
      Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
      GQA, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
      Sliding windows, Beltagy et al. 2020, https://arxiv.org/abs/2004.05150
    """

    causal: bool = True
    _: KW_ONLY
    window: Size | None = None
    relative: bool = False

    shown_before = {**OfItself.shown_before, 'window': 'd_head', 'relative': 'd_head'}
    n_in = property(lambda self: 1 + self.relative + self.masked)

    def parts(self) -> dict[str, Layer]:
        """The default parts, around a `DotProductAttention`."""
        core = DotProductAttention(
            self.causal,
            self.dropout,
            self.masked,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            relative=self.relative,
        )
        return heads(self, core)


class LocalSelfAttention(OfItself):
    """Multi-head attention of a sequence to the chunks around each position: (B, L, D) → (B, L, D).

    `SelfAttention` with a `LocalAttention` core. Time and memory are linear in the length.

    Attributes:
      n_heads: H.
      chunk_len: the length of a chunk.
      causal: whether position t sees positions up to t only.
      look_back: chunks seen before a position's own.
      look_ahead: chunks seen after it; 0 if causal.
      d_head, masked, dropout, rotary, n_kv_heads, qkv_bias, out_bias, query_norm, key_norm, scale,
        softcap: as of `SelfAttention`.
      query, key, value, core, output: the parts, to be replaced; None for the default ones.
    """

    chunk_len: Size
    causal: bool = True
    _: KW_ONLY
    look_back: int = 1
    look_ahead: int = 0

    shown_before = {**OfItself.shown_before, 'look_back': 'd_head', 'look_ahead': 'd_head'}

    def parts(self) -> dict[str, Layer]:
        """The default parts, around a `LocalAttention`."""
        core = LocalAttention(
            self.chunk_len,
            self.look_back,
            self.look_ahead,
            self.causal,
            self.dropout,
            self.masked,
            scale=self.scale,
            softcap=self.softcap,
        )
        return heads(self, core)


class CrossAttention(DenseHeads):
    """Multi-head attention to another sequence: (B, L, D), (B, M, E) → (B, L, D).

    Queries come from the first input, keys and values from the second, the memory. In ``PREDICT``
    keys and values are computed `Once`, also by projections of your own.

    Attributes:
      n_heads: H.
      d_head: K, by default D / H; then the memory must be as wide as the sequence.
      masked: whether a third input (B, M) bool says which positions of the memory are real.
      dropout: share of the probabilities set to zero in training, in [0, 1).
      query, key, value, core, output: the parts, to be replaced; None for the default ones.
      n_kv_heads, qkv_bias, out_bias, query_norm, key_norm, scale, softcap: as of `SelfAttention`.

    Raises:
      ValueError: if queries and keys have different depths, or G does not divide H.
    """

    cacheless = True  # the whole memory is given at every step
    rotary = None  # positions of two sequences are not comparable
    reads = {'query': 0, 'key': 1, 'value': 1}
    reads_memory = True
    n_in = property(lambda self: 2 + self.masked)

    def __post_init__(self) -> None:
        for field in ('key', 'value'):
            part = getattr(self, field)
            if part is not None and not any(isinstance(each, Once) for each in wrapped(part)):
                set_field(self, field, Once(part))
        super().__post_init__()

    def parts(self) -> dict[str, Layer]:
        """The default parts, around a bidirectional core; keys and values are made `Once`."""
        core = DotProductAttention(
            False, self.dropout, self.masked, scale=self.scale, softcap=self.softcap
        )
        made = heads(self, core)
        return {**made, 'key': Once(made['key']), 'value': Once(made['value'])}

    def route(self, call: Call, stack: Stack) -> Stack:
        """Attends from x to the memory: (B, L, D) on the stack.

        Args:
          call: as of `Combinator.route`.
          stack: x (B, L, D), memory (B, M, E) and, if masked, mask (B, M) bool; then any others,
            which stay.
        """
        x, memory, *mask = stack[: self.n_in]
        return attend(self, call, x, memory, *mask) + stack[self.n_in :]
