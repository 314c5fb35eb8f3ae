"""`merged`: a model whose adapters have become part of its weights, as other programs hold it."""

from __future__ import annotations

from layercomb.layers.core.walk import walk
from layercomb.model import Model
from layercomb.transforms.low_rank.layer import LowRank
from layercomb.transforms.low_rank.merging import merge


def merged(model: Model) -> Model:
    """The model with plain layers; without adapters it is the model itself.

    Args:
      model: with weights. Narrow matrices that have an adapter become wide.
    """
    if not any(isinstance(layer, LowRank) for _, layer in walk(model.layer)):
        return model
    return Model(*merge(model.layer, model.weights or {}), model.state)
