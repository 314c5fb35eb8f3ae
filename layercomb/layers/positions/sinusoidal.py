"""`SinusoidalPositions`: sines and cosines of the position."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Size
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.positions.position import (
    add_rows,
    angles,
    check_even,
    check_length,
    frequencies,
    init_position,
    next_positions,
)
from layercomb.shapes import (
    Signature,
    check_float,
    check_sequence,
)
from layercomb.trees import Tree


class SinusoidalPositions(Layer):
    """x + P, with P[t, i] = sin(t ω_i) and P[t, D/2 + i] = cos(t ω_i), ω_i = period^(−2i/D).

    x is (B, L, D), D even. There are no weights, unless `trainable`: then P is the weight ``table``
    (max_len, D), which starts with these values.

    Attributes:
      period: longest wavelength in positions, over 2π, in the limit of large D; at least 1.
      max_len: the longest sequence; None for no limit.
      trainable: whether P is trained; needs `max_len`.

    Raises:
      ValueError: if `trainable` without `max_len`, D is odd, or a sequence is longer than
        `max_len`.

    References:
      Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762
    """

    period: Annotated[float, Bound(1)] = 10000.0
    max_len: Size | None = None
    trainable: bool = False

    float32 = True
    weight_axes = {'table': 'L:D'}
    position_wise = False  # a slice does not know its first position
    sees_segments = True
    spans_devices = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable and self.max_len is None:
            raise ValueError(
                'SinusoidalPositions: trainable positions are a table of max_len rows: give max_len'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights, or the ``table`` if trainable; in ``PREDICT`` the state holds a `Position`.

        Args:
          signature: of x (B, L, D), floating, D even.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if D is odd, or L exceeds `max_len`.
        """
        (x,) = signature
        check_float('SinusoidalPositions', x)
        check_sequence('SinusoidalPositions', x)
        check_length('SinusoidalPositions', x.shape[1], self.max_len)
        check_even('SinusoidalPositions', x.shape[-1])
        state = init_position(signature, mode)
        if self.max_len is None or not self.trainable:
            return {}, state
        every = jnp.arange(self.max_len, dtype=jnp.int32)
        return {'table': self._waves(every, x.shape[-1])}, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (B, L, D), in the dtype of x, and the new state.

        Args:
          weights: ``{}``, or the ``table`` if trainable.
          state: in ``PREDICT`` it holds a `Position`, else ``{}``.
          inputs: x (B, L, D); in ``PREDICT`` the next positions.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: for positions known to pass `max_len`; inside `jit` they give NaN.
        """
        (x,) = inputs
        check_sequence('SinusoidalPositions', x)
        if self.trainable:
            return add_rows(self, weights['table'], state, x, mode)
        where, state = next_positions(self, state, x.shape[1], mode)  # (B or 1, L)
        table = self._waves(where, x.shape[-1])  # (B or 1, L, D)
        return (x + table.astype(x.dtype),), state

    def _waves(self, where: jax.Array, depth: int) -> jax.Array:
        """P at the positions in `where` (…), (…, depth) float32."""
        angle = angles(where, frequencies(depth, self.period), self.max_len)  # (…, depth/2)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
