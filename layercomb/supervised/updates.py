"""An optimizer's update, with the extra arguments that optax optimizers may ask for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.errors import require
from layercomb.shapes import is_float
from layercomb.trees import Tree

GIVEN = ('value', 'grad', 'value_fn')  # beside gradients, state and weights


def update(
    optimizer: Any,
    grads: Tree,
    opt_state: Any,
    weights: Tree,
    value: jax.Array,
    value_fn: Callable[[Tree], jax.Array],
) -> tuple[Tree, Any]:
    """Makes one update of an optimizer.

    Args:
      optimizer: an `optax.GradientTransformation`, with extra arguments or without.
      grads: the gradient, a tree like `weights`.
      opt_state: the optimizer's state.
      weights: those that train.
      value: float32 (), the loss: `optax.contrib.reduce_on_plateau` asks for it.
      value_fn: the loss as a function of the weights: line searches ask for it.

    Returns:
      (weights, opt_state), both new.
    """
    optax = require('optax', 'train')
    moves, opt_state = moved(optimizer, grads, opt_state, weights, value, value_fn)
    with jax.numpy_dtype_promotion('standard'):
        return optax.apply_updates(weights, moves), opt_state


def moved(
    optimizer: Any,
    grads: Tree,
    opt_state: Any,
    weights: Tree,
    value: jax.Array,
    value_fn: Callable[[Tree], jax.Array],
) -> tuple[Tree, Any]:
    """As `update`, with what is added to the weights in their place."""
    extra = {'value': value, 'grad': grads, 'value_fn': value_fn}
    taken = {name: extra[name] for name in _taken(optimizer)}
    with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
        made: tuple[Tree, Any] = optimizer.update(grads, opt_state, weights, **taken)
    return made


def _taken(optimizer: Any) -> tuple[str, ...]:
    """Which extra arguments an optimizer's update takes."""
    optax = require('optax', 'train')
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return ()
    parameters = inspect.signature(optimizer.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return tuple(name for name in GIVEN if takes_all or name in parameters)


def traced(optimizer: Any, weights: Tree) -> tuple[Any, Any]:
    """The programs of an optimizer, as jaxprs; nothing is computed.

    Args:
      optimizer: an `optax.GradientTransformation`.
      weights: those that train, as arrays or `jax.ShapeDtypeStruct`.

    Returns:
      (init, update), two closed jaxprs.
    """
    with jax.numpy_dtype_promotion('standard'), jax.disable_jit(False):
        init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(weights)
        loss = jax.ShapeDtypeStruct((), jnp.float32)

        def step(grads: Tree, state: Any, weights: Tree, value: jax.Array) -> Any:
            return update(optimizer, grads, state, weights, value, _no_loss)

        return init, jax.make_jaxpr(step)(weights, state, weights, loss)


def hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """The hyperparameters that `optax.inject_hyperparams` keeps in an optimizer's state.

    Args:
      opt_state: the optimizer's state, a tree.

    Returns:
      Path -> array, for each path with a part ``hyperparams``.
    """
    return {path: x for path, x in _leaves(opt_state) if re.search(r'(^|/)hyperparams/', path)}


def first_numbers(optimizer: Any, weights: Tree) -> dict[str, jax.Array]:
    """The numbers in an optimizer's initial state, hyperparameters included.

    Args:
      optimizer: an `optax.GradientTransformation`.
      weights: those that train, as arrays or `jax.ShapeDtypeStruct`: their values do not matter.

    Returns:
      Path -> array: floats of shape (), and hyperparameters of any shape.
    """

    def made() -> dict[str, jax.Array]:
        state = optimizer.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), weights))
        numbers = {path: x for path, x in _leaves(state) if x.shape == () and is_float(x)}
        return numbers | hyperparams(state)  # jit leaves out the rest

    with jax.numpy_dtype_promotion('standard'):
        return jax.jit(made)()


def with_hyperparams(opt_state: Any, values: dict[str, jax.Array]) -> Any:
    """Replaces the hyperparameters in an optimizer's state.

    Args:
      opt_state: the optimizer's state.
      values: path -> array, for each path that `hyperparams` finds.

    Returns:
      The state, all else as it was.
    """
    found = hyperparams(opt_state)

    def chosen(keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator='/')
        return values[path] if path in found else leaf

    return jax.tree_util.tree_map_with_path(chosen, opt_state)


def _leaves(opt_state: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(keys, simple=True, separator='/'), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    ]


def why_not(optimizer: Any, error: TypeError) -> str:
    """Why an optimizer cannot take a step, and what to do about it.

    Args:
      optimizer: an `optax.GradientTransformation`.
      error: what its step raised.
    """
    cause = str(error).strip().splitlines()[0][:160].rstrip(' .')
    missing = re.search(r'missing \d+ required (?:keyword-only|positional) arguments?: (.*)', cause)
    if missing:
        return (
            f'the optimizer asks for {missing[1]} at each step, and a Loop gives it '
            f'{", ".join(GIVEN)}: choose another, or bind the rest with functools.partial'
        )
    return (
        f'the optimizer cannot take a step ({cause}): its learning rate and other '
        'arguments must be numbers or schedules, not strings or None'
    )


def _no_loss(weights: Tree) -> jax.Array:
    """A loss for tracing, which depends on all weights."""
    return sum((jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(weights)), jnp.float32(0))
