"""`AxialPositions`: positional embeddings with few learned rows for very many positions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from layercomb.layers.basic.initializers import Initializer, Normal
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.positions.position import (
    begins_at_zero,
    check_length,
    init_position,
    next_positions,
)
from layercomb.shapes import Signature, as_deep, check_float, check_sequence, check_width
from layercomb.trees import Tree


class AxialPositions(Layer):
    """x + concat_a(table_a[i_a]), where (i_0, i_1, …) are position t's coordinates in a grid.

    x is (B, L, D), D being the sum of the depths. The grid is filled row by row: for a shape (m,
    n), i_0 = ⌊t / n⌋ and i_1 = t mod n. A million positions, (1024, 1024), need 2,048 rows.

    Weights: ``table_0`` (m, D_0), ``table_1`` (n, D_1), …

    Attributes:
      shape: of the grid, two numbers or more; their product is the longest sequence.
      depths: D_0, D_1, …; None for D in equal parts, the first one with the remainder.
      table_init: of the tables.

    Raises:
      ValueError: if depths and axes differ in number, the depths do not add up to D, or a sequence
        is longer than the grid.

    References:
      Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
    """

    shape: tuple[int, ...]
    depths: tuple[int, ...] | None = None
    table_init: Initializer = Normal(0.02)

    float32 = True
    weight_axes = property(lambda self: {f'table_{a}': 'L:D' for a in range(len(self.shape))})
    position_wise = False  # a slice does not know its first position
    sees_segments = True
    spans_devices = True
    max_len = property(lambda self: math.prod(self.shape))

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ValueError(
                f'AxialPositions: shape={self.shape} must be two positive numbers or more, whose '
                'product is the longest sequence'
            )
        if self.depths is not None and (
            len(self.depths) != len(self.shape) or min(self.depths) < 1
        ):
            raise ValueError(
                f'AxialPositions: shape={self.shape} needs a positive depth for each axis, got '
                f'depths={self.depths}'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The tables, float32; in ``PREDICT`` the state holds a `Position`.

        Args:
          signature: of x (B, L, D), floating.
          rng: a typed key.
          mode: see `Mode`.
        """
        (x,) = signature
        check_float('AxialPositions', x)
        check_sequence('AxialPositions', x)
        check_length('AxialPositions', x.shape[1], self.max_len)
        depths = self._depths(x.shape[-1])
        keys = jax.random.split(rng, len(depths))
        tables = {
            f'table_{a}': self.table_init(key, (n, d))
            for a, (key, n, d) in enumerate(zip(keys, self.shape, depths, strict=True))
        }
        return tables, init_position(signature, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (B, L, D), in the dtype of x, and the new state.

        Args:
          weights: the tables.
          state: in ``PREDICT`` it holds a `Position`, else ``{}``.
          inputs: x (B, L, D); in ``PREDICT`` the next positions.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: for positions known to be outside the grid; inside `jit` they give NaN.
        """
        (x,) = inputs
        check_sequence('AxialPositions', x)
        length = x.shape[1]
        from_zero = begins_at_zero(state, mode)
        where, state = next_positions(self, state, length, mode)  # (B or 1, L)
        tables = [weights[f'table_{a}'] for a in range(len(self.shape))]
        check_width(x, sum(table.shape[1] for table in tables))
        if from_zero:
            added = self._grid(tables, length)
        else:
            inside = (where < self.max_len)[..., None]
            places = jnp.unravel_index(where, self.shape)
            rows = [table[i] for table, i in zip(tables, places, strict=True)]  # (B, L, D_a)
            added = jnp.where(inside, jnp.concatenate(rows, -1), jnp.nan)
        return (x + as_deep(added, x).astype(x.dtype),), state

    def _grid(self, tables: list[jax.Array], length: int) -> jax.Array:
        """The first `length` rows, (L, D), by broadcasting: the gradient of a gather is slow."""
        used = -(-length // math.prod(self.shape[1:]))  # rows of the grid
        shape = (used, *self.shape[1:])
        parts = []
        for axis, table in enumerate(tables):
            table = table[:used] if axis == 0 else table
            ones = [1] * len(shape)
            ones[axis] = shape[axis]
            parts.append(jnp.broadcast_to(table.reshape(*ones, -1), (*shape, table.shape[-1])))
        return jnp.concatenate(parts, -1).reshape(math.prod(shape), -1)[:length]  # (L, D)

    def _depths(self, width: int) -> tuple[int, ...]:
        n = len(self.shape)
        depths = self.depths or (width - (n - 1) * (width // n), *[width // n] * (n - 1))
        if sum(depths) != width:
            raise ValueError(
                f'AxialPositions: depths={depths} add up to {sum(depths)}, the input is {width} '
                'wide: make them equal'
            )
        return depths


def nearest_grid(max_len: int) -> tuple[int, int]:
    """The squarest grid for `max_len` positions, both sides being powers of two.

    >>> nearest_grid(65536), nearest_grid(12288)
    ((256, 256), (128, 128))
    """
    bits = max(2, math.ceil(math.log2(max_len)))
    return 2 ** (bits // 2), 2 ** (bits - bits // 2)
