"""`RotaryPositions`: rotations of queries and keys."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound, Size
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.sequence import of_whole, sequence_parts
from layercomb.layers.positions.position import (
    angles,
    check_even,
    check_length,
    frequencies,
    init_position,
    next_positions,
)
from layercomb.layers.positions.scaling import RotaryScaling
from layercomb.layers.state.segments import lengths, segments_of
from layercomb.shapes import (
    Signature,
    check_rank,
)
from layercomb.trees import Tree


class RotaryPositions(Layer):
    """Rotates pairs of features of queries and keys by angles that grow with the position.

    (q, k) → (R_t q, R_t k), both (B, H, L, K), K even. R_t rotates features i and i + K/2 by
    t·ω_i radians, ω_i = period^(−2i/K), so that q·k depends only on the distance of the two
    positions.

    With `share`, only the first n = ⌊K·share⌋ features turn, as K does above, and the others stay.
    With `layout` 'pairs', features 2i and 2i + 1 make a pair, as in GPT-J and in GGUF files of
    Llama.

    With `scaling`, ω_i is another, and the turned features are multiplied by its `magnitude`. For
    `DynamicScaling` and `LongRopeScaling` ω_i depends on the length of the sequence. It is the
    length L of the inputs, and in ``PREDICT`` that of the signature given to `init`: all positions
    turn alike, so ``PREDICT`` gives exactly what ``EVAL`` gives of a sequence as long as the state
    has room for; in a packed row, each document turns as it does alone. (A library that takes the
    length reached so far turns the keys in its cache unlike new ones, once it passes the trained
    length. Up to the trained length there is no difference.)

    Attributes:
      period: longest wavelength in positions, over 2π, in the limit of large K; at least 1.
      max_len: the longest sequence; None for no limit.
      scaling: a `RotaryScaling`, e.g. ``tl.LinearScaling(4.0)``; None for none.
      share: part of the features that turns, above 0 and at most 1.
      layout: which features make a pair: 'halves', i and i + n/2; or 'pairs', 2i and 2i + 1.

    References:
      Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864
    """

    period: Annotated[float, Bound(1)] = 10000.0
    max_len: Size | None = None
    _: KW_ONLY
    scaling: RotaryScaling | None = None
    share: Annotated[float, Bound(above=0, high=1)] = 1.0
    layout: Literal['halves', 'pairs'] = 'halves'

    n_in = 2
    n_out = 2
    float32 = True
    position_wise = False  # a slice does not know its first position
    sees_segments = True
    spans_devices = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights; in ``PREDICT`` the state holds a `Position`.

        It also holds the ``frequencies`` (n/2,) if the scaling goes by the length.

        Args:
          signature: of q and k (B, H, L, K), K even.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, n is odd or 0, or L exceeds `max_len`.
        """
        self._check(*signature)
        length, depth = signature[0].shape[2:]
        check_length('RotaryPositions', length, self.max_len)
        speed = self._frequencies(depth, length)
        state = init_position(signature, mode)
        return {}, {**state, 'frequencies': speed} if state and self._by_length else state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The rotated q and k, in their dtypes, and the new state.

        Args:
          weights: ``{}``.
          state: in ``PREDICT`` as of `init`, else ``{}``.
          inputs: q and k (B, H, L, K); the numbers of heads may differ.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, or positions are known to pass `max_len`.
        """
        q, k = inputs
        self._check(q, k)
        length, depth = q.shape[2:]
        ids = segments_of(state)
        where, state = next_positions(self, state, length, mode)  # (B or 1, L)
        speed = self.speeds(state, depth, length * sequence_parts(), ids)
        angle = angles(where, speed, self.max_len)  # (B or 1, L, n/2)
        sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]  # (B or 1, 1, L, n/2)
        if self.magnitude != 1:
            sin, cos = sin * self.magnitude, cos * self.magnitude
        return (self._turned(q, sin, cos), self._turned(k, sin, cos)), state

    @property
    def magnitude(self) -> float:
        """What turned features are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    def speeds(
        self, state: Tree, depth: int, length: int, ids: jax.Array | None = None
    ) -> jax.Array:
        """The frequencies ω_i, radians a position: (n/2,), or (B, L, n/2) if documents differ.

        Args:
          state: as of `init`; it may hold them.
          depth: K.
          length: of the sequence.
          ids: the documents of packed rows (B, L); None for none.
        """
        return (
            state['frequencies']
            if 'frequencies' in state
            else self._frequencies(depth, length, ids)
        )

    @property
    def _by_length(self) -> bool:
        return self.scaling is not None and self.scaling.by_length

    def _n_turning(self, depth: int) -> int:
        """How many features turn, of `depth`."""
        n = int(depth * self.share)
        if self.share == 1:
            check_even('RotaryPositions', depth)
        elif n < 2 or n % 2:
            raise ValueError(
                f'RotaryPositions: share={self.share} of {depth} features is {n}: it must be an '
                'even number, 2 at least'
            )
        return n

    def _frequencies(self, depth: int, length: int, ids: jax.Array | None = None) -> jax.Array:
        """For queries of `depth` features in rows of `length`, float32 (n/2,).

        If rows are packed, and documents may be so long that scaling goes by their lengths,
        (B, L, n/2).
        """
        n = self._n_turning(depth)
        if self.scaling is None:
            return frequencies(n, self.period)
        steady = self.scaling.steady_len
        if ids is not None and steady is not None and length > steady:
            longer = range(steady, length + 1)
            made = np.stack([self.scaling.frequencies(n, self.period, each) for each in longer])
            table, which = np.unique(made.astype(np.float32), axis=0, return_inverse=True)
            row = jnp.asarray(which.reshape(-1), jnp.int32)  # of each length from `steady` on
            return jnp.asarray(table)[row[jnp.maximum(of_whole(lengths, ids) - steady, 0)]]
        return jnp.asarray(self.scaling.frequencies(n, self.period, length), jnp.float32)

    def _turned(self, x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
        """x (B, H, L, K) with its first n features rotated."""
        turn = rotate if self.layout == 'halves' else rotate_pairs
        n = 2 * sin.shape[-1]
        if n == x.shape[-1]:
            return turn(x, sin, cos)
        return jnp.concatenate([turn(x[..., :n], sin, cos), x[..., n:]], -1)  # (B, H, L, K)

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


def rotate_pairs(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates features 2i and 2i + 1 of x by an angle.

    Args:
      x: (…, K), K even.
      sin, cos: of the angle, (…, K/2) float32.

    Returns:
      (…, K), in the dtype of x, computed in float32.
    """
    wide = x.astype(jnp.float32)
    a, b = wide[..., ::2], wide[..., 1::2]  # (…, K/2)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)  # (…, K/2, 2)
    return turned.reshape(x.shape).astype(x.dtype)  # (…, K)
