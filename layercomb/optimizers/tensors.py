"""Which axes of a weight are one tensor, and optimizers that treat each tensor by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.errors import require

Axes = tuple[int, ...]


def matrix_axes(path: str, ndim: int) -> tuple[Axes, Axes]:
    """Which axes of a weight are its matrix's rows (inputs), and which its columns (outputs).

    A weight does not say how many axes a layer gave it and how many `Repeat` put before them, so
    this goes by names: (D, H, K) of the kernels of queries, keys and values, (H, K, D) of their
    output's, (positions, modules, in, out) of `LocalConv`'s, (out, in) of what says
    ``kernel_transposed``, (in, out) of all else. The axes before these count other matrices.

    Args:
      path: of the weight.
      ndim: how many axes it has, two at least.

    >>> matrix_axes('attention/query/kernel', 4), matrix_axes('dense/kernel', 3)
    (((1,), (2, 3)), ((1,), (2,)))
    """
    *above, leaf = path.split('/')
    layer = above[-1] if above and leaf == 'kernel' and ndim > 2 else ''
    if leaf == 'kernel_transposed':
        return (ndim - 1,), (ndim - 2,)
    if layer in ('query', 'key', 'value'):
        return (ndim - 3,), (ndim - 2, ndim - 1)
    if layer == 'output':
        return (ndim - 3, ndim - 2), (ndim - 1,)
    if layer.startswith('local_conv'):  # apart, the places of a kernel would take steps too large
        return (ndim - 4, ndim - 3, ndim - 2), (ndim - 1,)
    return (ndim - 2,), (ndim - 1,)


def by_tensor(optimizer: Any) -> Any:
    """An optimizer that treats each vector and each matrix by itself.

    Under `Repeat` a layer's weights are then moved as they were if it stood alone: what is a mean
    over a tensor never mixes layers. Biases and scales are vectors along their last axis, all else
    are matrices along the axes that `matrix_axes` says. So a kernel of a convolution is one matrix
    for each place, and the bias of queries, keys and values is one vector for each head.

    Args:
      optimizer: an `optax.GradientTransformation`, which is mapped over stacks of tensors. It
        sees one of them at a time, and no step of another's; it must not depend on names.

    Returns:
      An `optax.GradientTransformation`, whose state is a tree like the weights, with the state of
      `optimizer` at each leaf, one for each tensor in it.
    """
    optax = require('optax', 'train')

    def init(weights: Any) -> Any:
        return trees.map_with_path(
            lambda path, x: jax.vmap(optimizer.init)(_stack(path, x)), weights
        )

    def update(grads: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        def one(path: str, grad: jax.Array, its_state: Any, *weight: jax.Array) -> _Moved:
            stacks = _stack(path, grad), its_state, *(_stack(path, x) for x in weight)
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


def _stack(path: str, x: jax.Array) -> jax.Array:
    """A weight as a stack of vectors (N, size) or of matrices (N, rows, columns)."""
    if x.ndim < 2 or path.split('/')[-1] in trees.NOT_DECAYED:
        return x.reshape(-1, *x.shape[-1:])
    first, second = sorted(matrix_axes(path, x.ndim))
    rows, columns = (math.prod(x.shape[a] for a in axes) for axes in (first, second))
    return x.reshape(-1, rows, columns)  # a matrix and its transpose are treated alike


def by_unit(decay: float) -> Any:
    """Evens out the steps of the rows of matrices: (…, n, D) of n units.

    With a running mean v ← β v + (1 − β) mean_d u² of each row u of a step::

        u ← u √(mean(v) / (v + mean(v) / 100))

    so that no row's step grows by more than tenfold. Where all rows move, their mean square stays
    about the same; where few do, it falls as their number: what stands still gives nothing away.

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
