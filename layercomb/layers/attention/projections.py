"""Projections from features to heads and back: `SplitHeads` and `MergeHeads`.

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
from layercomb.layers.quantized.matrix import Matrix
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
      d_head: K; None takes D / (H · group), which must be an integer.
      use_bias: whether to add b.
      kernel_init: of W, as a matrix (D, H·K).
      group: heads of queries that share each of these heads, if they are of keys or values. It only
        sets the default of K.

    Raises:
      ValueError: if d_head is None and H · group does not divide D, naming the nearest number that
        does.
    """

    n_heads: Size
    d_head: Size | None = None
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    group: Size = 1

    weight_axes = {'kernel': 'D->HK', 'bias': 'H|->K'}
    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights ``kernel`` (D, H, K) and ``bias`` (H, K), float32; no state.

        Args:
          signature: of x (B, L, D), floating.
          rng: a typed key.
          mode: not used.
        """
        (x,) = signature
        check_float('SplitHeads', x)
        check_sequence('SplitHeads', x)
        d, n_heads = x.shape[-1], self.n_heads * self.group
        if self.d_head is None and d % n_heads:
            nearest = nearest_divisor(d, n_heads)
            raise ValueError(
                f'{n_heads} heads do not divide the width {d}: use {nearest}, or say d_head='
            )
        k = self.d_head or d // n_heads
        kernel = self.kernel_init(rng, (d, self.n_heads * k)).reshape(d, self.n_heads, k)
        bias = {'bias': jnp.zeros((self.n_heads, k), jnp.float32)} if self.use_bias else {}
        return {'kernel': kernel, **bias}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (B, H, L, K), in the dtype of x, from x (B, L, D).

        Args:
          weights: as of `init`; the kernel may be a `Matrix`.
          state: ``{}``.
          inputs: x (B, L, D).
          rng, mode: not used.
        """
        (x,) = inputs
        kernel = weights['kernel']
        check_sequence('SplitHeads', x)
        check_width(x, kernel.shape[0])
        if isinstance(kernel, Matrix):
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

    The second input, (B, L, D), only gives the width of the output, so that heads of any depth fit
    any model.

    Weights: ``kernel`` (H, K, D), ``bias`` (D,).

    Attributes:
      use_bias: whether to add b.
      kernel_init: of W, as a matrix (H·K, D).
    """

    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    position_wise = True
    n_in = 2
    weight_axes = {'kernel': 'HK->D', 'bias': '->D'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights ``kernel`` (H, K, D) and ``bias`` (D,), float32; no state.

        Args:
          signature: of x (B, H, L, K), and of a value (B, L, D) as wide as the output.
          rng: a typed key.
          mode: not used.
        """
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
        """y (B, L, D), in the dtype of x, from heads x (B, H, L, K).

        Args:
          weights: as of `init`; the kernel may be a `Matrix`.
          state: ``{}``.
          inputs: x (B, H, L, K), and a value (B, L, D) of which only the width matters.
          rng, mode: not used.
        """
        x, like = inputs
        kernel = weights['kernel']
        check_width(like, kernel.shape[-1])
        if isinstance(kernel, Matrix):
            y = kernel.product(jnp.moveaxis(x, 1, -2))  # (B, H, L, K) → (B, L, H, K) → (B, L, D)
        else:
            y = merge_heads(x, kernel)
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state


@by_head.register(MergeHeads)
def _merge_by_head(layer, weights):
    """The first head gets the bias, since the outputs of heads are summed."""
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
    """y[b, h, l] = x[b, l] W[:, h], without forward-mode derivative.

    Args:
      x: (B, L, D), floating.
      kernel: W (D, H, K).

    Returns:
      (B, H, L, K), in the dtype of x, summed in float32.
    """
    return _dot('dhk,bld->bhlk', kernel, x).astype(x.dtype)


@jax.custom_vjp
def merge_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y[b, l] = Σ_h x[b, h, l] W[h], without forward-mode derivative.

    Args:
      x: (B, H, L, K), floating.
      kernel: W (H, K, D).

    Returns:
      (B, L, D), in the dtype of x, summed in float32.
    """
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
    """Σ_bl x[b, l] ⊗ y[b, :, l], the gradient of a kernel.

    Long sequences are computed a slice of positions at a time. The product needs the summed axis
    last, and one copy of x in that layout would be as large as x.

    Args:
      x: (B, L, D).
      y: (B, H, L, K).

    Returns:
      (D, H, K) float32.
    """

    def part(total: jax.Array, at: Any, size: int) -> jax.Array:
        return total + _dot('bld,bhlk->dhk', *positions((x, y), at, size))

    start = jnp.zeros((x.shape[2], y.shape[1], y.shape[3]), jnp.float32)
    return over_positions(part, start, x.shape[1])
