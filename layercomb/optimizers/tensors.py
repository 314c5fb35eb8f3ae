"""Which axes of a weight are one tensor, and optimizers that treat each tensor by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.errors import require
from layercomb.layers.core.layer import Layer
from layercomb.layers.facts.axes import Axes
from layercomb.transforms.weight_axes import axes, declared, holder
from layercomb.trees import Tree

HEAD = 'head'  # the name of the layer that makes logits

AxesOf = Callable[[Tree], dict[str, Axes]]


def for_model(owner: str, make: Callable[[Layer | None], Any], net: Layer | None) -> Any:
    """An optimizer that knows its model, or learns it later through `bind`.

    Args:
      owner: the name of the recipe, for messages.
      make: the optimizer for a model; for None, one that does without as far as it can.
      net: the model; None if it is not known yet.

    Returns:
      An `optax.GradientTransformation`. If `net` is None, its attribute ``bind`` is a function from
      a model to the optimizer for it, of which `bound` makes use.

    Raises:
      TypeError: if `net` is no layer.
    """
    if net is not None:
        if not isinstance(net, Layer):
            raise TypeError(f'{owner}: net must be a layer, got {net!r}: give e.g. net=model.layer')
        return make(net)
    optax = require('optax', 'train')
    made = _bindable()(*optax.with_extra_args_support(make(None)))
    # Cached, so that two Loops of one task share a compiled step.
    made.bind = functools.lru_cache(maxsize=8)(make)
    return made


def bound(optimizer: Any, net: Layer) -> Any:
    """Tells a recipe its model; any other optimizer is returned as it is.

    A recipe inside another optimizer, such as `optax.chain`, is not reached: give it ``net=``.

    Args:
      optimizer: an `optax.GradientTransformation`.
      net: the model.
    """
    bind = getattr(optimizer, 'bind', None)
    return optimizer if bind is None else bind(net)


@functools.cache
def _bindable() -> Any:
    """The class of optimizers that have a function ``bind``, made when optax is needed."""
    base: Any = require('optax', 'train').GradientTransformationExtraArgs
    return type('Bindable', (base,), {})


def tensors(owner: str, net: Layer | None, weights: Tree) -> dict[str, Axes]:
    """The axes of weights, each of which is known to be a vector, a matrix or a table.

    Args:
      owner: the name of the recipe, for messages.
      net: the model; None if it is not known, so that only weights without axes, or with one, are.
      weights: its weights or gradients, or a part of them.

    Raises:
      ValueError: without a model, for a weight of two axes or more.
      TypeError: for such a weight that its layer does not declare: heads' biases, tables and
        kernels all have as many, and a wrong guess would not be seen.
    """
    found = axes(_Unknown() if net is None else net, weights)
    for path, its in found.items():
        if its.is_known:
            continue
        shape = tuple(trees.get(weights, path).shape)
        if net is None:
            raise ValueError(
                f'{owner} has to know the model, or it cannot tell what the axes of {path!r} '
                f'{shape} are: say {owner}(…, net=net). A Loop tells it to an optimizer that is '
                'not inside another one'
            )
        layer, own, _ = holder(net, path)
        raise TypeError(
            f'{owner}: {type(layer).__name__} does not declare the axes of its weight {own!r}, '
            f'{shape}: add a line such as weight_axes = {{{own!r}: {"D->F"!r}}} to the class, as '
            'layers.facts.axes explains'
        )
    return found


class _Unknown(Layer):
    """Stands for a model that is not known: it declares nothing."""


def decayed(net: Layer | None, weights: Tree) -> Tree:
    """A tree of bools: True at the weights that decay shrinks, matrices and tables.

    For weights that no layer declares, names decide, as in `trees.decay_mask`.

    Args:
      net: the model; None if it is not known.
      weights: its weights.
    """
    by_name = trees.decay_mask(weights)
    if net is None:
        return by_name

    def one(path: str, leaf: Any, named: bool) -> bool:
        spec = declared(net, path, leaf)
        return named if spec is None else not Axes(spec).is_vector

    return trees.map_with_path(one, weights, by_name)


def matrices(found: dict[str, Axes], weights: Tree) -> Tree:
    """The axes that each matrix sums over and gives, in the form that optax's Muon takes.

    Returns:
      A tree of `optax.contrib.MuonDimensionNumbers`, None where Adam is to do the work: at vectors,
      tables, and heads, which have an axis V or lie in a layer named ``head``.
    """
    optax = require('optax', 'train')

    def one(path: str, _: Any) -> Any:
        its = found[path]
        if not its.is_matrix or 'V' in its.letters or HEAD in path.split('/')[:-1]:
            return None
        return optax.contrib.MuonDimensionNumbers(its.summed, its.given)

    return trees.map_with_path(one, weights)


def chosen_rows(found: dict[str, Axes], weights: Tree) -> Tree:
    """A tree of bools: True at weights whose rows are units, of which a position chooses few.

    Experts are left out: all units of one are chosen alike, and each expert is a matrix.
    """

    def one(path: str, _: Any) -> bool:
        its = found[path]
        return its.has_chosen_rows and len(its.separate) == its.stacked

    return trees.map_with_path(one, weights)


def by_tensor(optimizer: Any, axes_of: AxesOf) -> Any:
    """An optimizer that treats each vector and each matrix by itself.

    Under `Repeat`, each layer's weights move as they would alone: means over a tensor never mix
    layers. A convolution's kernel is one matrix for each place in the window, and the bias of
    queries, keys and values is one vector for each head.

    Args:
      optimizer: an `optax.GradientTransformation`, which is mapped over stacks of tensors. It
        sees one of them at a time, and no step of another's; it must not depend on names.
      axes_of: what the axes of weights are, by path.

    Returns:
      An `optax.GradientTransformation`, whose state is a tree like the weights, with the state of
      `optimizer` at each leaf, one for each tensor in it.
    """
    optax = require('optax', 'train')

    def init(weights: Any) -> Any:
        found = axes_of(weights)
        return trees.map_with_path(
            lambda path, x: jax.vmap(optimizer.init)(_stack(found[path], x)), weights
        )

    def update(grads: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        found = axes_of(grads)

        def one(path: str, grad: jax.Array, its_state: Any, *weight: jax.Array) -> _Moved:
            its = found[path]
            stacks = _stack(its, grad), its_state, *(_stack(its, x) for x in weight)
            step, its_state = jax.vmap(optimizer.update)(*stacks)
            return _Moved(step.reshape(grad.shape), its_state)

        given = () if weights is None else (weights,)
        moved = trees.map_with_path(one, grads, state, *given)
        return jax.tree.map(lambda x: x.step, moved), jax.tree.map(lambda x: x.state, moved)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class _Moved:
    """What one leaf's update gives, a leaf itself."""

    step: jax.Array
    state: Any


