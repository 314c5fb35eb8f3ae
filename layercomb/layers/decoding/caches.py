"""Caches for decoding: keys and values, or past inputs, with a position for each row.

A cache is as long as the signature that `init` was given. Rows count their own positions, so that
prompts of different lengths may share a batch: ingest them padded at the end, `seek` to their
lengths, and what the padding left behind is overwritten before it is seen.

Rows and heads share one axis. A product of matrices wants its batch to be one axis. Where that is
not so from the start, XLA writes the new positions once into what it returns and again into a copy
that it reads, and a token then costs as much as the whole cache is long.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.decoding.seek import Position, Seekable

C = TypeVar('C', bound='KVCache')


class KVCache(Seekable):
    """Keys and values of the positions that were taken; the whole state of an attention layer.

    Attributes:
      k: (B·H, L, K).
      v: (B·H, L, V).
      mask: (B, L) bool, which positions are real; None if all are.
      position: where the rows stand.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    position: Position

    @classmethod
    def empty(
        cls: type[C],
        k: jax.ShapeDtypeStruct,
        v: jax.ShapeDtypeStruct,
        masked: bool,
        length: int | None = None,
        **more: Any,
    ) -> C:
        """A cache of nothing yet, for keys (B, H, L, K) and values (B, H, L, V).

        Args:
          k: the keys' signature.
          v: the values'.
          masked: whether to keep which positions are real, too.
          length: how many positions to keep room for; by default L.
          **more: the fields that a subclass has beside these.
        """
        batch, length = k.shape[0], k.shape[2] if length is None else length

        def room(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((x.shape[0] * x.shape[1], length, x.shape[3]), x.dtype)

        mask = jnp.zeros((batch, length), bool) if masked else None
        return cls(k=room(k), v=room(v), mask=mask, position=Position.first(batch), **more)

    @property
    def room(self) -> int:
        """L, how many positions there is room for."""
        return self.k.shape[1]

    def append(self: C, start: jax.Array, **values: jax.Array | None) -> C:
        """Writes the next T positions of each row and moves the rows' positions on by T.

        Args:
          start: (B,) int32, the index in the cache at which each row's go.
          **values: new ``k`` and ``v`` (B, H, T, …), ``mask`` (B, T) if the cache has one, and what
            else a subclass keeps for each position.
        """
        new = {name: x for name, x in values.items() if x is not None}
        written = {name: _write(getattr(self, name), x, start) for name, x in new.items()}
        return self.replace(**written, position=self.position.moved(new['k'].shape[2]))

    def by_row(self, x: jax.Array) -> jax.Array:
        """One of the cache's arrays with rows and heads apart: (B·H, L, …) → (B, H, L, …)."""
        return x.reshape(len(self.position.rows), -1, *x.shape[1:])


class Past(Seekable):
    """What a layer that sees some positions back keeps of the positions that were taken.

    Everything is kept, and not the last few alone, so that rows can go back to where their prompts
    end.

    Attributes:
      past: (B, reach + L, D), zeros before the first position.
      position: where the rows stand.
    """

    past: jax.Array
    position: Position

    @classmethod
    def empty(cls, x: jax.ShapeDtypeStruct, reach: int) -> Past:
        """Room for x (B, L, D) of a layer that sees `reach` positions back."""
        batch, length, width = x.shape
        return cls(jnp.zeros((batch, reach + length, width), x.dtype), Position.first(batch))

    def extend(self, x: jax.Array, reach: int) -> tuple[jax.Array, Past]:
        """The next inputs (B, T, D) behind the `reach` before them, each row at its position.

        Returns:
          (B, reach + T, D), and the cache with the inputs written.
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
    new = new.astype(room.dtype).reshape(room.shape[0], -1, *room.shape[2:])  # (B·H, T, …)
    if len(start) == 1:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start[0], 1)

    def one(room: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(room, new, start, 0)

    return jax.vmap(one)(room, new, jnp.repeat(start, len(room) // len(start)))
