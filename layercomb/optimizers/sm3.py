"""SM3: of the squared gradients of a matrix, one number for each row and each column."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from layercomb.checks import Fraction, NonNegative, checked
from layercomb.errors import require
from layercomb.layers.core.layer import Layer
from layercomb.optimizers.recipes import injects_by_itself
from layercomb.optimizers.tensors import by_tensor, decayed, for_model, tensors


@injects_by_itself
@checked
def sm3(
    learning_rate: NonNegative | Callable[[Any], Any] = 0.1,
    momentum: Fraction | None = 0.9,
    weight_decay: NonNegative = 0.0,
    *,
    epsilon: NonNegative = 1e-30,
    net: Layer | None = None,
) -> Any:
    """SM3: Adagrad that keeps one number for each row and each column of a matrix.

    With numbers r of rows and c of columns, which begin at 0, a matrix W of gradient G moves as::

        V_ij = min(r_i, c_j) + G_ij²       r_i = max_j V_ij       c_j = max_i V_ij
        U = G / √V       M ← β M + (1 − β) U       W ← W − η (M + λ W)

    V is at least the sum of all G² so far, and never falls: let η warm up, then keep it or lower it
    slowly. For vectors V is that sum. Layers that `Repeat` stacked move as they would alone; layers
    declare in `weight_axes` which axes are one tensor, and a table is a matrix here.

    Without momentum it keeps next to nothing. The momentum takes as much as the weights, 4 bytes a
    parameter, and about one inside `narrow_state`.

    Args:
      learning_rate: η, a number or a schedule.
      momentum: β; None for none.
      weight_decay: λ, decoupled, times the learning rate; it spares biases and scales.
      epsilon: added to V; where V is 0, U is.
      net: the model; None takes the one of the `Loop`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range; when used, for
        weights of two axes or more whose model is not known, or whose layer does not declare them.

    References:
      Anil et al. 2019, https://arxiv.org/abs/1901.11150, algorithm SM3-II
    """
    optax = require('optax', 'train')
    moved = optax.identity() if momentum is None else optax.ema(momentum, debias=False)

    def made(net: Layer | None) -> Any:
        def scaled(learning_rate: Any) -> Any:
            return optax.chain(
                by_tensor(_alone(epsilon), functools.partial(tensors, 'optimizers.sm3', net)),
                moved,
                optax.add_decayed_weights(weight_decay, mask=functools.partial(decayed, net)),
                optax.scale_by_learning_rate(learning_rate),
            )

        return optax.inject_hyperparams(scaled)(learning_rate=learning_rate)

    return for_model('optimizers.sm3', made, net)


def _alone(epsilon: float) -> Any:
    """Optax's SM3 of one tensor, without the momentum that it keeps in any case.

    Its state is the numbers of each axis. A single number is taken for a vector of one.
    """
    optax = require('optax', 'train')
    both = optax.scale_by_sm3(b1=0.0, eps=epsilon)

    def init(weight: Any) -> Any:
        return both.init(jnp.atleast_1d(weight)).mu

    def update(grad: Any, state: Any, weight: Any = None) -> tuple[Any, Any]:
        del weight
        wide = jnp.atleast_1d(grad)
        step, new = both.update(wide, optax.ScaleBySM3State(state, jnp.zeros_like(wide)))
        return step.reshape(grad.shape), new.mu

    return optax.GradientTransformation(init, update)
