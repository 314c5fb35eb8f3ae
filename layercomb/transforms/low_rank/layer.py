"""A minimal stand-in for low-rank adapters: names, paths and the formula alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from layercomb.checks import Rate, Size
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Key
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.axes import Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.matrix import SCALES, Narrow
from layercomb.shapes import Signature
from layercomb.transforms.quantization import Quantized, bare, narrow_axes
from layercomb.trees import Tree

LEAVES = (Dense, SplitHeads, MergeHeads, GatedDense)


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
