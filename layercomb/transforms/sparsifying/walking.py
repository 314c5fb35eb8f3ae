"""Through a model with all batches, to fit each mixture to the inputs that it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.basic.activations import activation
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.transforms.quantization.calibration.values import Stack, run
from layercomb.transforms.quantization.calibration.walking import Made, Walk
from layercomb.transforms.quantization.layer import bare
from layercomb.transforms.sparsifying.placing import is_pending
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

Rows = list[jax.Array]
Fit = Callable[[MixtureFF, Tree, Rows, str], Tree]


class Fitting(Walk):
    """Gives each mixture that `placed` made the weights that are fitted to its inputs.

    Its inputs come through the mixtures before it.

    Args:
      fit: from a mixture, its dense weights, its inputs (…, D) and its path, to its weights.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        # Inputs of weights that are used several times, by paths and the blocks of stacks around.
        self._given: dict[tuple[str, tuple[int, ...]], Rows] = {}
        self._only_reads = False  # through dense feed-forwards
        self._blocks: tuple[int, ...] = ()

    def through(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        if not is_pending(net, weights):
            return super().through(net, weights, state, path, values)
        mixture: Any = bare(net)
        if self._only_reads:
            self._given.setdefault((path, self._blocks), []).extend(values[0].arrays())
            return net, weights, run(*as_dense(mixture, weights), {}, values)
        read = self._given.get((path, self._blocks)) or values[0].arrays()
        made = self.fit(mixture, weights, read, path)
        return net, made, run(net, made, state, values)

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        return net, weights, run(net, weights, state, values)

    def tied(self, net: Tied, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        _, whole, outputs = self.through(net.layer, net.untied(weights), state, path, values)
        return net, net.tied(whole), outputs

    def several(
        self, net: Repeat | Map, weights: Tree, state: Tree, path: str, values: Stack
    ) -> Made:
        """Blocks one after the other; shared ones are fitted to the dense inputs of all."""
        if self._only_reads:
            return net, weights, self._each(net, weights, state, path, values)[1]
        if not (isinstance(net, Map) or net.shared):
            parts, outputs = self._each(net, weights, state, path, values)
            return net, jax.tree.map(lambda *xs: jnp.stack(xs), *parts), outputs
        is_outermost = not self._given  # else the uses of all are known
        if is_outermost:
            self._only_reads = True
            self._each(net, weights, state, path, values)
            self._only_reads = False
        one, its_state = values[: net.layer.n_in], net.block_state(state, 0)
        _, made, _ = self.through(net.layer, weights, its_state, path, one)
        if is_outermost:
            self._given = {}
        return net, made, run(net, made, state, values)

    def _each(
        self, net: Repeat | Map, weights: Tree, state: Tree, path: str, values: Stack
    ) -> tuple[list[Tree], Stack]:
        """The weights of all blocks, and the outputs."""
        parts: list[Tree] = []
        outputs: Stack = ()
        n_in, around = net.layer.n_in, self._blocks
        for i in range(net.n):
            if not (isinstance(net, Map) or net.shared):
                self._blocks = (*around, i)
            given = values[i * n_in : (i + 1) * n_in] if isinstance(net, Map) else values
            own = net.block_weights(weights, i), net.block_state(state, i)
            _, part, made = self.through(net.layer, *own, path, given)
            parts.append(part)
            outputs, values = outputs + made, values if isinstance(net, Map) else made
        self._blocks = around
        return parts, outputs if isinstance(net, Map) else values

    def unreached(self, net: Layer, weights: Tree, path: str) -> tuple[Layer, Tree]:
        for at, layer in walk(net, path):
            inside = weights
            for key in at.removeprefix(path).strip('/').split('/'):
                inside = inside.get(key, {}) if key else inside
            if is_pending(layer, inside):
                raise ValueError(
                    f'sparsify: the inputs of the feed-forward at {at!r} are not to be seen, for '
                    f'{type(net).__name__} is not entered: {_instead(net, path)}'
                )
        return net, weights


def _instead(net: Layer, path: str) -> str:
    """What can be done where a layer is not entered."""
    if path:
        return f'leave it out by where={f"^(?!{path}/)"!r}'
    return f'make the layer inside sparse, and put {type(net).__name__} around it then'


def as_dense(mixture: MixtureFF, weights: Tree) -> tuple[Layer, Tree]:
    """The dense feed-forward of all units of a mixture, without its router, and its weights."""
    inside, back = weights['in'], weights['out']
    first: Layer = Dense(mixture.d_ff, use_bias=mixture.use_bias)
    own: Tree = {'kernel': jnp.swapaxes(inside['kernel_transposed'], -1, -2)}
    if mixture.use_bias:
        own['bias'] = inside['bias']
    middle: Layer | None = activation(mixture.activation)
    if mixture.gated:
        first, middle = GatedDense(mixture.d_ff, mixture.activation), None
        own = {
            'gate': own['kernel'],
            'up': jnp.swapaxes(weights['up']['kernel_transposed'], -1, -2),
        }
    last = Dense(back['kernel'].shape[-1], use_bias=mixture.use_bias)
    net = Serial(first.replace(name='in'), middle, last.replace(name='out'))
    return net, {'in': own, 'out': back}
