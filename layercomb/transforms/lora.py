"""A minimal stand-in for low-rank adapters: names, paths and the formula alone."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Rate, Size
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.axes import Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.matrix import SCALES, Narrow
from layercomb.shapes import Signature
from layercomb.transforms.quantization import Quantized, bare, narrow_axes
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree

_LEAVES = (Dense, SplitHeads, MergeHeads, GatedDense)


class LowRank(Wrapper):
    """A leaf and a low-rank adapter of each of its matrices."""

    position_wise = property(of_sublayers)
    makes_logits = property(lambda self: self.layer.makes_logits)

    rank: Size = 8
    alpha: float = 16.0
    dropout: Rate = 0.0
    dora: bool = False
    rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What multiplies the product of both factors."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        weights, state = self.layer.init(signature, rng, mode)
        wide, _ = bare(self.layer).init(signature, rng, mode)
        for i, name in enumerate(narrow_axes(bare(self.layer))):
            split = len(Axes(bare(self.layer).weight_axes[name]).first)
            shape = wide[name].shape
            key = jax.random.fold_in(rng, i)
            a = jax.random.uniform(key, (*shape[:split], self.rank), minval=-1.0, maxval=1.0)
            weights[f'{name}_lora_a'] = a / math.sqrt(math.prod(shape[:split]))
            weights[f'{name}_lora_b'] = jnp.zeros((self.rank, *shape[split:]), jnp.float32)
            if self.dora:
                norms = jnp.sqrt(jnp.square(wide[name]).sum(tuple(range(split))))
                weights[f'{name}_lora_magnitude'] = norms
        return weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        return bare(self.layer).apply(self.merged(weights), state, inputs, rng=rng, mode=mode)

    def merged(self, weights: Tree) -> Tree:
        """The weights of the plain leaf."""
        made = {name: x for name, x in weights.items() if not is_lora(name)}
        for name, letters in narrow_axes(bare(self.layer)).items():
            a, b = weights[f'{name}_lora_a'], weights[f'{name}_lora_b']
            wide, scales = weights[name], made.pop(name + SCALES, None)
            if wide.dtype != jnp.float32:
                bits = next(x.bits for _, x in walk(self.layer) if isinstance(x, Quantized))
                wide = Narrow(wide, scales, letters, bits).wide()
            wide = wide.reshape(*a.shape[:-1], *b.shape[1:])
            wide = wide + self.scale * jnp.tensordot(a, b, 1)
            if self.dora:
                norms = jnp.sqrt(jnp.square(wide).sum(tuple(range(a.ndim - 1))))
                wide = wide * (weights[f'{name}_lora_magnitude'] / norms)
            made[name] = wide
        return made


def is_lora(path: str) -> bool:
    """Whether a path is that of a weight of an adapter."""
    return path.rpartition('/')[2].endswith(('_lora_a', '_lora_b', '_lora_magnitude'))


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
    made: Tree = {}

    def one(path: str, layer: Layer) -> Layer:
        if not isinstance(layer, _LEAVES) or not fnmatch.fnmatch(path, where):
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
