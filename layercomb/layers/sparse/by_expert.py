"""Products of rows with the weights of each row's expert, in sorted tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers.quantized.rows import put, rows
from layercomb.trees import Tree

Function = Callable[[jax.Array], jax.Array]
_TILE = (8, 128)  # the fewest and the most rows of a tile


def by_expert(w_in: Tree, w_out: Tree, f: Function, x: jax.Array, experts: jax.Array) -> jax.Array:
    """y[t] = f(x[t] W₁[e] + b₁[e]) W₂[e] + b₂[e], where e = experts[t].

    Positions are sorted by expert into tiles of one expert each, whose last rows may be empty. The
    tiles are computed one after the other, so that no expert computes rows of another, and no
    weight is copied per position. With E positions or fewer, a tile is one position.

    Args:
      w_in: ``kernel`` W₁ (E, D, M), ``bias`` b₁ (E, M) or none.
      w_out: ``kernel`` W₂ (E, M, D), ``bias`` b₂ (E, D) or none.
      f: an elementwise function.
      x: (T, D).
      experts: (T,) integers, from 0 to E − 1.

    Returns:
      (T, D), in the dtype of x, summed in float32.
    """
    tiles = _tiles(experts.astype(jnp.int32), len(w_in['kernel']))
    h = x.at[tiles.row].get(mode='fill', fill_value=0, wrap_negative_indices=False)  # (n, C, D)
    h = f(_dense_by_tile(w_in, h, tiles.expert))  # (n, C, M)
    y = _dense_by_tile(w_out, h, tiles.expert)
    return rows(y.reshape(-1, y.shape[-1]), tiles.place)  # (T, D)


class _Tiles(NamedTuple):
    """Where T positions are in n tiles of C places.

    Attributes:
      expert: (n,) int32, of each tile.
      row: (n, C) int32, the position in each place, T where there is none.
      place: (T,) int32, of each position, counted through all tiles.
    """

    expert: jax.Array
    row: jax.Array
    place: jax.Array


def _tiles(experts: jax.Array, n_experts: int) -> _Tiles:
    t = len(experts)
    position = jnp.arange(t, dtype=jnp.int32)
    if t <= n_experts:
        return _Tiles(experts, position[:, None], position)
    size = _tile_size(t, n_experts)
    n = n_experts + (t - n_experts) // size  # the most tiles: each expert has a position
    all_experts = jnp.arange(n_experts, dtype=jnp.int32)[None]
    count = (experts[:, None] == all_experts).sum(0, dtype=jnp.int32)  # (E,)
    n_tiles = -(-count // size)
    end = jnp.cumsum(jnp.stack([count, n_tiles]), 1)
    first, first_tile = end - jnp.stack([count, n_tiles])  # of each expert
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    place = position + rows(first_tile * size - first, rows(experts, order))  # in sorted order
    row = put(jnp.full(n * size, t, jnp.int32), place, order).reshape(n, size)
    expert = (position[:n, None] >= end[1][None]).sum(1, dtype=jnp.int32)
    expert = jnp.minimum(expert, n_experts - 1)  # for unused tiles, which are empty
    return _Tiles(expert, row, put(jnp.zeros_like(order), order, place))


def _tile_size(n_rows: int, n_experts: int) -> int:
    """A power of two, at most half of the mean rows per expert, so that few places are empty."""
    low, high = _TILE
    half = n_rows // (2 * n_experts)
    return max(low, min(high, 1 << max(half.bit_length() - 1, 0)))


def _dense_by_tile(weights: Tree, x: jax.Array, expert: jax.Array) -> jax.Array:
    """x[i] W[e] + b[e] for each tile i, where e = expert[i]: (n, C, D) → (n, C, M)."""
    y = _dot_by_tile(x, weights['kernel'], expert)
    return y + rows(weights['bias'], expert)[:, None] if 'bias' in weights else y


@jax.custom_vjp
def _dot_by_tile(x: jax.Array, w: jax.Array, expert: jax.Array) -> jax.Array:
    """x[i] w[expert[i]], in a loop: on a CPU `ragged_dot` multiplies by every expert.

    Its gradient is written by hand: that of a scan would keep a copy of the weights for every tile.
    """
    return _scan_dot(x, w, expert, 0)


def _forward(x: jax.Array, w: jax.Array, expert: jax.Array) -> tuple[jax.Array, Any]:
    return _dot_by_tile(x, w, expert), (x, w, expert)


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, expert = kept

    def add(dw: jax.Array, tile: Any) -> tuple[jax.Array, None]:
        x, dy, e = tile
        return dw.at[e].add(_contract(x, dy, 0, 0)), None

    dw, _ = jax.lax.scan(add, jnp.zeros(w.shape, jnp.float32), (x, dy, expert))
    return _scan_dot(dy, w, expert, 1), dw.astype(w.dtype), None


_dot_by_tile.defvjp(_forward, _backward)


def _scan_dot(x: jax.Array, w: jax.Array, expert: jax.Array, axis: int) -> jax.Array:
    """The last axis of each tile times one axis of its expert's matrix."""

    def one(_: None, tile: Any) -> tuple[None, jax.Array]:
        x, e = tile
        return None, _contract(x, w[e], 1, axis).astype(x.dtype)

    return jax.lax.scan(one, None, (x, expert))[1]


def _contract(a: jax.Array, b: jax.Array, axis: int, other: int) -> jax.Array:
    dimensions = (((axis,), (other,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
