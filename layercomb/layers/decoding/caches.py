"""Decoding caches: keys and values, or past inputs, with a position for each row.

A cache has room for the length of the signature given to `init`. Each row counts its own positions,
so that prompts of different lengths may share a batch: ingest them padded at the end, then `seek`
to their lengths. What the padding left in the cache is overwritten before it is seen.

Rows and heads share one axis, the batch axis of the matrix products. With two axes XLA would write
new positions into the result, copy the whole cache to read it, and take time proportional to the
length of the cache for every token.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.decoding.narrow import Kept, rounded, zeros
from layercomb.layers.decoding.seek import Position, Seekable

C = TypeVar('C', bound='KVCache')


class KVCache(Seekable):
    """Keys and values of the positions taken so far; the whole state of an attention layer.

    Attributes:
      k: (B·H, L, K), an array or, in 8 bits, `Rounded`.
      v: (B·H, L, V), likewise.
      mask: (B, L) bool, True = a real position; None if all are.
      position: how many positions each row has taken.
    """

    k: Kept
    v: Kept
    mask: jax.Array | None
    position: Position

    @classmethod
    def empty(
        cls: type[C],
        k: jax.ShapeDtypeStruct,
        v: jax.ShapeDtypeStruct,
        masked: bool,
        length: int | None = None,
        bits: int | None = None,
        **more: Any,
    ) -> C:
        """An empty cache for keys (B, H, L, K) and values (B, H, L, V).

        Args:
          k: the signature of the keys.
          v: the signature of the values.
          masked: whether the cache has a mask.
          length: positions to keep room for; None for L.
          bits: 16 or 8, in which keys and values are kept; None keeps their dtypes.
          **more: fields that a subclass adds.
        """
        batch, length = k.shape[0], k.shape[2] if length is None else length

        def room(x: jax.ShapeDtypeStruct) -> Kept:
            return zeros((x.shape[0] * x.shape[1], length, x.shape[3]), x.dtype, bits)

        mask = jnp.zeros((batch, length), bool) if masked else None
        return cls(k=room(k), v=room(v), mask=mask, position=Position.first(batch), **more)

    @property
    def room(self) -> int:
        """L, the number of positions that fit."""
        n: int = self.k.shape[1]
        return n

    def append(self: C, start: jax.Array, **values: jax.Array | None) -> C:
        """The cache with the next T positions of each row written, and positions moved on by T.

        Args:
          start: (B,) int32, the index at which each row's new positions go.
          **values: ``k`` and ``v`` (B, H, T, …), ``mask`` (B, T) if the cache has one, and the
            arrays that a subclass keeps per position; None is skipped.
        """
        new = {name: x for name, x in values.items() if x is not None}
        written = {name: _write(getattr(self, name), x, start) for name, x in new.items()}
        return self.replace(**written, position=self.position.moved(new['k'].shape[2]))

    def by_row(self, x: Kept) -> Kept:
        """Something of the cache with rows and heads apart: (B·H, L, …) → (B, H, L, …)."""
        n_rows = len(self.position.rows)
        return jax.tree.map(lambda x: x.reshape(n_rows, -1, *x.shape[1:]), x)


class Past(Seekable):
    """Past inputs, for a layer that sees some positions back.

    All inputs are kept, not only the last few, so that rows can go back to the end of their
    prompts.

    Attributes:
      past: (B, reach + L, D), zeros before the first position.
      position: how many positions each row has taken.
    """

    past: jax.Array
    position: Position

    @classmethod
    def empty(cls, x: jax.ShapeDtypeStruct, reach: int) -> Past:
        """An empty cache for x.

        Args:
          x: the signature (B, L, D).
          reach: how many positions back the layer sees.
        """
        batch, length, width = x.shape
        return cls(jnp.zeros((batch, reach + length, width), x.dtype), Position.first(batch))

    def extend(self, x: jax.Array, reach: int) -> tuple[jax.Array, Past]:
        """The next inputs with the `reach` inputs before them, at each row's position.

        Args:
          x: (B, T, D).
          reach: as of `empty`.

        Returns:
          (B, reach + T, D), and the cache with the inputs written.

        Raises:
          ValueError: if the cache is known to overflow.
        """
        position, length = self.position.rows, x.shape[1]
        room = self.past.shape[1] - reach
        refuse_overflow(position, length, room)

        def one(past: jax.Array, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
            past = jax.lax.dynamic_update_slice_in_dim(past, x, position + reach, 0)
            return past, jax.lax.dynamic_slice_in_dim(past, position, reach + length, 0)

        past, x = jax.vmap(one)(self.past, x, position)
        moved = Past(past, self.position.moved(length))
        return poison_overflow(x, position, length, room), moved


def taken(position: jax.Array) -> int:
    """How many positions the furthest row has taken; 0 inside `jit`, where it is not known.

    Args:
      position: (B,) int32.
    """
    known = not isinstance(position, jax.core.Tracer)
    return int(np.asarray(position).max(initial=0)) if known else 0


def refuse_overflow(position: jax.Array, length: int, room: int) -> None:
    """Checks that the next positions fit, where positions are known.

    Inside `jit` they are not known; `poison_overflow` then makes the outputs NaN.

    Args:
      position: (B,) int32, positions taken.
      length: how many come next.
      room: how many fit.

    Raises:
      ValueError: if they are known not to fit.
    """
    reached = taken(position)
    if reached + length > room:
        raise ValueError(
            f'the cache holds {room} positions, {reached} are taken and {length} more were given: '
            'make the state with a longer signature, or give fewer'
        )


def poison_overflow(y: jax.Array, position: jax.Array, length: int, room: int) -> jax.Array:
    """`y` with NaN in the rows whose next positions do not fit.

    Args:
      y: (B, …), floating.
      position: (B,) int32, positions taken before.
      length: how many came next.
      room: how many fit.
    """
    fits = position + length <= room
    return jnp.where(fits.reshape(-1, *[1] * (y.ndim - 1)), y, jnp.nan)


def _write(room: Kept, new: jax.Array, start: jax.Array) -> Kept:
    """Writes (B, H, T, …) into (B·H, L, …), or (B, T) into (B, L), at `start` (B,)."""
    write = functools.partial(_write_array, start=start)
    return jax.tree.map(write, room, rounded(new, room))


def _write_array(room: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    new = new.reshape(room.shape[0], -1, *room.shape[2:])  # (B·H, T, …)
    if len(start) == 1:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start[0], 1)

    def one(room: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start, 0)

    return jax.vmap(one)(room, new, jnp.repeat(start, len(room) // len(start)))
