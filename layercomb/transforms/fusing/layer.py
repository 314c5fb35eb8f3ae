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
from layercomb.transforms.fusing.program import Program, Unfit, Written
from layercomb.transforms.fusing.rules import knows, write
from layercomb.transforms.quantization.layer import bare
from layercomb.trees import Tree


class Fused(Wrapper):
    """A layer whose decoding steps are one native call on a CPU; `fuse` makes it.

    In ``PREDICT`` all layers inside are carried out by `layercomb_kernels`, for up to 32 rows of
    new positions, with results that differ from `apply` of the layer by rounding alone. Elsewhere,
    and for weights or inputs that the kernels do not take, the layer itself is applied. Such a step
    has no derivative, and is traced for the platform of this process: trace what leaves it in
    `layercomb_kernels.off()`.

    Attributes:
      layer: the layer, of one input and one output.
    """

    carries_counted = True
    position_wise = property(of_sublayers)
    makes_logits = property(lambda self: bare(self.layer).makes_logits)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The outputs and the new state of the layer inside."""
        (x,) = inputs
        if mode is Mode.PREDICT and _is_short(x) and runs_natively(x):
            try:
                return _run(self.layer, weights, state, x)
            except Unfit:
                pass  # the layer's own way is always right
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


def _is_short(x: jax.Array) -> bool:
    return x.ndim == 3 and x.shape[0] * x.shape[1] <= FEW


def _run(layer: Layer, weights: Tree, state: Tree, x: jax.Array) -> tuple[Arrays, Tree]:
    program = Program(x.shape)
    (output,), new_state = write(layer, program, weights, state, (program.input,))
    y, written = program.run(x, output)
    put: Any = jax.tree.map(
        lambda leaf: written[leaf] if isinstance(leaf, Written) else leaf,
        new_state,
        is_leaf=lambda leaf: isinstance(leaf, Written),
    )
    return (y,), put


@functools.lru_cache(maxsize=64)
def fuse(net: Layer) -> Layer:
    """The same model with parts whose decoding steps are one native call on a CPU.

    Parts are as large as they can be: the blocks of a GPT-2 or a Llama, after `unstack`, or the
    feed-forwards where a kind of attention has no native rule. Weights, state and paths stay.

    Args:
      net: any layer.

    >>> from layercomb import tl, transforms
    >>> net = tl.Serial(tl.Embedding(9, 4), tl.Residual(tl.LayerNorm(), tl.Dense(4)))
    >>> transforms.fuse(net)
    Serial(Embedding(9, 4), Fused(Residual(LayerNorm(), Dense(4))))
    """
    if isinstance(net, Fused):
        return net
    if unwrapped(net).sublayers and net.n_in == net.n_out == 1 and knows(net) and _multiplies(net):
        return Fused(net)
    if not net.sublayers:
        return net
    children = tuple(fuse(child) for child in net.sublayers)
    return net if children == net.sublayers else net.with_sublayers(children)


def _multiplies(net: Layer) -> bool:
    """Whether there is a matrix inside: nothing else is worth a call."""
    return any(isinstance(layer, (Dense, GatedDense, SplitHeads)) for _, layer in walk(net))
