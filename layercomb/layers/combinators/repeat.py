"""`Repeat`: a block n times in series, compiled as one scan."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.core.layer import Arrays, Key, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.layers.state.parts import Blocks, refuse_blocks
from layercomb.shapes import Signature, describe
from layercomb.trees import Tree


class Repeat(Wrapper):
    """A block n times in series, as one `lax.scan` over weights stacked on a leading axis.

    Compile time and program size do not grow with `n`. In ``PREDICT`` it runs block by block, with
    one state subtree for each (``'0'``, ``'1'`` …), because a scan would copy the caches.
    `transforms.unstack` makes the same model with one weight subtree for each block, too.

    Attributes:
      layer: the block; its outputs have the number, shapes and dtypes of its inputs.
      n: how many times.
      shared: one set of weights for all blocks (as in ALBERT, or the Universal Transformer).

    Raises:
      TypeError: if the block's n_in and n_out differ; in `init`, if shapes or dtypes do.

    >>> from layercomb import tl, shape_dtype
    >>> import jax
    >>> weights, _ = tl.Repeat(tl.Dense(4), 3).init((shape_dtype((2, 4)),), jax.random.key(0))
    >>> weights['kernel'].shape
    (3, 4, 4)
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    n: Size = 1
    shared: bool = False

    stacked_axes = property(lambda self: 0 if self.shared else 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer.n_in != self.layer.n_out:
            raise TypeError(
                f'{type(self).__name__}: a block must put back as many values as it takes, this '
                f'one takes {self.layer.n_in} and puts back {self.layer.n_out}'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights (n, …), or one set if shared; state (n, …), or in ``PREDICT`` a `Blocks` of n."""
        return self.init_with_outputs(signature, rng, mode)[1:]

    def init_with_outputs(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        """The signature, which blocks keep, and weights and state as `init` gives them.

        Raises:
          TypeError: if the block changes shapes or dtypes.
        """
        made = []

        def one(key: jax.Array) -> tuple[Tree, Tree]:
            outputs, weights, state = self.layer.init_with_outputs(signature, key, mode)
            made.append(outputs)
            return weights, state

        if self.shared:
            first, rest = jax.random.split(rng)
            weights = self.layer.init_with_outputs(signature, first, mode)[1]
            _, state = jax.vmap(one)(jax.random.split(rest, self.n))
        else:
            weights, state = jax.vmap(one)(jax.random.split(rng, self.n))
        if describe(made[0]) != describe(signature):
            raise TypeError(
                f'{type(self).__name__}: a block must keep shapes and dtypes, this one turns '
                f'({describe(signature)}) into ({describe(made[0])})'
            )
        if mode is Mode.PREDICT and state:
            state = Blocks(
                {str(i): jax.tree.map(lambda x, i=i: x[i], state) for i in range(self.n)}
            )
        return signature, weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Runs the blocks in order; block `i` draws from `rng` folded with `i`."""
        if mode is Mode.PREDICT:
            return self._apply_one_by_one(weights, state, inputs, rng)
        refuse_blocks(type(self).__name__, state, mode)
        state, counted = take_counted(state)  # the same for all blocks

        def step(values: Arrays, xs: Any) -> tuple[Arrays, Tree]:
            its_weights, its_state, i = xs
            its_weights = weights if self.shared else its_weights
            its_state = put_counted(its_state, counted)
            made, new = self.layer.apply(
                its_weights, its_state, values, rng=fold(rng, i), mode=mode
            )
            return made, take_counted(new)[0]

        scanned = None if self.shared else weights
        numbers = jnp.arange(self.n, dtype=jnp.int32)
        return jax.lax.scan(step, tuple(inputs), (scanned, state, numbers))

    def _apply_one_by_one(
        self, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None
    ) -> tuple[Arrays, Tree]:
        new_state, values = copy.copy(state), tuple(inputs)
        for i in range(self.n):
            values, new = self.layer.apply(
                self.block_weights(weights, i),
                state.get(str(i), {}),
                values,
                rng=fold(rng, i),
                mode=Mode.PREDICT,
            )
            if new:
                new_state[str(i)] = new
        return values, new_state

    def block_weights(self, weights: Tree, i: int) -> Tree:
        """The weights of block `i`: slice `i` of the leading axis, or all if shared."""
        return weights if self.shared else jax.tree.map(lambda w: w[i], weights)

    def block_state(self, state: Tree, i: int) -> Tree:
        """The state of block `i`, of a state from training, stacked even if weights are shared."""
        return jax.tree.map(lambda x: x[i], state)
