"""Where a position learns where it is: sinusoidal, learned and rotary positions.

In ``PREDICT`` each holds ``position`` (B,) int32, how many positions of each row have gone by, so
rows of one batch may stand at different places (ragged prompts). Past `max_len` it raises where
values are known, and gives NaN inside `jit`, where they are not.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from layercomb.layers.base import POSITION, Layer, Mode, Tree
from layercomb.layers.caches import position_of, taken
from layercomb.layers.fields import Bound, Size
from layercomb.layers.initializers import Initializer, Normal
from layercomb.shapes import (
    Signature,
    as_deep,
    check_float,
    check_rank,
    check_sequence,
    check_width,
)


class SinusoidalPositions(Layer):
    """x + P, with P[t, i] = sin(t ω_i) and P[t, D/2 + i] = cos(t ω_i), ω_i = period^(−2i/D).

    x is (B, L, D) with D even. There are no weights, unless `trainable`: then P is the weight
    ``table`` (max_len, D), which starts with these values.

    Attributes:
      period: of the slowest wave, times 2π.
      max_len: the longest sequence that is taken; None takes any.
      trainable: whether P learns; `max_len` must be given then.

    References:
      Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762
    """

    period: Annotated[float, Bound(1)] = 10000.0
    max_len: Size | None = None
    trainable: bool = False

    float32 = True
    mixes_positions = True  # a piece of a sequence does not know where it begins

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable and self.max_len is None:
            raise ValueError(
                'SinusoidalPositions: trainable positions are a table of max_len rows: give max_len'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
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

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        check_sequence('SinusoidalPositions', x)
        if self.trainable:
            return add_rows(self, weights['table'], state, x, mode)
        where, state = next_positions(self, state, x.shape[1], mode)  # (B or 1, L)
        table = self._waves(where, x.shape[-1])  # (B or 1, L, D)
        return (x + table.astype(x.dtype),), state

    def _waves(self, where: jax.Array, depth: int) -> jax.Array:
        """P at the positions in `where` (…), (…, depth) float32."""
        angle = angles(where, depth, self.period, self.max_len)  # (…, depth/2)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class LearnedPositions(Layer):
    """x + table[t], one learned row a position.

    Weights: ``table`` (max_len, D).

    Attributes:
      max_len: the longest sequence.
      table_init: of the table.
    """

    max_len: Size
    table_init: Initializer = Normal(0.02)

    float32 = True
    mixes_positions = True  # a piece of a sequence does not know where it begins

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('LearnedPositions', x)
        check_sequence('LearnedPositions', x)
        check_length('LearnedPositions', x.shape[1], self.max_len)
        table = self.table_init(rng, (self.max_len, x.shape[-1]))
        return {'table': table}, init_position(signature, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        check_sequence('LearnedPositions', x)
        return add_rows(self, weights['table'], state, x, mode)


class RotaryPositions(Layer):
    """Rotates pairs of features of queries and keys by angles that grow with the position.

    (q, k) → (R_t q, R_t k): features i and i + K/2 of position t are rotated by t·period^(−2i/K),
    so that q·k depends on the distance of the two positions alone. Both are (B, H, L, K), K even.

    Attributes:
      period: of the slowest rotation, over 2π.
      max_len: the longest sequence that is taken; None takes any.

    References:
      Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864
    """

    period: Annotated[float, Bound(1)] = 10000.0
    max_len: Size | None = None

    n_in = 2
    n_out = 2
    float32 = True
    headwise = True
    mixes_positions = True  # a piece of a sequence does not know where it begins

    def init(self, signature, rng, mode=Mode.TRAIN):
        self._check(*signature)
        check_length('RotaryPositions', signature[0].shape[2], self.max_len)
        check_even('RotaryPositions', signature[0].shape[-1])
        return {}, init_position(signature, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
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


def add_rows(
    layer: Any, table: jax.Array, state: Tree, x: jax.Array, mode: Mode
) -> tuple[tuple[jax.Array], Tree]:
    """Outputs and state of a layer that adds to each position of x (B, L, D) a row of its table."""
    check_width(x, table.shape[1])
    length = x.shape[1]
    where, state = next_positions(layer, state, length, mode)  # (B or 1, L)
    if mode is not Mode.PREDICT:
        return (x + table[None, :length].astype(x.dtype),), state
    rows = jnp.take(table, where, axis=0, mode='fill', fill_value=jnp.nan)
    return (x + rows.astype(x.dtype),), state


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates features i and i + K/2 of x (…, K) by the angle whose sine and cosine are given."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)  # (…, K/2)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def frequencies(depth: int, period: float) -> jax.Array:
    """period^(−2i/depth) for i = 0 … depth/2 − 1, (depth/2,) float32."""
    return period ** (-jnp.arange(0, depth, 2, dtype=jnp.float32) / depth)


def angles(where: jax.Array, depth: int, period: float, max_len: int | None) -> jax.Array:
    """t·ω_i for the positions t in `where` (…, L), (…, L, depth/2) float32; NaN past `max_len`."""
    t = where[..., None].astype(jnp.float32)
    t = t if max_len is None else jnp.where(t < max_len, t, jnp.nan)
    return t * as_deep(frequencies(depth, period), t)


def init_position(signature: Signature, mode: Mode) -> Tree:
    """The state of a layer that counts positions: zeros (B,) in ``PREDICT``, else nothing."""
    if mode is not Mode.PREDICT:
        return {}
    return {POSITION: jnp.zeros(signature[0].shape[0], jnp.int32)}


def next_positions(layer: Any, state: Tree, length: int, mode: Mode) -> tuple[jax.Array, Tree]:
    """The next `length` positions of each row, (B, L) or (1, L) int32, and the state after them.

    Raises:
      ValueError: where they are known to pass the layer's `max_len`.
    """
    owner, steps = type(layer).__name__, jnp.arange(length, dtype=jnp.int32)[None]
    if mode is not Mode.PREDICT:
        check_length(owner, length, layer.max_len)
        return steps, state
    start = position_of(state)
    check_length(owner, taken(start) + length, layer.max_len)
    return start[:, None] + steps, {**state, POSITION: start + length}


def check_length(owner: str, length: int, max_len: int | None) -> None:
    """Raises a ValueError if a sequence is longer than `max_len`."""
    if max_len is not None and length > max_len:
        raise ValueError(
            f'{owner}: the sequence is {length} long and max_len={max_len}: shorten it, or make '
            'the model with a larger max_len'
        )


def check_even(owner: str, depth: int) -> None:
    """Raises a ValueError unless features come in pairs."""
    if depth % 2:
        raise ValueError(f'{owner} works on pairs of features, got {depth}: use an even number')
