"""`Exchange`: positions for heads, between devices that split a sequence.

Each device has some positions of all heads. It gives most of them to others, and receives all
positions of some heads. What it then computes needs no other device, and is what one device would
compute for these heads; its outputs go back the same way.

Shape letters: B batch, L the whole length, n devices, H heads of queries, G heads of keys and
values, each of which H/G heads of queries share.

References:
  DeepSpeed Ulysses (Jacobs et al., 2023), https://arxiv.org/abs/2309.14509
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from layercomb.layers.attention.tiles import keys_of_heads
from layercomb.layers.facts.sequence import SEQUENCE, all_positions, sequence_parts


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Which heads each of n devices has. On one device nothing changes.

    Where n does not divide G, heads of keys and values are copied, each for fewer heads of queries.
    Where it does not divide H either, the last head fills up what is missing.

    Attributes:
      n: how many devices there are.
      n_heads: H.
      n_shared: G.
    """

    n: int
    n_heads: int
    n_shared: int

    @classmethod
    def of(cls, n_heads: int, n_shared: int) -> Self:
        """The exchange between the devices of the mesh, as `facts.sequence` finds them."""
        return cls(sequence_parts(), n_heads, n_shared)

    @property
    def is_even(self) -> bool:
        """Whether n divides G: nothing is copied."""
        return self.n_shared % self.n == 0

    @property
    def _copies(self) -> int:
        """How often a head of keys and values is there; it divides H/G."""
        group = self.n_heads // self.n_shared
        possible = (r for r in range(1, group + 1) if group % r == 0)
        return next((r for r in possible if self.n_shared * r % self.n == 0), group)

    @property
    def _missing(self) -> int:
        """How many heads are filled up."""
        return -(self.n_shared * self._copies) % self.n

    def queries(self, x: jax.Array, axis: int = 2) -> jax.Array:
        """What belongs to heads of queries: (B, H, …, L/n, …) → (B, its heads, …, L, …).

        Args:
          x: this device's positions.
          axis: of the positions.
        """
        if self.n == 1:
            return x
        x = _filled(x, self._missing)
        return jax.lax.all_to_all(x, SEQUENCE, split_axis=1, concat_axis=axis, tiled=True)

    def shared(self, x: jax.Array) -> jax.Array:
        """What belongs to heads of keys and values: (B, G, L/n, …) → (B, its heads, L, …).

        Args:
          x: this device's positions.
        """
        if self.n == 1:
            return x
        x = jnp.repeat(x, self._copies, axis=1)
        return self.queries(x)

    def back(self, y: jax.Array) -> jax.Array:
        """The inverse of `queries`: (B, its heads, L, …) → (B, H, L/n, …).

        Args:
          y: outputs of its heads.
        """
        if self.n == 1:
            return y
        y = jax.lax.all_to_all(y, SEQUENCE, split_axis=2, concat_axis=1, tiled=True)
        return y[:, : self.n_heads]

    def its(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Its heads of what is the same on all devices.

        Args:
          x: (…, H, …).
          axis: of the heads.
        """
        if self.n == 1:
            return x
        size = (self.n_heads + self._missing) // self.n
        its = jax.lax.axis_index(SEQUENCE) * size + jnp.arange(size, dtype=jnp.int32)
        return jnp.take(x, jnp.minimum(its, self.n_heads - 1), axis)

    def keys(self, rng: jax.Array | None) -> jax.Array | None:
        """Its heads' random keys.

        Args:
          rng: a typed key, or one for each head (H,); or None.
        """
        if self.n == 1 or rng is None:
            return rng
        return self.its(keys_of_heads(rng, self.n_heads))

    def rows(self, x: jax.Array | None) -> Any:
        """What belongs to positions alone: (B, L/n) → (B, L); None stays None.

        Args:
          x: a mask, or segments.
        """
        return None if x is None else all_positions(x)


def _filled(x: jax.Array, missing: int) -> jax.Array:
    """x (B, H, …) with its last head again, so often."""
    return jnp.concatenate([x, *[x[:, -1:]] * missing], axis=1) if missing else x
