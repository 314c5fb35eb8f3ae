"""Rows through the experts that each of them chose, in sorted tiles.

Shape letters: T rows, K choices of a row, E experts, C places of a tile, n tiles, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers.quantized.matrix import Narrow, rows_of
from layercomb.layers.quantized.native import runs_natively
from layercomb.layers.quantized.rows import add, put, rows

Expert = Callable[[Any, jax.Array, jax.Array], jax.Array]
_TILE = (8, 128)  # the fewest and the most rows of a tile
_AT_ONCE = 16  # choices of a row that are added up without a loop


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_expert(
    expert: Expert, weights: Any, x: jax.Array, experts: jax.Array, gates: jax.Array
) -> jax.Array:
    """y[t] = Σₖ expert(weights[e], x[t], g), where e = experts[t, k] and g = gates[t, k].

    Rows are sorted by expert into tiles of one expert each, whose last places may be empty. The
    tiles are computed one after the other, so that no expert computes rows of another, and no
    weight is copied per row. With E choices or fewer, a tile is one row. The backward pass computes
    each tile again, so that only the arguments are kept.

    Args:
      expert: from one expert's weights, rows (C, D) and their gates (C, 1) to rows (C, D).
      weights: a tree of arrays with a leading axis E. There are no gradients for a `Narrow`, whose
        parts may come to `expert` in float32.
      x: (T, D).
      experts: (T, K) integers, from 0 to E − 1.
      gates: (T, K) float32.

    Returns:
      (T, D), in the dtype of x, summed in float32.
    """
    tiles = _tiles_of(weights, experts)

    x_, gates_ = _ended(x), _ended(gates.reshape(-1))

    def one(_: None, tile: _Tile) -> tuple[None, jax.Array]:
        gate = rows(gates_, tile.row)[:, None]
        y = expert(_of(weights, tile.expert), rows(x_, tile.token), gate)
        return None, y.astype(x.dtype)

    return _gathered(jax.lax.scan(one, None, tiles.each)[1], tiles, x)


def _forward(expert: Expert, *given: Any) -> tuple[jax.Array, Any]:
    return by_expert(expert, *given), given


def _backward(expert: Expert, kept: Any, dy: jax.Array) -> tuple[Any, jax.Array, None, jax.Array]:
    weights, x, experts, gates = kept
    tiles = _tiles_of(weights, experts)
    leaves, tree = jax.tree.flatten(weights, is_leaf=_is_narrow)
    free = [i for i, leaf in enumerate(leaves) if not _is_narrow(leaf)]
    x_, dy_, gates_ = _ended(x), _ended(dy), _ended(gates.reshape(-1))

    def one(sums: list[jax.Array], tile: _Tile) -> tuple[list[jax.Array], Any]:
        own = [_of(leaf, tile.expert) for leaf in leaves]

        def of_free(given: list[jax.Array], x: jax.Array, gate: jax.Array) -> jax.Array:
            all_own = own.copy()
            for i, leaf in zip(free, given, strict=True):
                all_own[i] = leaf
            return expert(jax.tree.unflatten(tree, all_own), x, gate)

        gate = rows(gates_, tile.row)[:, None]
        y, pull = jax.vjp(of_free, [own[i] for i in free], rows(x_, tile.token), gate)
        dw, dx, dg = pull(rows(dy_, tile.token).astype(y.dtype))
        sums = [s.at[tile.expert].add(d.astype(s.dtype)) for s, d in zip(sums, dw, strict=True)]
        return sums, (dx, dg[:, 0])

    zeros = [jnp.zeros(leaves[i].shape, jnp.float32) for i in free]
    sums, (dx, dg) = jax.lax.scan(one, zeros, tiles.each)
    all_dw: list[Any] = [None] * len(leaves)
    for i, total in zip(free, sums, strict=True):
        all_dw[i] = total.astype(leaves[i].dtype)
    d_gates = rows(dg.reshape(-1), tiles.place)  # (n, C) → (T, K)
    return jax.tree.unflatten(tree, all_dw), _gathered(dx, tiles, x), None, d_gates


by_expert.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """One of n tiles of C places, or all of them on a leading axis.

    Attributes:
      expert: () int32.
      row: (C,) int32, the choice in each place, counted through (T, K); T K where there is none.
      token: (C,) int32, the row of x in each place; T where there is none.
    """

    expert: jax.Array
    row: jax.Array
    token: jax.Array


class _Tiles(NamedTuple):
    """Where the choices are.

    Attributes:
      each: the tiles.
      place: (T, K) int32, of each choice, counted through all tiles.
    """

    each: _Tile
    place: jax.Array


def _tiles_of(weights: Any, experts: jax.Array) -> _Tiles:
    n_experts = len(jax.tree.leaves(weights)[0])
    expert, row, place = _tiles(experts.reshape(-1).astype(jnp.int32), n_experts)
    return _Tiles(_Tile(expert, row, row // experts.shape[1]), place.reshape(experts.shape))


def _tiles(experts: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The expert of each tile (n,), the choice in each place (n, C), and the place of each choice.

    Args:
      experts: (N,) int32, of each choice.
      n_experts: E.
    """
    t = len(experts)
    position = jnp.arange(t, dtype=jnp.int32)
    if t <= n_experts:
        return experts, position[:, None], position
    size = _tile_size(t, n_experts)
    n = n_experts + (t - n_experts) // size  # the most tiles: each expert has a choice
    count = counts(experts, n_experts)
    n_tiles = -(-count // size)
    end = jnp.cumsum(jnp.stack([count, n_tiles]), 1)
    first, first_tile = end - jnp.stack([count, n_tiles])  # of each expert
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    place = position + rows(first_tile * size - first, rows(experts, order))  # in sorted order
    row = put(jnp.full(n * size, t, jnp.int32), place, order).reshape(n, size)
    expert = (position[:n, None] >= end[1][None]).sum(1, dtype=jnp.int32)
    expert = jnp.minimum(expert, n_experts - 1)  # for unused tiles, which are empty
    return expert, row, put(jnp.zeros_like(order), order, place)


def counts(experts: jax.Array, n_experts: int, weights: jax.Array | None = None) -> jax.Array:
    """How often each expert is chosen, or the sum of its choices' weights: (N,) → (E,) int32.

    Args:
      experts: (N,) integers, from 0 to E − 1.
      n_experts: E.
      weights: (N,) int32; None for 1 each.
    """
    # A comparison of each choice with each expert would be N × E numbers.
    weights = jnp.ones(experts.shape, jnp.int32) if weights is None else weights
    return add(jnp.zeros(n_experts, jnp.int32), experts, weights)


def _tile_size(n_rows: int, n_experts: int) -> int:
    """A power of two, at most half of the mean rows per expert, so that few places are empty."""
    low, high = _TILE
    half = n_rows // (2 * n_experts)
    return max(low, min(high, 1 << max(half.bit_length() - 1, 0)))


def _of(weights: Any, expert: jax.Array) -> Any:
    """The weights of one expert: a tree of arrays with a leading axis E → one without."""
    return jax.tree.map(lambda w: _part(w, expert), weights, is_leaf=_is_narrow)


def _part(w: Any, expert: jax.Array) -> Any:
    if not _is_narrow(w) or w.scales is not None or not runs_natively():
        return jax.tree.map(lambda x: x[expert], w)
    # A CPU's compiler would widen all experts, to cut out one; looking up rows is a kernel's work.
    (_, n, d), at = w.values.shape, jnp.arange(w.values.shape[1], dtype=jnp.int32)
    table = dataclasses.replace(w, values=w.values.reshape(-1, d))
    return rows_of(table.take(expert * n + at))


def _is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Narrow)


def _ended(x: jax.Array) -> jax.Array:
    """x with a 0 after the last, for places without a row."""
    return jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]), x.dtype)])


def _gathered(y: jax.Array, tiles: _Tiles, like: jax.Array) -> jax.Array:
    """The sum of each row's choices: (n, C, D) → (T, D)."""
    y = y.reshape(-1, y.shape[-1])

    def one(total: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        return total + rows(y, place).astype(jnp.float32), None

    # One choice of all rows at a time: all choices of them would be y once more.
    start = jnp.zeros(like.shape, jnp.float32)
    total, _ = jax.lax.scan(one, start, tiles.place.T, unroll=_AT_ONCE)
    return total.astype(like.dtype)
