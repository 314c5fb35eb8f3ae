"""`evaluated`: a model without what matters in training alone, as other libraries describe it."""

from __future__ import annotations

import dataclasses
from typing import Any

from layercomb import layers as tl
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.wrapper import given_name
from layercomb.transforms.casting import Cast
from layercomb.transforms.rewriting import rewrite


def evaluated(net: Layer) -> Layer:
    """The model without dropout, recomputing, reversing, pieces, casts and narrow decoding caches.

    Its weights are the same.

    Args:
      net: any layer.

    >>> evaluated(tl.Serial(tl.Dense(8), tl.Dropout(0.1), tl.Remat(tl.Dense(4))))
    Serial(Dense(8), Dense(4))
    """
    return rewrite(net, _one)


def _one(layer: Any) -> Layer:
    if isinstance(layer, tl.Remat | tl.Chunk | Cast):
        inner: Layer = layer.layer
        return inner if layer.name is None else inner.replace(name=given_name(layer))
    if isinstance(layer, tl.BidirectionalRepeat):
        return layer.plain
    if isinstance(layer, tl.Serial | tl.Residual | tl.ReversibleHalfResidual):
        kept = [each for each in layer.layers if not isinstance(each, tl.Dropout)]
        return layer if len(kept) == len(layer.layers) else layer.replace(layers=tuple(kept))
    if getattr(layer, 'cache_bits', None) is not None:
        layer = layer.replace(cache_bits=None)
    if any(field.name == 'dropout' for field in dataclasses.fields(layer)):
        return layer.replace(dropout=0.0) if layer.dropout else layer
    return layer
