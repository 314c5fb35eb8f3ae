"""`LearnedPositions`: one learned row for each position."""

from __future__ import annotations

from dataclasses import KW_ONLY

import jax

from layercomb.checks import Count, Size
from layercomb.layers.basic.initializers import Initializer, Normal
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.positions.position import (
    add_rows,
    check_length,
    init_position,
)
from layercomb.shapes import (
    Signature,
    check_float,
    check_sequence,
)
from layercomb.trees import Tree


class LearnedPositions(Layer):
    """y[b, t] = x[b, t] + table[first + t], (B, L, D) → (B, L, D): one learned row per position.

    Weights: ``table`` (first + max_len, D).

    Attributes:
      max_len: the longest sequence.
      table_init: of the table.
      first: the row of the first position; RoBERTa's and BART's tables begin with rows without use.

    Raises:
      ValueError: if a sequence is longer than `max_len`.
    """

    max_len: Size
    table_init: Initializer = Normal(0.02)
    _: KW_ONLY
    first: Count = 0

    float32 = True
    weight_axes = {'table': 'L:D'}
    position_wise = False  # a slice does not know its first position
    sees_segments = True
    spans_devices = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The table, float32; in ``PREDICT`` the state holds a `Position`.

        Args:
          signature: of x (B, L, D), floating.
          rng: a typed key.
          mode: see `Mode`.
        """
        (x,) = signature
        check_float('LearnedPositions', x)
        check_sequence('LearnedPositions', x)
        check_length('LearnedPositions', x.shape[1], self.max_len)
        table = self.table_init(rng, (self.first + self.max_len, x.shape[-1]))
        return {'table': table}, init_position(signature, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (B, L, D), in the dtype of x, and the new state.

        Args:
          weights: the table.
          state: in ``PREDICT`` it holds a `Position`, else ``{}``.
          inputs: x (B, L, D); in ``PREDICT`` the next positions.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: for positions known to pass `max_len`; inside `jit` they give NaN.
        """
        (x,) = inputs
        check_sequence('LearnedPositions', x)
        return add_rows(self, weights['table'][self.first :], state, x, mode)
