"""`RotaryPositions`: rotations of queries and keys."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Size
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.positions.position import (
    angles,
    check_even,
    check_length,
    init_position,
    next_positions,
)
from layercomb.shapes import (
    Signature,
    check_rank,
)
from layercomb.trees import Tree


class RotaryPositions(Layer):
    """Rotates pairs of features of queries and keys by angles that grow with the position.

    (q, k) → (R_t q, R_t k), both (B, H, L, K), K even. R_t rotates features i and i + K/2 by
    t·period^(−2i/K) radians, so that q·k depends only on the distance of the two positions.

    Attributes:
      period: longest wavelength in positions, over 2π, in the limit of large K; at least 1.
      max_len: the longest sequence; None for no limit.

    References:
      Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864
    """

    period: Annotated[float, Bound(1)] = 10000.0
    max_len: Size | None = None

    n_in = 2
    n_out = 2
    float32 = True
    position_wise = False  # a slice does not know its first position

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights; in ``PREDICT`` the state holds a `Position`.

        Args:
          signature: of q and k (B, H, L, K), K even.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, K is odd, or L exceeds `max_len`.
        """
        self._check(*signature)
        check_length('RotaryPositions', signature[0].shape[2], self.max_len)
        check_even('RotaryPositions', signature[0].shape[-1])
        return {}, init_position(signature, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The rotated q and k, in their dtypes, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT`` it holds a `Position`, else ``{}``.
          inputs: q and k (B, H, L, K); the numbers of heads may differ.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, or positions are known to pass `max_len`.
        """
        q, k = inputs
        self._check(q, k)
        where, state = next_positions(self, state, q.shape[2], mode)  # (B or 1, L)
        angle = angles(where, q.shape[-1], self.period, self.max_len)  # (B or 1, L, K/2)
        sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]  # (B or 1, 1, L, K/2)
        return (rotate(q, sin, cos), rotate(k, sin, cos)), state

    def _check(self, q: Any, k: Any) -> None:
        """Raises a ValueError if queries and keys differ in more than their number of heads."""
        check_rank('RotaryPositions', q, 'queries (batch, heads, length, depth)', 4)
        alike = len(k.shape) == 4 and q.shape[:1] + q.shape[2:] == k.shape[:1] + k.shape[2:]
        if not alike:
            raise ValueError(
                f'RotaryPositions takes q and k (batch, heads, length, depth) that agree in all '
                f'but heads, got {tuple(q.shape)} and {tuple(k.shape)}'
            )


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates features i and i + K/2 of x by an angle.

    Args:
      x: (…, K), K even.
      sin, cos: of the angle, (…, K/2) float32.

    Returns:
      (…, K), in the dtype of x, computed in float32.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)  # (…, K/2)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
