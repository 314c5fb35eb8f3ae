"""Caches of keys and values for decoding, with a position for each row.

A cache is as long as the signature that `init` was given. Rows count their own positions, so that
prompts of different lengths may share a batch: ingest them padded at the end, set `position` to
their lengths, and what the padding left behind is overwritten before it is seen.

Rows and heads share one axis. A product of matrices wants its batch to be one axis, and where that
is not so from the start XLA writes the new positions once into what it returns and again into a
copy that it reads: a token then costs as much as the whole cache is long.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.core.layer import POSITION
from layercomb.trees import Tree

# In the state of a layer whose own layers read more than its inputs: how much before them, (B,).
BEFORE = 'before'


def init_cache(
    k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, masked: bool, length: int | None = None
) -> Tree:
    """An empty cache, (B·H, L, …), for keys (B, H, L, K) and values (B, H, L, V).

    Args:
      k: the keys' signature.
      v: the values'.
      masked: whether to keep which positions are real, too.
      length: how many positions to keep room for; by default L.
    """
    length = k.shape[2] if length is None else length

    def room(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((x.shape[0] * x.shape[1], length, x.shape[3]), x.dtype)

    cache = {'k': room(k), 'v': room(v), POSITION: jnp.zeros(k.shape[0], jnp.int32)}
    return cache | {'mask': jnp.zeros((k.shape[0], length), bool)} if masked else cache


def append(cache: Tree, values: Tree, start: jax.Array) -> Tree:
    """Writes the next T positions of each row and moves the rows' positions on.

    Args:
      cache: as `init_cache` makes it.
      values: new ``k`` and ``v`` (B, H, T, …), and ``mask`` (B, T) if the cache has one.
      start: (B,) int32, the index in the cache at which each row's go.

    Returns:
      The cache; its ``position`` has grown by T.
    """
    length = values['k'].shape[2]
    written = {
        name: _write(cache[name], new.astype(cache[name].dtype), start)
        for name, new in values.items()
    }
    return {**written, POSITION: cache[POSITION] + length}


def by_row(cache: Tree) -> Tree:
    """A cache's arrays with rows and heads apart: (B, H, L, …), and ``mask`` (B, L)."""
    rows = len(cache[POSITION])
    return {
        name: x.reshape(rows, -1, *x.shape[1:]) if x.ndim == 3 else x for name, x in cache.items()
    }


def init_past(x: jax.ShapeDtypeStruct, reach: int) -> Tree:
    """Room for the inputs (B, L, D) of a layer that sees so many positions back, all zero."""
    batch, length, width = x.shape
    past = jnp.zeros((batch, reach + length, width), x.dtype)
    return {'past': past, POSITION: jnp.zeros(batch, jnp.int32)}


def with_past(x: jax.Array, state: Tree, reach: int) -> tuple[jax.Array, Tree]:
    """The next inputs (B, T, D) behind the `reach` before them, each row at its position.

    All inputs are kept, and not the last few alone, so that rows can go back to where their prompts
    end.

    Args:
      x: the next inputs.
      state: as `init_past` makes it.
      reach: how many positions back are seen.

    Returns:
      (B, reach + T, D), and the state with the inputs written.
    """
    position, length = position_of(state), x.shape[1]
    room = state['past'].shape[1] - reach
    refuse_overflow(position, length, room)

    def one(past: jax.Array, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        past = jax.lax.dynamic_update_slice_in_dim(past, x, position + reach, 0)
        return past, jax.lax.dynamic_slice_in_dim(past, position, reach + length, 0)

    past, x = jax.vmap(one)(state['past'], x, position)
    moved = {'past': past, POSITION: position + length}
    return poison_overflow(x, position, length, room), moved


def position_of(state: Tree) -> jax.Array:
    """Where the rows of a decoding state stand, (B,) int32.

    Raises:
      ValueError: if the state was not made for ``PREDICT``.
    """
    if POSITION not in state:
        raise ValueError(
            'this state holds no caches: make one with lc.init_state(net, signature), or '
            'model.init(x, mode=Mode.PREDICT)'
        )
    return state[POSITION]


def taken(position: jax.Array) -> int:
    """How many positions the furthest row has taken; 0 inside `jit`, where it is not known."""
    known = not isinstance(position, jax.core.Tracer)
    return int(np.asarray(position).max(initial=0)) if known else 0


def refuse_overflow(position: jax.Array, length: int, room: int) -> None:
    """Raises a ValueError where it is known that the next positions do not fit.

    Inside `jit` positions are not known; `poison_overflow` then makes the outputs NaN.
    """
    reached = taken(position)
    if reached + length > room:
        raise ValueError(
            f'the cache holds {room} positions, {reached} are taken and {length} more were given: '
            'make the state with a longer signature, or give fewer'
        )


def poison_overflow(y: jax.Array, position: jax.Array, length: int, room: int) -> jax.Array:
    """`y` (B, …), with NaN in the rows whose next positions did not fit into the cache."""
    fits = position + length <= room
    return jnp.where(fits.reshape(-1, *[1] * (y.ndim - 1)), y, jnp.nan)


def _write(room: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes (B, H, T, …) into (B·H, L, …), or (B, T) into (B, L), at a place for each row."""
    new = new.reshape(room.shape[0], -1, *room.shape[2:])  # (B·H, T, …)
    if len(start) == 1:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start[0], 1)

    def one(room: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start, 0)

    return jax.vmap(one)(room, new, jnp.repeat(start, len(room) // len(start)))
