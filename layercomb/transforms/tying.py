"""`Tied`: a model in which one weight is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.cotangents import vjp
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.positionwise import of_sublayers
from layercomb.layers.core.wrapper import Wrapper
from layercomb.trees import Tree


class Tied(Wrapper):
    """A model in which one weight is another one: there is no weight at `target`.

    Attributes:
      layer: the model.
      source: the path of the weight that is there, e.g. ``'embedding/table'``.
      target: the path of the weight that it also serves as, e.g. ``'head/kernel'``.
      via: a module-level function from the one to the other, e.g. ``jnp.transpose``.

    Raises:
      KeyError: at `init`, if one of the paths does not exist.
      ValueError: at `init`, if the shapes do not fit.

    References:
      Press & Wolf 2017, https://arxiv.org/abs/1608.05859
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    source: str
    target: str
    via: Callable[..., Any] | None = None

    def init(self, signature, rng, mode=Mode.TRAIN):
        return self.init_with_outputs(signature, rng, mode)[1:]

    def init_with_outputs(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        outputs, weights, state = self.layer.init_with_outputs(signature, rng, mode)
        target, source = trees.get(weights, self.target), trees.get(weights, self.source)
        given = jax.eval_shape(self.via, source) if self.via else source
        if given.shape != target.shape:
            raise ValueError(
                f'Tied: {self.source!r} gives {tuple(given.shape)} and {self.target!r} is '
                f'{tuple(target.shape)}: choose another via='
            )
        return outputs, trees.drop(weights, self.target), state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(self.untied(weights), state, inputs, rng=rng, mode=mode)

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """The layer's own; the weight gets the gradients of both its places."""
        whole, pull = vjp(self.untied, weights)
        outputs, d_inputs, d_whole = self.layer.apply_and_grad(
            whole, state, inputs, cts, rng=rng, mode=mode, state_cts=state_cts
        )
        (d_weights,) = pull(d_whole)
        return outputs, d_inputs, d_weights

    def untied(self, weights: Tree) -> Tree:
        """The weights with one at `target` too."""
        value = trees.get(weights, self.source)
        return trees.put(weights, self.target, self.via(value) if self.via else value)
