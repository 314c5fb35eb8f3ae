"""Normalization: `LayerNorm`, `RMSNorm`, `BatchNorm`. All compute in float32."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.checks import Bound, Rate
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.devices import over_rows
from layercomb.layers.quantized.native import has_kernels, with_kernel
from layercomb.layers.state.counted import counted_positions
from layercomb.shapes import Signature, as_deep, check_float, check_width
from layercomb.trees import Tree


class LayerNorm(Layer):
    """y = (x − mean(x)) / √(var(x) + epsilon) · scale + bias, over the last axis.

    (…, D) → (…, D) in x's dtype. Weights: ``scale`` and ``bias`` (D,).

    Attributes:
      epsilon: added to the variance.
      use_bias: whether to add the bias.

    Raises:
      TypeError: for integers.
      ValueError: when applied to another width than D.

    References:
      Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """

    epsilon: Annotated[float, Bound(0)] = 1e-6
    use_bias: bool = True

    position_wise = True
    float32 = True
    weight_axes = {'scale': '->D', 'bias': '->D'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """``scale`` of ones and ``bias`` of zeros, float32 (D,), for an input (…, D); no state."""
        (x,) = signature
        check_float('LayerNorm', x)
        d = x.shape[-1]
        weights = {'scale': jnp.ones(d, jnp.float32)}
        return (weights | {'bias': jnp.zeros(d, jnp.float32)} if self.use_bias else weights), {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D) → (…, D), computed in float32, in the input's dtype."""
        (x,) = inputs
        check_width(x, len(weights['scale']))
        bias = weights['bias'] if self.use_bias else 0.0
        fast = self.use_bias and _is_little(x, mode, weights)
        f = _fast_layer_norm if fast else _layer_norm
        return (f(x, weights['scale'], bias, self.epsilon),), state


class RMSNorm(Layer):
    """y = x / √(mean(x²) + epsilon) · (offset + scale), over the last axis.

    (…, D) → (…, D) in x's dtype. Weights: ``scale`` (D,).

    Attributes:
      epsilon: added to the mean square.
      offset: added to the scale. It is 1 in Gemma, whose scales start at 0, so that weight decay
        draws the factor to 1.

    Raises:
      TypeError: for integers.
      ValueError: when applied to another width than D.

    References:
      Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    epsilon: Annotated[float, Bound(0)] = 1e-6
    offset: float = 0.0

    position_wise = True
    float32 = True
    weight_axes = {'scale': '->D'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """``scale`` of 1 − offset, float32 (D,), for an input (…, D); no state."""
        (x,) = signature
        check_float('RMSNorm', x)
        return {'scale': jnp.full(x.shape[-1], 1 - self.offset, jnp.float32)}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D) → (…, D), computed in float32, in the input's dtype."""
        (x,) = inputs
        check_width(x, len(weights['scale']))
        f = _fast_rms_norm if _is_little(x, mode, weights) else _rms_norm
        scale = weights['scale'] + self.offset if self.offset else weights['scale']
        return (f(x, scale, self.epsilon),), state


