"""Projections from a stream to heads and back, `SplitHeads` and `MergeHeads`.

Shape letters: B batch, L length, D d_model, H heads, K head depth.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.attention.by_head import by_head
from layercomb.layers.attention.slices import over_positions, positions
from layercomb.layers.basic.initializers import Initializer, glorot_uniform
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Narrow
from layercomb.shapes import (
    Signature,
    as_deep,
    check_float,
    check_sequence,
    check_width,
    nearest_divisor,
)
from layercomb.trees import Tree


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

    weight_axes = {'kernel': 'D->HK', 'bias': 'H|->K'}
    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        (x,) = signature
        check_float('SplitHeads', x)
        check_sequence('SplitHeads', x)
        d = x.shape[-1]
        if self.d_head is None and d % self.n_heads:
            nearest = nearest_divisor(d, self.n_heads)
            raise ValueError(
                f'{self.n_heads} heads do not divide the width {d}: use {nearest}, or say d_head='
            )
        k = self.d_head or d // self.n_heads
        kernel = self.kernel_init(rng, (d, self.n_heads * k)).reshape(d, self.n_heads, k)
        bias = {'bias': jnp.zeros((self.n_heads, k), jnp.float32)} if self.use_bias else {}
        return {'kernel': kernel, **bias}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        (x,) = inputs
        kernel = weights['kernel']
        check_sequence('SplitHeads', x)
        check_width(x, kernel.shape[0])
        if isinstance(kernel, Narrow):
            y = jnp.moveaxis(kernel.product(x), -2, 1)  # (B, L, H, K) → (B, H, L, K)
        else:
            y = split_heads(x, kernel)
        return (y + weights['bias'][None, :, None] if self.use_bias else y,), state


@by_head.register(SplitHeads)
def _split_by_head(layer, weights):
    kernel = jnp.moveaxis(weights['kernel'], 1, 0)[:, :, None]  # (H, D, 1, K)
    return {'kernel': kernel, **({'bias': weights['bias'][:, None]} if layer.use_bias else {})}


class MergeHeads(Layer):
    """A projection from heads: y[b, l] = Σ_h x[b, h, l] W[h] + b, (B, H, L, K) → (B, L, D).

    Its second input, (B, L, D), only says how wide to be, so that heads of any depth fit any model.

    Weights: ``kernel`` (H, K, D), ``bias`` (D,).
    """

    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    position_wise = True
    n_in = 2
    weight_axes = {'kernel': 'HK->D', 'bias': '->D'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        x, like = signature
        _, h, _, k = x.shape
        d = like.shape[-1]
        kernel = self.kernel_init(rng, (h * k, d)).reshape(h, k, d)
        return {
            'kernel': kernel,
            **({'bias': jnp.zeros(d, jnp.float32)} if self.use_bias else {}),
        }, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        x, like = inputs
        kernel = weights['kernel']
        check_width(like, kernel.shape[-1])
        if isinstance(kernel, Narrow):
            y = kernel.product(jnp.moveaxis(x, 1, -2))  # (B, H, L, K) → (B, L, H, K) → (B, L, D)
        else:
            y = merge_heads(x, kernel)
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state


@by_head.register(MergeHeads)
def _merge_by_head(layer, weights):
    """The bias goes to the first head, since what heads give is summed."""
    kernel = weights['kernel'][:, None]  # (H, 1, K, D)
    if not layer.use_bias:
        return {'kernel': kernel}
    bias = weights['bias']
    return {
        'kernel': kernel,
        'bias': jnp.zeros((len(kernel), *bias.shape), bias.dtype).at[0].set(bias),
    }


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def split_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, L, D), (D, H, K) → (B, H, L, K), in the dtype of x; has no forward-mode derivative."""
    return _dot('dhk,bld->bhlk', kernel, x).astype(x.dtype)


@jax.custom_vjp
def merge_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, H, L, K), (H, K, D) → (B, L, D), in the dtype of x; has no forward-mode derivative."""
    return _dot('bhlk,hkd->bld', x, kernel).astype(x.dtype)


def _split_back(kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    d_x = _dot('bhlk,dhk->bld', ct, kernel).astype(x.dtype)
    return d_x, kernel_gradient(x, ct).astype(kernel.dtype)


def _merge_back(kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    d_x = _dot('hkd,bld->bhlk', kernel, ct).astype(x.dtype)
    return d_x, jnp.moveaxis(kernel_gradient(ct, x), 0, -1).astype(kernel.dtype)


split_heads.defvjp(lambda x, kernel: (split_heads(x, kernel), (x, kernel)), _split_back)
merge_heads.defvjp(lambda x, kernel: (merge_heads(x, kernel), (x, kernel)), _merge_back)


def kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ_bl x[b, l] ⊗ y[b, :, l], (B, L, D), (B, H, L, K) → (D, H, K) float32.

    Long sequences go a slice at a time: the product wants the sum's axis last, and a copy of x with
    that layout would be as large as x.
    """

    def part(total: jax.Array, at: Any, size: int) -> jax.Array:
        return total + _dot('bld,bhlk->dhk', *positions((x, y), at, size))

    start = jnp.zeros((x.shape[2], y.shape[1], y.shape[3]), jnp.float32)
    return over_positions(part, start, x.shape[1])
