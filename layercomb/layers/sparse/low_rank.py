"""`LowRankDense`: two thin matrices in the place of one."""

from __future__ import annotations

from layercomb.layers.basic.dense import Dense
from layercomb.layers.combinators.serial import Serial


def LowRankDense(n_units: int, rank: int, name: str | None = None) -> Serial:
    """y = x A B + b with A (D, rank) and B (rank, n_units): a dense layer of low rank.

    Args:
      n_units: the width of the output.
      rank: of the product.
      name: of the layer.

    >>> from layercomb import tl
    >>> tl.LowRankDense(512, 8)
    Serial(Dense(8, use_bias=False), Dense(512))
    """
    return Serial(Dense(rank, use_bias=False), Dense(n_units), name=name)
