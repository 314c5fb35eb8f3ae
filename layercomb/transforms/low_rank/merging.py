"""A minimal stand-in for low-rank adapters: names, paths and the formula alone."""

from __future__ import annotations

from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.facts.axes import Axes
from layercomb.transforms.low_rank.layer import LowRank
from layercomb.transforms.quantization import bare, narrow_axes
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree


def merge(net: Layer, weights: Tree) -> tuple[Layer, Tree]:
    """The same model with plain layers, the adapters added to their weights."""
    for path, layer in walk(net):
        if isinstance(layer, LowRank):
            part = trees.get(weights, path) if path else weights
            n = part[next(x for x in part if x.endswith('_lora_a'))].ndim
            own = len(
                Axes(
                    bare(layer.layer).weight_axes[next(iter(narrow_axes(bare(layer.layer))))]
                ).first
            )
            turn: Any = layer.merged
            for _ in range(n - own - 1):
                turn = jax.vmap(turn)
            made = turn(part)
            weights = trees.put(trees.drop(weights, path), path, made) if path else made

    def plain(layer: Layer) -> Layer:
        return bare(layer.layer) if isinstance(layer, LowRank) else layer

    return rewrite(net, plain), weights
