"""`fuse`: layers of a decoding step in one native call, for a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax

from layercomb.layers.attention.projections import SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper, unwrapped
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.native import FEW, runs_natively
from layercomb.layers.reversible.stack import ReversibleStack
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.transforms.fusing.program import Unfit, Written
from layercomb.transforms.fusing.rules import knows, write
from layercomb.transforms.fusing.sparse_program import SparseProgram
from layercomb.transforms.quantization.layer import bare
from layercomb.trees import Tree

_WITH_MATRICES = (
    *(Dense, GatedDense, SplitHeads, SparseFF, MixtureFF),
    *(MultiplicativeDense, MultiplicativeHead),
)


class Fused(Wrapper):
    """A layer whose decoding steps are one native call on a CPU; `fuse` makes it.

    In ``PREDICT`` all layers inside are carried out by `layercomb_kernels`, for up to 32 rows of
    new positions, with results that differ from `apply` of the layer by rounding alone. Elsewhere,
    and for weights or inputs that the kernels do not take, the layer itself is applied. Such a step
    has no derivative, and is traced for the platform of this process: trace what leaves it in
    `layercomb_kernels.off()`.

    Attributes:
      layer: the layer; its inputs in ``PREDICT`` are (B, T, D).
    """

    carries_counted = True
    position_wise = property(of_sublayers)
    makes_logits = property(lambda self: bare(self.layer).makes_logits)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The outputs and the new state of the layer inside."""
        inputs = tuple(inputs)
        if mode is Mode.PREDICT and all(map(_is_short, inputs)) and runs_natively(*inputs):
            try:
                return _run(self.layer, weights, state, inputs)
            except Unfit:
                pass  # the layer's own way is always right
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


def _is_short(x: jax.Array) -> bool:
    return x.ndim == 3 and x.shape[0] * x.shape[1] <= FEW


def _run(layer: Layer, weights: Tree, state: Tree, inputs: Arrays) -> tuple[Arrays, Tree]:
    program = SparseProgram(*(x.shape for x in inputs))
    values, new_state = write(layer, program, weights, state, program.inputs)
    outputs, written = program.run(inputs, values)
    put: Any = jax.tree.map(
        lambda leaf: written[leaf] if isinstance(leaf, Written) else leaf,
        new_state,
        is_leaf=lambda leaf: isinstance(leaf, Written),
    )
    return outputs, put


@functools.lru_cache(maxsize=64)
def fuse(net: Layer) -> Layer:
    """The same model with parts whose decoding steps are one native call on a CPU.

    Parts are as large as they can be: the blocks of a GPT-2, a Llama or a Terraformer, after
    `unstack`, or the feed-forwards where a kind of attention has no native rule. Weights, state
    and paths stay.

    Args:
      net: any layer.

    >>> from layercomb import tl, transforms
    >>> net = tl.Serial(tl.Embedding(9, 4), tl.Residual(tl.LayerNorm(), tl.Dense(4)))
    >>> transforms.fuse(net)
    Serial(Embedding(9, 4), Fused(Residual(LayerNorm(), Dense(4))))
    """
    if isinstance(net, Fused):
        return net
    if unwrapped(net).sublayers and knows(net) and _multiplies(net):
        return Fused(net)
    return _fuse_inside(net)


def _fuse_inside(net: Layer) -> Layer:
    """The same layer with parts inside fused; layers of a reversible one stay reversible."""
    if not net.sublayers:
        return net
    keeps = isinstance(net, ReversibleStack)
    children = tuple(_fuse_inside(each) if keeps else fuse(each) for each in net.sublayers)
    return net if children == net.sublayers else net.with_sublayers(children)


def _multiplies(net: Layer) -> bool:
    """Whether there is a matrix inside: nothing else is worth a call."""
    return any(isinstance(layer, _WITH_MATRICES) for _, layer in walk(net))
