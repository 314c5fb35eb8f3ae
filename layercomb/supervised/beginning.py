"""What training begins with: weights and state from a seed or a Model, optimizer and carry."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.errors import require
from layercomb.layers.core.layer import Layer, init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.seek import Seekable
from layercomb.layers.state.parts import Blocks
from layercomb.model import Model
from layercomb.optimizers.tensors import bound
from layercomb.parallel.layout import ALONE, Layout
from layercomb.shapes import Signature
from layercomb.supervised.steps import Carry
from layercomb.supervised.tasks import TrainTask
from layercomb.trees import Tree


def fresh(
    net: Layer, signature: Signature, key: jax.Array, layout: Layout = ALONE
) -> tuple[Tree, Tree]:
    """Makes weights and state in one compiled program, each device its part.

    Args:
      net: the model.
      signature: of its inputs.
      key: a typed key.
      layout: where the weights are.
    """
    return _fresh(net, signature, layout)(key)


@functools.lru_cache(maxsize=16)
def _fresh(net: Layer, signature: Signature, layout: Layout) -> Any:
    def made(key: jax.Array) -> tuple[Tree, Tree]:
        weights, state = net.init(signature, key)
        return layout.constrained(net, weights, (weights, state))

    return jax.jit(made)


def first_state(optimizer: Any, net: Layer, trainable: Tree, layout: Layout) -> Any:
    """An optimizer's first state, made where its parts are.

    Args:
      optimizer: an `optax.GradientTransformation`.
      net: the model.
      trainable: the weights that train.
      layout: where they are.
    """

    def made(trainable: Tree) -> Any:
        return layout.constrained(net, trainable, optimizer.init(trainable))

    with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
        return jax.jit(made)(trainable)


def check_weights(given: Tree, wanted: Tree) -> None:
    """Raises a ValueError at the first weight of a Model that its layer would shape differently.

    Args:
      given: the Model's weights.
      wanted: the weights that its layer makes, arrays or `jax.ShapeDtypeStruct`.
    """
    there, here = trees.flatten(given), trees.flatten(wanted)
    for path in sorted(there.keys() | here.keys()):
        is_, should = (tuple(w[path].shape) if path in w else 'absent' for w in (there, here))
        if is_ != should:
            raise ValueError(
                f"Loop: the Model's weights are not those of its layer ({path} is {is_} and should "
                f'be {should}): init it, or load what was saved of an equal layer'
            )


def trained_state(model: Model, signature: Signature, wanted: Tree) -> Tree:
    """The part of a Model's state that training uses, copied. Caches are left out.

    Args:
      model: its state may be for ``TRAIN``, ``EVAL`` or ``PREDICT``.
      signature: of its inputs.
      wanted: the state in training, as `jax.ShapeDtypeStruct`.

    Returns:
      A state like `wanted`; entries that the Model lacks are as `init` makes them.
    """
    empty = init_state(model.layer, signature, Mode.TRAIN) if jax.tree.leaves(wanted) else wanted
    held = _stacked(model.state)

    def kept(path: str, new: jax.Array) -> jax.Array:
        old = held.get(path)
        return jnp.copy(old) if old is not None and old.shape == new.shape else new

    return trees.map_with_path(kept, empty)


def _stacked(state: Tree) -> dict[str, Any]:
    """A state's arrays by path, without caches.

    Blocks that are separate for decoding are stacked, as in training.
    """
    if isinstance(state, Blocks):
        blocks = [_stacked(state[str(i)]) for i in range(len(state)) if str(i) in state]
        paths = blocks[0] if blocks else ()
        return {path: jnp.stack([block[path] for block in blocks]) for path in paths}
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= {f'{key}/{path}': x for path, x in _stacked(value).items()}
        elif not isinstance(value, Seekable):
            flat |= trees.flatten({key: value})
    return flat


def clipped(task: TrainTask, net: Layer) -> Any:
    """The task's optimizer for a model, after clipping if the task says so.

    Args:
      task: has the optimizer and ``clip_norm``, the largest global norm.
      net: the model, told to optimizers that can be told.

    Returns:
      An `optax.GradientTransformation`.
    """
    optimizer = bound(task.optimizer, net)
    if task.clip_norm is None:
        return optimizer
    optax = require('optax', 'train')
    return optax.chain(optax.clip_by_global_norm(task.clip_norm), optimizer)


def distinct(carry: Carry) -> Carry:
    """The carry without shared arrays: an array in two places is copied, so each can be donated."""
    seen: set[int] = set()

    def once(x: jax.Array) -> jax.Array:
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(once, carry)
