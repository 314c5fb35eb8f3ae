"""`in_pieces`: position-wise residuals of a block on a piece of the length at a time."""

from __future__ import annotations

from layercomb.checks import ChunkLen
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.residual import Residual
from layercomb.layers.core.layer import Layer


def in_pieces(layer: Layer, chunk_len: ChunkLen) -> Layer:
    """A layer whose position-wise residuals are each in a `Chunk`; weights and paths stay.

    >>> from layercomb import tl
    >>> in_pieces(tl.Serial(tl.Residual(tl.Dense()), tl.Residual(tl.BatchNorm())), 64)
    Serial(Chunk(Residual(Dense()), 64), Residual(BatchNorm()))
    """
    alone = layer.n_in == layer.n_out == 1 and layer.position_wise is True
    if isinstance(layer, Residual) and alone:
        return Chunk(layer, chunk_len)
    if isinstance(layer, Chunk):
        return layer
    made = tuple(in_pieces(each, chunk_len) for each in layer.sublayers)
    return layer if made == layer.sublayers else layer.with_sublayers(made)