def _stack(its: Axes, x: jax.Array) -> jax.Array:
    """A weight as a stack of numbers (N,), vectors (N, size) or matrices (N, rows, columns)."""
    sides = [math.prod(x.shape[a] for a in side) for side in (its.first, its.second) if side]
    return x.reshape(-1, *sides)  # a matrix and its transpose are treated alike


def by_unit(decay: float) -> Any:
    """Evens out the steps of the rows of matrices: (…, n, D) of n units.

    With a running mean v ← β v + (1 − β) mean_d u² of each row u of a step::

        u ← u √(mean(v) / (v + mean(v) / 100))

    so that no row's step grows by more than a factor of ten. If all rows move, the mean square of
    the steps stays about the same. If few rows move, it falls with their number.

    Args:
      decay: β.

    Returns:
      An `optax.GradientTransformation`, whose state is the tree of v, (…, n).
    """
    optax = require('optax', 'train')

    def init(weights: Any) -> Any:
        return jax.tree.map(lambda w: jnp.zeros(w.shape[:-1], w.dtype), weights)

    def update(steps: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        del weights
        state = jax.tree.map(
            lambda v, u: decay * v + (1 - decay) * jnp.square(u).mean(-1), state, steps
        )
        return jax.tree.map(_evened, steps, state), state

    return optax.GradientTransformation(init, update)


def _evened(step: jax.Array, v: jax.Array) -> jax.Array:
    mean = v.mean(-1, keepdims=True)
    moved = mean > 0
    factor = jnp.sqrt(jnp.where(moved, mean, 1) / jnp.where(moved, v + mean / 100, 1))
    return step * factor[..., None]
