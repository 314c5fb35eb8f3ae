"""Attention with sparse projections around any core: dense, local or LSH.

Shape letters: B batch, L length, D d_model, H heads, K head depth, S modules.

References:
    Jaszczur et al. 2021, Sparse is Enough in Scaling Transformers, https://arxiv.org/abs/2111.12763
"""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY
from typing import Any

import jax

from layercomb.checks import Size
from layercomb.layers.attention.cores import DotProductAttention
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.combinators.side_by_side import Parallel
from layercomb.layers.core.combinator import Call, Stack
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import unwrapped
from layercomb.layers.sparse.local_conv import LocalConv
from layercomb.layers.sparse.multiplicative import MultiplicativeDense
from layercomb.shapes import Signature, nearest_divisor
from layercomb.trees import Tree


class FoldHeads(Layer):
    """Splits features into heads, without weights: (B, L, H·K) → (B, H, L, K).

    Attributes:
      n_heads: H.

    Raises:
      ValueError: if H does not divide the width, naming the nearest number that does.
    """

    n_heads: Size

    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights and no state; checks that H divides the width.

        Args:
          signature: of x (B, L, H·K).
          rng, mode: not used.
        """
        (x,) = signature
        if x.shape[-1] % self.n_heads:
            raise ValueError(
                f'{self.n_heads} heads do not divide the width {x.shape[-1]}: use '
                f'{nearest_divisor(x.shape[-1], self.n_heads)}'
            )
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Heads (B, H, L, K) of the input (B, L, H·K)."""
        (x,) = inputs
        b, length, d = x.shape
        x = x.reshape(b, length, self.n_heads, d // self.n_heads)
        return (x.swapaxes(1, 2),), state  # (B, H, L, K)


class UnfoldHeads(Layer):
    """Joins heads to features, without weights: (B, H, L, K) → (B, L, H·K)."""

    position_wise = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Features (B, L, H·K) of the input (B, H, L, K)."""
        (x,) = inputs
        b, h, length, k = x.shape
        return (x.swapaxes(1, 2).reshape(b, length, h * k),), state  # (B, L, H·K)


class SparseQKVAttention(MultiHead):
    """Attention with sparse projections: (B, L, D) → (B, L, D).

    A multiplicative layer maps x to modules. One convolution over positions and modules maps these
    to queries, keys and values::

        q, k, v = LocalConv(MultiplicativeDense(x)),   y = MultiplicativeDense(core(q, k, v))

    At D = 1,024 with 16 modules it has 15 times fewer weights than dense projections, which have D²
    each for q, k, v and y. `sparse_qkv` makes one from any self-attention.

    The convolution looks back even if the core is bidirectional, and ignores the mask. Padding at
    the end of a row changes no real position; padding elsewhere changes the positions after it.

    Attributes:
      n_heads: H.
      n_modules: S, which must divide D.
      kernel_size: of the convolution: positions and modules.
      rotary: positions applied to queries and keys, e.g. `RotaryPositions()`.
      core: a `DotProductAttention` (the default, causal), or any other core. One that takes only
        queries and values, an `LSHAttention`, gets no keys; a mask is an input if the core takes
        one.
      key_conv: a layer applied to keys (B, H, L, K) first, e.g. `KeyConv()`; or None.
      query_norm, key_norm: layers applied to queries and keys (B, H, L, K) before rotary; or None.
      mix: (B, L, D) → (B, L, D); None for the default one, as for `project` and `output`.
      project: (B, L, D) → q, k and v, each (B, H, L, K).
      output: (B, H, L, K) → (B, L, D).

    References:
      Jaszczur et al. 2021, section 3.2, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl
    >>> tl.SparseQKVAttention(4, 8, core=tl.LSHAttention(n_buckets=4)).project.n_out
    2
    """

    n_heads: Size
    n_modules: Size = 16
    _: KW_ONLY
    kernel_size: tuple[int, int] = (3, 3)
    rotary: Layer | None = None
    mix: Layer | None = None
    project: Layer | None = None
    core: Layer = DotProductAttention()
    output: Layer | None = None
    key_conv: Layer | None = None
    query_norm: Layer | None = None
    key_norm: Layer | None = None

    n_in = property(lambda self: 1 + self._is_masked)
    causal = property(lambda self: getattr(unwrapped(self.core), 'causal', True))

    @property
    def _is_masked(self) -> bool:
        return getattr(unwrapped(self.core), 'masked', False)

    def parts(self) -> dict[str, Layer]:
        """The default `mix`, `project` and `output`."""
        n = self.core.n_in - self._is_masked
        dense = MultiplicativeDense(self.n_modules)
        return {
            'mix': dense,
            'project': Serial(
                LocalConv(self.n_modules, self.kernel_size, n),
                Parallel(*[FoldHeads(self.n_heads)] * n),
            ),
            'output': Serial(UnfoldHeads(), dense),
        }

    def route(self, call: Call, stack: Stack) -> Stack:
        """Attends from the input (B, L, D) to itself: (B, L, D) on the stack.

        Args:
          call: as of `Combinator.route`.
          stack: x (B, L, D) and, if the core is masked, mask (B, L) bool; then any others, which
            stay.
        """
        x, *mask = stack[: self.n_in]
        at = self.keys.index
        (mixed,) = call(at('mix'), (x,))
        q, *k, v = call(at('project'), (mixed,))
        if k and self.key_conv is not None:
            k = [*call(at('key_conv'), (*k, *mask)[: self.key_conv.n_in])]
        if k and self.key_norm is not None:
            k = [*call(at('key_norm'), tuple(k))]
        if self.query_norm is not None:
            (q,) = call(at('query_norm'), (q,))
        if self.rotary is not None:
            q, turned = call(at('rotary'), (q, *(k or [q])))
            k = [turned] if k else k
        (y,) = call(at('core'), (q, *k, v, *mask))
        return call(at('output'), (y,)) + stack[self.n_in :]


def is_self_attention(layer: Layer) -> bool:
    """Whether a layer has the fields that `sparse_qkv` keeps: ``n_heads``, ``core``, ``rotary``."""
    fields = {field.name for field in dataclasses.fields(layer)}
    return {'n_heads', 'core', 'rotary'} <= fields and not layer.reads_memory


def sparse_qkv(
    attention: Layer, n_modules: int = 16, kernel_size: tuple[int, int] = (3, 3)
) -> SparseQKVAttention:
    """A `SparseQKVAttention` with the core of another self-attention.

    Args:
      attention: a `SelfAttention`, `HashedSelfAttention` or another, or a layer of your own with
        fields ``n_heads``, ``core`` and ``rotary``. These, its name, norms of queries and keys and
        a convolution of keys are kept, its projections are not. A `SparseQKVAttention` is returned
        unchanged.
      n_modules, kernel_size: as of `SparseQKVAttention`.

    Raises:
      TypeError: for any other layer.
      ValueError: if `attention` has a `d_head`, or heads of keys that are shared (`n_kv_heads`).

    >>> from layercomb import tl
    >>> tl.sparse_qkv(tl.LocalSelfAttention(4, 64), 8).core
    LocalAttention(64)
    """
    if isinstance(attention, SparseQKVAttention):
        return attention
    if not is_self_attention(attention):
        raise TypeError(
            f'sparse_qkv: {type(attention).__name__} cannot have sparse projections: give a '
            'SelfAttention, LocalSelfAttention or LSHSelfAttention, or one with fields n_heads, '
            'core and rotary'
        )
    given: Any = attention
    if getattr(given, 'n_kv_heads', None) is not None:
        raise ValueError(
            f'sparse_qkv: n_kv_heads={given.n_kv_heads} cannot be kept beside sparse projections: '
            'leave it out'
        )
    kept = ('key_conv', 'query_norm', 'key_norm')
    if getattr(given, 'd_head', None) is not None:
        raise ValueError(
            'sparse_qkv: heads divide the features of the model, so '
            f'd_head={given.d_head} cannot be kept: leave it out'
        )
    return SparseQKVAttention(
        given.n_heads,
        n_modules,
        kernel_size=kernel_size,
        rotary=given.rotary,
        core=given.core,  # never None: the layer chose a default
        name=given.name,
        **{field: getattr(given, field, None) for field in kept},
    )
