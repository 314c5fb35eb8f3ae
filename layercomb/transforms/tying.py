"""`Tied`: a model in which one weight is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.reversible.cotangents import vjp
from layercomb.layers.reversible.one_pass import one_pass
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

    def untied(self, weights: Tree) -> Tree:
        """The weights with one at `target` too."""
        value = trees.get(weights, self.source)
        return trees.put(weights, self.target, self.via(value) if self.via else value)


@one_pass.register(Tied)
def _tied(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule; the weight gets the gradients of both its places."""
    whole, pull = vjp(layer.untied, weights)
    outputs, d_inputs, d_whole = one_pass(layer.layer, whole, state, inputs, cts, **given)
    (d_weights,) = pull(d_whole)
    return outputs, d_inputs, d_weights
