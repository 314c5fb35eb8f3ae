"""`LowRankDense`: two thin matrices in place of one."""

from __future__ import annotations

from layercomb.layers.basic.dense import Dense
from layercomb.layers.combinators.serial import Serial


def LowRankDense(n_units: int, rank: int, name: str | None = None) -> Serial:
    """y = x A B + b, a dense layer of low rank: (…, D) → (…, n_units).

    A is (D, rank), B is (rank, n_units), b is (n_units,).

    Args:
      n_units: the width of the output.
      rank: of the product A B.
      name: of the layer; None for the default name of a `Serial`.

    >>> from layercomb import tl
    >>> tl.LowRankDense(512, 8)
    Serial(Dense(8, use_bias=False), Dense(512))
    """
    return Serial(Dense(rank, use_bias=False), Dense(n_units), name=name)
