"""The cache of attention that selects: keys, values, and the position of each real key.

Shape letters: B batch, H heads, G heads of keys and values, L room, T new positions.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp

from layercomb.layers.decoding.caches import KVCache


class PlacedCache(KVCache):
    """A cache that knows its real positions by number, padding left out.

    Attributes:
      k: (B·G, L, K).
      v: (B·G, L, V).
      mask: (B, L) bool, True = a real position.
      position: how many positions each row has taken.
      at: (B, L) int32, the position of each real key in turn; what is behind the last is not used.
      n_real: (B,) int32, how many there are.
    """

    mask: jax.Array
    at: jax.Array
    n_real: jax.Array

    @classmethod
    def unfilled(cls, k: jax.ShapeDtypeStruct, v: jax.ShapeDtypeStruct, **more: Any) -> Self:
        """An empty cache for keys (B, G, L, K) and values (B, G, L, V).

        Args:
          k: the signature of the keys.
          v: the signature of the values.
          **more: fields that a subclass adds.
        """
        b, _, length, _ = k.shape
        more |= {'at': jnp.zeros((b, length), jnp.int32), 'n_real': jnp.zeros(b, jnp.int32)}
        return cls.empty(k, v, masked=True, **more)

    def seek(self, lengths: jax.Array) -> Self:
        """The cache with each row at another position, and what depends on it made again.

        Args:
          lengths: (B,) int32.
        """
        return super().seek(lengths).refilled()

    def refilled(self) -> Self:
        """The cache with all but keys, values, mask and positions made from these."""
        there = self.there()
        at = jnp.argsort(~there, axis=1, stable=True).astype(jnp.int32)
        return self.replace(at=at, n_real=there.sum(1, dtype=jnp.int32))

    def cut(self, n: int) -> Self:
        """The first n positions, for `Selecting.chosen_in` alone.

        Sums, rings and counts stay those of the whole cache.

        Args:
          n: how many.
        """
        names = ('k', 'v', 'mask', 'at')
        return self.replace(**{name: getattr(self, name)[:, :n] for name in names})

    def there(self) -> jax.Array:
        """Which positions are taken and real, (B, L) bool."""
        where = jnp.arange(self.room, dtype=jnp.int32)[None]
        return self.mask & (where < self.position.rows[:, None])

    def pushed(self, position: jax.Array, real: jax.Array, **new: jax.Array) -> Self:
        """The cache with the next position of each row among its real ones.

        Args:
          position: (B,) int32.
          real: (B,) bool, whether it is one.
          **new: its keys ``k`` (B·G, K), and what else a subclass keeps of them, for subclasses.
        """
        row = jnp.arange(len(position), dtype=jnp.int32)
        at = self.at.at[row, self.n_real].set(position, mode='drop')
        return self.replace(at=at, n_real=self.n_real + real.astype(jnp.int32))

    def of_places(self, places: jax.Array) -> jax.Array:
        """The positions of the real keys of given numbers; negative where there is none.

        Args:
          places: (B, …) int32, counted from 0.

        Returns:
          (B, …) int32.
        """
        return of_places(self.at, self.n_real, places)


def of_places(at: jax.Array, n_real: jax.Array, places: jax.Array) -> jax.Array:
    """The positions of the real keys of given numbers; negative where there is none.

    Args:
      at, n_real: as of `PlacedCache`.
      places: (B, …) int32, counted from 0.

    Returns:
      (B, …) int32.
    """
    flat = places.reshape(len(places), -1)
    there = (flat >= 0) & (flat < n_real[:, None])
    found = jnp.take_along_axis(at, jnp.clip(flat, 0, at.shape[1] - 1), axis=1)
    return jnp.where(there, found, -1).reshape(places.shape)


def once(at: jax.Array) -> jax.Array:
    """Which of the positions found are there, and not found before: (N, J) int32 → (N, J) bool."""
    order = jnp.broadcast_to(jnp.arange(at.shape[1], dtype=jnp.int32)[None], at.shape)
    if at.shape[1] <= 256:
        earlier = order[:, :, None] > order[:, None]
        before = (at[:, :, None] == at[:, None]) & earlier  # (N, J, J)
        return (at >= 0) & ~before.any(-1)
    found, order = jax.lax.sort((at, order), num_keys=2)
    first = found != jnp.pad(found[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    row = jnp.arange(len(at), dtype=jnp.int32)[:, None]
    return jnp.zeros(at.shape, bool).at[row, order].set(first & (found >= 0))


SHORTEST, STEP = 512, 8  # of parts: each is compiled, and shorter ones would save little


def parts(length: int, room: int) -> tuple[int, ...]:
    """Lengths of the first part of a cache that may hold new positions, from few to all.

    Args:
      length: T, how many there are.
      room: L.

    >>> parts(16, 20_000), parts(600, 20_000), parts(16, 300)
    ((512, 4096, 20000), (4096, 20000), (300,))
    """
    made = [SHORTEST]
    while made[-1] * STEP < room:
        made.append(made[-1] * STEP)
    return (*(n for n in made if length <= n < room), room)


def placed(x: jax.Array, position: jax.Array, room: int) -> jax.Array:
    """New positions among zeros: x (B, H, T, …) → (B, H, L, …).

    Args:
      x: the new values.
      position: (B,) int32, where each row's begin.
      room: L.
    """

    def one(x: jax.Array, at: jax.Array) -> jax.Array:
        zeros = jnp.zeros((x.shape[0], room, *x.shape[2:]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, x, at, 1)

    return jax.vmap(one)(x, position)
