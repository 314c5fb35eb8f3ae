"""`LearnedPositions`."""

from __future__ import annotations

import jax

from layercomb.checks import Size
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
    """x + table[t], one learned row a position.

    Weights: ``table`` (max_len, D).

    Attributes:
      max_len: the longest sequence.
      table_init: of the table.
    """

    max_len: Size
    table_init: Initializer = Normal(0.02)

    float32 = True
    weight_axes = {'table': 'L:D'}
    position_wise = False  # a piece of a sequence does not know where it begins

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        (x,) = signature
        check_float('LearnedPositions', x)
        check_sequence('LearnedPositions', x)
        check_length('LearnedPositions', x.shape[1], self.max_len)
        table = self.table_init(rng, (self.max_len, x.shape[-1]))
        return {'table': table}, init_position(signature, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        (x,) = inputs
        check_sequence('LearnedPositions', x)
        return add_rows(self, weights['table'], state, x, mode)
