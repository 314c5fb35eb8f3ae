"""Helpers of positional layers: the next positions of a row, and angles of sines and cosines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import taken
from layercomb.layers.decoding.seek import Position, held
from layercomb.layers.facts.sequence import first_position, of_whole, sequence_parts
from layercomb.layers.state.segments import places, segments_of
from layercomb.shapes import (
    Signature,
    as_deep,
    check_width,
)
from layercomb.trees import Tree


def add_rows(
    layer: Any, table: jax.Array, state: Tree, x: jax.Array, mode: Mode
) -> tuple[tuple[jax.Array], Tree]:
    """Adds to each position of x a row of a table.

    Args:
      layer: has max_len.
      table: (max_len, D).
      state: of the layer; in ``PREDICT`` it holds a `Position`.
      x: (B, L, D).
      mode: see `Mode`.

    Returns:
      A tuple of (B, L, D) in the dtype of x, and the new state.

    Raises:
      ValueError: if the widths differ, or positions are known to pass `max_len`.
    """
    check_width(x, table.shape[1])
    length = x.shape[1]
    from_zero = begins_at_zero(state, mode)
    where, state = next_positions(layer, state, length, mode)  # (B or 1, L)
    if from_zero:
        return (x + table[None, :length].astype(x.dtype),), state
    rows = jnp.take(table, where, axis=0, mode='fill', fill_value=jnp.nan)
    return (x + rows.astype(x.dtype),), state


def frequencies(depth: int, period: float) -> jax.Array:
    """ω_i = period^(−2i/depth) for i = 0 … depth/2 − 1, (depth/2,) float32."""
    return period ** (-jnp.arange(0, depth, 2, dtype=jnp.float32) / depth)


def angles(where: jax.Array, speed: jax.Array, max_len: int | None) -> jax.Array:
    """t·ω_i for the positions t in `where`; NaN from `max_len` on.

    Args:
      where: (…, L) int32.
      speed: the frequencies ω_i, float32 (n,), or of each position (…, L, n).
      max_len: the number of positions; None for no limit.

    Returns:
      (…, L, n) float32, in radians.
    """
    t = where[..., None].astype(jnp.float32)
    t = t if max_len is None else jnp.where(t < max_len, t, jnp.nan)
    return t * as_deep(speed, t)


def init_position(signature: Signature, mode: Mode) -> Tree:
    """The state of a layer that counts positions.

    Args:
      signature: of the inputs, the first one (B, …).
      mode: see `Mode`.

    Returns:
      ``{'position': …}``, a `Position` of B zeros, in ``PREDICT``; else ``{}``.
    """
    if mode is not Mode.PREDICT:
        return {}
    return {'position': Position.first(signature[0].shape[0])}


def begins_at_zero(state: Tree, mode: Mode) -> bool:
    """Whether positions of each row are 0, 1 … L − 1 here: then a table need not be looked up.

    Args:
      state: of the layer.
      mode: see `Mode`.
    """
    return mode is not Mode.PREDICT and segments_of(state) is None and sequence_parts() == 1


def next_positions(layer: Any, state: Tree, length: int, mode: Mode) -> tuple[jax.Array, Tree]:
    """The next `length` positions of each row, and the state after them.

    In a packed row they restart at 0 in each document.

    Args:
      layer: has max_len.
      state: of the layer; in ``PREDICT`` it holds a `Position`.
      length: L.
      mode: see `Mode`.

    Returns:
      (B, L) int32 in ``PREDICT`` and of packed rows, else (1, L); and the new state.

    Raises:
      ValueError: if positions are known to pass `max_len`.
    """
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    if mode is not Mode.PREDICT:
        check_length(type(layer).__name__, length * sequence_parts(), layer.max_len)
        ids = segments_of(state)
        return first_position(length) + steps if ids is None else of_whole(places, ids), state
    start = held(state.get('position'), Position)
    check_next(layer, start, length)
    return start.rows[:, None] + steps, {**state, 'position': start.moved(length)}


def check_next(layer: Any, start: Position, length: int) -> None:
    """Checks the next positions against the layer's `max_len`, where they are known.

    Args:
      layer: has max_len.
      start: positions taken, (B,) rows.
      length: how many come next.

    Raises:
      ValueError: if they are known to pass it.
    """
    check_length(type(layer).__name__, taken(start.rows) + length, layer.max_len)


def check_length(owner: str, length: int, max_len: int | None) -> None:
    """Checks the length of a sequence.

    Args:
      owner: the name of the layer, for the message.
      length: of the sequence.
      max_len: the most positions; None for no limit.

    Raises:
      ValueError: if it is longer than `max_len`.
    """
    if max_len is not None and length > max_len:
        raise ValueError(
            f'{owner}: the sequence is {length} long and max_len={max_len}: shorten it, or make '
            'the model with a larger max_len'
        )


def check_even(owner: str, depth: int) -> None:
    """Checks that features come in pairs.

    Args:
      owner: the name of the layer, for the message.
      depth: number of features.

    Raises:
      ValueError: if it is odd.
    """
    if depth % 2:
        raise ValueError(f'{owner} works on pairs of features, got {depth}: use an even number')
