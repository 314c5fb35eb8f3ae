"""`LearnedPositions`."""

from __future__ import annotations

from layercomb.checks import Size
from layercomb.layers.basic.initializers import Initializer, Normal
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.positions.position import (
    add_rows,
    check_length,
    init_position,
)
from layercomb.shapes import (
    check_float,
    check_sequence,
)


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

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('LearnedPositions', x)
        check_sequence('LearnedPositions', x)
        check_length('LearnedPositions', x.shape[1], self.max_len)
        table = self.table_init(rng, (self.max_len, x.shape[-1]))
        return {'table': table}, init_position(signature, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        check_sequence('LearnedPositions', x)
        return add_rows(self, weights['table'], state, x, mode)
