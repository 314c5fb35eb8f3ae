"""A minimal stand-in for low-rank adapters: names, paths and the formula alone."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.facts.axes import Axes
from layercomb.transforms.low_rank.layer import LEAVES, LowRank
from layercomb.transforms.quantization import bare, narrow_axes
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree


def lora(
    net: Layer,
    weights: Tree,
    rank: int = 8,
    alpha: float = 16.0,
    where: Any = '*',
    dropout: float = 0.0,
    *,
    dora: bool = False,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> tuple[Layer, Tree]:
    """Puts adapters around the leaves whose paths fit a pattern."""

    def one(path: str, layer: Layer) -> Layer:
        if not isinstance(layer, LEAVES) or not fnmatch.fnmatch(path, where):
            return layer
        return LowRank(layer, rank, alpha, dropout, dora, rank_stabilized)

    made = rewrite(net, one, paths=True)
    flat = dict(trees.flatten(weights))
    for path, layer in walk(made):
        if isinstance(layer, LowRank):
            for name in narrow_axes(bare(layer.layer)):
                at = joined(path, name)
                spec = Axes(bare(layer.layer).weight_axes[name])
                lead = flat[at].shape[: flat[at].ndim - len(spec.letters)]
                i = flat[at].shape[len(lead) : len(lead) + len(spec.first)]
                o = flat[at].shape[len(lead) + len(i) :]
                key = jax.random.fold_in(jax.random.key(seed), len(flat))
                draw = jax.random.uniform(key, (*lead, *i, rank), minval=-1.0, maxval=1.0)
                flat[f'{at}_lora_a'] = draw / math.sqrt(math.prod(i))
                flat[f'{at}_lora_b'] = jnp.zeros((*lead, rank, *o), jnp.float32)
                if dora:
                    over = tuple(range(len(lead), len(lead) + len(i)))
                    flat[f'{at}_lora_magnitude'] = jnp.sqrt(jnp.square(flat[at]).sum(over))
    return made, trees.unflatten(flat)


def without_lora(net: Layer) -> Layer:
    """The same model without adapters."""
    return rewrite(net, lambda layer: layer.layer if isinstance(layer, LowRank) else layer)
