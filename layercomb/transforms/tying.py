"""`Tied`: a model in which two weights, or the weights of two layers, are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.layer import Arrays, Key
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.reversible.cotangents import vjp
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.shapes import Signature
from layercomb.trees import Tree


class Tied(Wrapper):
    """A model that uses the weights at `source` at `target` too, where it has none of its own.

    A path is that of one weight, or of a layer, all of whose weights are shared. State (running
    statistics, caches) is not shared. For several ties, nest several `Tied`.

    Attributes:
      layer: the model.
      source: the path of the weights that exist, e.g. ``'embedding/table'``, or ``'first'`` for a
        layer.
      target: the path where they are used too, e.g. ``'head/kernel'``, or ``'last'``.
      via: a module-level function from one weight to the other, e.g. ``jnp.transpose``.

    Raises:
      ValueError: if one of the paths is inside the other; at `init`, if shapes do not fit, if two
        layers have other weights, or `via` is given for layers.
      KeyError: at `init`, if one of the paths does not exist.

    References:
      Press & Wolf 2017, https://arxiv.org/abs/1608.05859

    >>> import jax
    >>> from layercomb import tl, transforms, trees, shape_dtype
    >>> net = tl.Serial(tl.Dense(4, name='first'), tl.Relu(), tl.Dense(4, name='last'))
    >>> net = transforms.Tied(net, 'first', 'last')
    >>> list(trees.flatten(net.init(shape_dtype((2, 4)), jax.random.key(0))[0]))
    ['first/bias', 'first/kernel']
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    source: str
    target: str
    via: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        source, target = f'{self.source}/', f'{self.target}/'
        if source.startswith(target) or target.startswith(source):
            raise ValueError(
                f'Tied: {self.source!r} and {self.target!r} are the same, or one is inside the '
                'other: tie two places that lie beside each other'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        return self.init_with_outputs(signature, rng, mode)[1:]

    def init_with_outputs(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        outputs, weights, state = self.layer.init_with_outputs(signature, rng, mode)
        wrong = self.misfit(weights)
        if wrong:
            raise ValueError(f'Tied: {wrong}')
        return outputs, trees.drop(weights, self.target), state

    def misfit(self, whole: Tree) -> str | None:
        """Why the weights at `source` cannot be used at `target`; None if they can.

        Args:
          whole: the weights of the model without the tie, arrays or `jax.ShapeDtypeStruct`.

        Raises:
          KeyError: if one of the paths does not exist.
        """
        target, source = trees.get(whole, self.target), trees.get(whole, self.source)
        if not isinstance(source, dict) and not isinstance(target, dict):
            given = jax.eval_shape(self.via, source) if self.via else source
            if given.shape == target.shape:
                return None
            return (
                f'{self.source!r} gives {tuple(given.shape)} and {self.target!r} is '
                f'{tuple(target.shape)}: choose another via='
            )
        if self.via:
            return (
                f'via= makes one weight of another, and {self.source!r} or {self.target!r} is a '
                'layer of several: leave it out, or tie its weights one by one'
            )
        if not (isinstance(source, dict) and isinstance(target, dict)):
            one, layer = (self.source, self.target)[:: -1 if isinstance(source, dict) else 1]
            return f'{one!r} is one weight and {layer!r} those of a layer: tie what is alike'
        return self._difference(source, target)

    def _difference(self, source: Tree, target: Tree) -> str | None:
        """The first difference between two layers' weights, by path and shape; None if equal."""
        here, there = trees.flatten(source), trees.flatten(target)
        for path in sorted(here.keys() | there.keys()):
            has = [tuple(at[path].shape) if path in at else 'nothing' for at in (here, there)]
            if has[0] != has[1]:
                return (
                    f'{self.source!r} has {has[0]} at {path!r}, and {self.target!r} has {has[1]}: '
                    'tie layers of one structure'
                )
        return None

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        return self.layer.apply(self.untied(weights), state, inputs, rng=rng, mode=mode)

    def untied(self, weights: Tree) -> Tree:
        """The weights of the model without the tie: those at `target` are filled in."""
        value = trees.get(weights, self.source)
        return trees.put(weights, self.target, self.via(value) if self.via else value)

    def tied(self, whole: Tree) -> Tree:
        """The inverse of `untied`: the weights at `target` are left out.

        Args:
          whole: the weights of the model without the tie.
        """
        return trees.drop(whole, self.target)


@one_pass.register(Tied)
def _tied(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule; the weight gets the gradients of both its places."""
    whole, pull = vjp(layer.untied, weights)
    outputs, d_inputs, d_whole = one_pass(layer.layer, whole, state, inputs, cts, **given)
    (d_weights,) = pull(d_whole)
    return outputs, d_inputs, d_weights