class BatchNorm(Layer):
    """Normalizes each feature over the batch (all axes but the last).

    y = (x − mean) / √(var + epsilon) · scale + bias, with the batch's statistics in training and
    their running means elsewhere: running ← momentum · running + (1 − momentum) · batch.

    Positions of loss weight 0 are normalized, but do not count in the statistics. A `Loop` does
    this; in a loop of your own, use `losses.apply_counted`, or all positions count. If no position
    counts, the running means are used and do not change.

    (…, D) → (…, D) in x's dtype. Weights: ``scale`` and ``bias`` (D,). State: ``mean`` and ``var``
    (D,), all float32.

    Attributes:
      momentum: of the running means, 0 ≤ momentum < 1.
      epsilon: added to the variance.

    Raises:
      TypeError: for integers.
      ValueError: when applied to another width than D.

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    momentum: Rate = 0.99
    epsilon: Annotated[float, Bound(0)] = 1e-5

    float32 = True
    weight_axes = {'scale': '->D', 'bias': '->D'}
    position_wise = False  # in training
    cacheless = True
    counts_positions = True
    spans_devices = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights, and a state of mean 0 and variance 1, float32 (D,), for an input (…, D)."""
        (x,) = signature
        check_float('BatchNorm', x)
        d = x.shape[-1]
        return (
            {'scale': jnp.ones(d, jnp.float32), 'bias': jnp.zeros(d, jnp.float32)},
            {'mean': jnp.zeros(d, jnp.float32), 'var': jnp.ones(d, jnp.float32)},
        )

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D) → (…, D), in the input's dtype; in training, new running means too."""
        (x,) = inputs
        check_width(x, len(weights['scale']))
        h = x.astype(jnp.float32)
        state, counted = counted_positions(state, x)
        mean, var = state['mean'], state['var']
        if mode.is_training:
            (mean, var), state = self._trained(h, state, counted)
        mean, var, scale, bias = (
            as_deep(v, h) for v in (mean, var, weights['scale'], weights['bias'])
        )
        h = (h - mean) * jax.lax.rsqrt(var + self.epsilon)
        return ((h * scale + bias).astype(x.dtype),), state

    def _trained(
        self, h: jax.Array, state: Tree, counted: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], Tree]:
        """Mean and variance to normalize with, and the new running means."""
        old = state['mean'], state['var']
        new = _moments(h, counted)
        running = self._running(old[0], new[0]), self._running(old[1], new[1])
        if counted is not None:
            found = over_rows(counted.sum()) > 0
            new, running = jax.tree.map(
                functools.partial(jnp.where, found), (new, running), (old, old)
            )
        return new, {'mean': running[0], 'var': running[1]}

    def _running(self, old: jax.Array, new: jax.Array) -> jax.Array:
        return self.momentum * old + (1 - self.momentum) * jax.lax.stop_gradient(new)


def _moments(h: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each feature over the positions that count: (…, D) → (D,) twice."""
    axes = tuple(range(h.ndim - 1))
    counted = jnp.ones(h.shape[:-1], bool) if counted is None else counted
    counts, n = counted[..., None], over_rows(counted.sum(dtype=h.dtype))
    n = jnp.maximum(n, 1)
    mean = over_rows(jnp.where(counts, h, 0).sum(axes)) / n
    away = jnp.where(counts, h - as_deep(mean, h), 0)
    return mean, over_rows(jnp.square(away).sum(axes)) / n


@functools.partial(jax.checkpoint, prevent_cse=False)  # keeps x alone for the gradient
def _layer_norm(x: jax.Array, scale: jax.Array, bias: Any, epsilon: float) -> jax.Array:
    h = _as_rows(x.astype(jnp.float32))
    h = h - h.mean(-1, keepdims=True)
    h = _scaled(h, jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + epsilon))
    return (h * as_deep(scale, h) + as_deep(bias, h)).astype(x.dtype).reshape(x.shape)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    h = _as_rows(x.astype(jnp.float32))
    h = _scaled(h, jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + epsilon))
    return (h * as_deep(scale, h)).astype(x.dtype).reshape(x.shape)


def _as_rows(h: jax.Array) -> jax.Array:
    """(…, D) → (N, D) on a CPU, where XLA takes twenty times as long for the gradient of the scale
    if the sum is over an axis between two others, be they of size 1."""
    return h.reshape(-1, h.shape[-1]) if jax.default_backend() == 'cpu' else h


@jax.custom_jvp
def _scaled(h: jax.Array, factors: jax.Array) -> jax.Array:
    """h (…, D) times a factor of each row, (…, 1)."""
    return h * factors


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """On a CPU the factors' gradient is a product with ones: XLA's sums of products of rows take
    ten times as long."""
    (h, factors), (d_h, d_factors) = primals, tangents
    if jax.default_backend() == 'cpu':
        d_factors = d_factors @ jnp.ones((1, h.shape[-1]), h.dtype)
    return h * factors, d_h * factors + h * d_factors


def _is_little(x: jax.Array, mode: Mode, weights: Tree) -> bool:
    """Whether x is so small that the kernel's one loop is faster than XLA's six."""
    return mode is Mode.PREDICT and has_kernels(math.prod(x.shape[:-1]), x, *weights.values())


def _with_kernel(plain: Any, kernel: Any) -> Any:
    def by_kernel(x: jax.Array, *args: Any) -> jax.Array:
        return kernel(x.reshape(-1, x.shape[-1]), *args).reshape(x.shape)  # of (M, D)

    return with_kernel(plain, by_kernel)


_fast_layer_norm = _with_kernel(_layer_norm, layercomb_kernels.layer_norm)
_fast_rms_norm = _with_kernel(_rms_norm, layercomb_kernels.rms_norm)
