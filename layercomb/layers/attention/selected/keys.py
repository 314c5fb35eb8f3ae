"""What makes keys that are easy to find: `UnitNorm` and `KeyConv`.

Shape letters: B batch, H heads, L length, K head depth, W positions that an output sees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Positive, Size
from layercomb.layers.attention.by_head import by_head
from layercomb.layers.attention.functions import check_mask
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.decoding.seek import held
from layercomb.layers.facts.sequence import surrounded
from layercomb.layers.state.segments import segments_of
from layercomb.shapes import Signature
from layercomb.trees import Tree


class UnitNorm(Layer):
    """y = x / √(Σx² + epsilon) · scale_h, over the last axis: (B, H, L, K) → (B, H, L, K).

    Queries and keys of one length have products that angles alone decide, so that what is near is
    found by hashing. Weights: ``scale`` (H,), the factor of each head; none without `scaled`.

    Attributes:
      scaled: whether each head has a factor, which starts at √K.
      epsilon: added to the sum of squares.
    """

    scaled: bool = False
    epsilon: Positive = 1e-6

    position_wise = True
    float32 = True
    weight_axes = {'scale': '->H'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """``scale`` of √K, float32 (H,), for an input (B, H, L, K); no state."""
        (x,) = signature
        _, h, _, depth = x.shape
        return ({'scale': jnp.full(h, depth**0.5, jnp.float32)} if self.scaled else {}), {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(B, H, L, K) → (B, H, L, K), computed in float32, in the input's dtype."""
        (x,) = inputs
        if self.scaled:
            _check_heads(self, x, weights['scale'])
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + self.epsilon)
        if self.scaled:
            y = y * weights['scale'][None, :, None, None]
        return (y.astype(x.dtype),), state


class KeyConv(Layer):
    """A causal convolution of each feature: (B, H, L, K) → (B, H, L, K).

    y[t] = x[t] + Σ_i kernel[h, i] ∘ x[t − i] for i = 1 … W − 1, within a document. It starts as the
    identity. Attention that chooses keys gains by it: a key says what stood before it too.

    Weights: ``kernel`` (H, W − 1, K), zeros. In ``PREDICT`` the state keeps the inputs.

    Attributes:
      kernel_size: W, how many positions an output sees, itself included.
      masked: whether a second input (B, L) bool says which positions are real; others are zeros.
    """

    kernel_size: Size = 3
    masked: bool = False

    n_in = property(lambda self: 1 + self.masked)
    position_wise = False
    sees_segments = True
    spans_devices = True
    weight_axes = {'kernel': 'HW|->K'}

    @property
    def _reach(self) -> int:
        return self.kernel_size - 1

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """``kernel`` of zeros for an input (B, H, L, K); the state is a `Past` in ``PREDICT``."""
        x, *_ = signature
        b, h, length, depth = x.shape
        weights = {'kernel': jnp.zeros((h, self._reach, depth), jnp.float32)}
        if mode is not Mode.PREDICT:
            return weights, {}
        flat = jax.ShapeDtypeStruct((b, length, h * depth), x.dtype)
        return weights, Past.empty(flat, self._reach)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """(B, H, L, K) → (B, H, L, K), and the new state; after x a mask (B, L), if masked.

        Raises:
          ValueError: if the cache is known to overflow.
        """
        x, *mask = inputs
        _check_heads(self, x, weights['kernel'])
        if mask:
            check_mask(mask[0], (x.shape[0], x.shape[2]))
        kernel, n = weights['kernel'].astype(x.dtype), self._reach
        segments = segments_of(state)
        if mask:
            x = jnp.where(mask[0][:, None, :, None], x, 0)
        if mode is Mode.PREDICT:
            b, h, length, depth = x.shape
            flat = x.swapaxes(1, 2).reshape(b, length, h * depth)  # (B, T, H·K)
            padded, state = held(state, Past).extend(flat, n)
            padded = padded.reshape(b, length + n, h, depth).swapaxes(1, 2)
        else:
            padded = surrounded(x, n, axis=2)
        around: Any = None if segments is None else surrounded(segments, n)
        y = x
        for i in range(1, n + 1):
            past = padded[:, :, n - i : padded.shape[2] - i]  # x[t − i]
            if around is not None:
                before = around[:, n - i : around.shape[1] - i]
                past = jnp.where((before == segments)[:, None, :, None], past, 0)
            y = y + kernel[None, :, i - 1, None] * past
        return (y,), state


def _check_heads(layer: Layer, x: jax.Array, weight: jax.Array) -> None:
    """Raises ValueError if x is not of as many heads as the weight: either would broadcast."""
    if x.ndim != 4 or x.shape[1] != len(weight):
        raise ValueError(
            f'{type(layer).__name__} has weights of {len(weight)} heads and takes (B, '
            f'{len(weight)}, L, K), got {x.shape}'
        )


@by_head.register(UnitNorm)
def _scale(layer, weights):
    return {name: x[:, None] for name, x in weights.items()}  # (H, 1)


@by_head.register(KeyConv)
def _kernel(layer, weights):
    return {'kernel': weights['kernel'][:, None]}  # (H, 1, W − 1, K)
