"""Recipes for training Transformers with optax, with checked arguments.

Layers declare the axes of their weights in `weight_axes`. From these, weight decay finds the
vectors that it spares, Muon its matrices, and Adafactor the axes of one tensor. A `Loop` passes its
model to the recipes; in your own loop, and inside other optimizers such as `optax.chain`, give
``net=``.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast

import jax

from layercomb.checks import Bound, Count, Fraction, NonNegative, Size, checked
from layercomb.errors import require
from layercomb.layers.core.layer import Layer
from layercomb.optimizers.tensors import (
    by_tensor,
    by_unit,
    chosen_rows,
    decayed,
    for_model,
    matrices,
    tensors,
)
from layercomb.trees import Tree

F = TypeVar('F', bound=Callable[..., Any])


def injects_by_itself(recipe: F) -> F:
    """Refuses arrays, which `optax.inject_hyperparams` around a recipe would hand to it.

    They would become numbers, and what was to change would stand still.
    """

    @functools.wraps(recipe)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, jax.Array) for x in (*args, *kwargs.values())):
            raise TypeError(
                f'{recipe.__name__}: an argument must be a number and no array: what changes is '
                'injected here: leave out inject_hyperparams'
            )
        return recipe(*args, **kwargs)

    return cast(F, wrapper)


@checked
def warmup_cosine(
    learning_rate: NonNegative,
    steps: Size,
    warmup_steps: Count = 0,
    final_fraction: Fraction = 0.1,
) -> Callable[[Any], Any]:
    """A schedule: a linear warm-up, then a cosine decay.

    Args:
      learning_rate: the peak.
      steps: the step at which it ends, warm-up included; constant afterwards.
      warmup_steps: how many steps the warm-up takes, from 0 to the peak; 0 starts at the peak.
      final_fraction: the final learning rate as a fraction of the peak.

    Returns:
      An optax schedule, from a step to a learning rate.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range.
    """
    if warmup_steps >= steps:
        raise ValueError(f'warmup_steps={warmup_steps} must be below steps={steps}')
    optax = require('optax', 'train')
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=learning_rate * final_fraction,
    )


@injects_by_itself
@checked
def adamw(
    learning_rate: NonNegative | Callable[[Any], Any] = 1e-3,
    b1: Fraction = 0.9,
    b2: Fraction = 0.98,
    epsilon: NonNegative = 1e-9,
    weight_decay: NonNegative = 0.0,
    *,
    net: Layer | None = None,
) -> Any:
    """AdamW without decay of biases and scales; reports show its learning rate.

    Args:
      learning_rate: a number, or a schedule such as `warmup_cosine` gives.
      b1: of the mean of gradients.
      b2: of the mean of their squares.
      epsilon: added to the root.
      weight_decay: decoupled, times the learning rate.
      net: the model, whose vectors are not decayed; None takes that of the `Loop`. Without a model,
        names of weights decide, as in `trees.decay_mask`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range.

    References:
      Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
    """
    optax = require('optax', 'train')

    def made(net: Layer | None) -> Any:
        return optax.inject_hyperparams(optax.adamw, static_args=('b1', 'b2', 'eps', 'mask'))(
            learning_rate=learning_rate,
            b1=b1,
            b2=b2,
            eps=epsilon,
            weight_decay=weight_decay,
            mask=functools.partial(decayed, net),
        )

    return for_model('optimizers.adamw', made, net)


@injects_by_itself
@checked
def adafactor(
    learning_rate: NonNegative | Callable[[Any], Any] = 0.01,
    decay_rate: Fraction = 0.8,
    clipping_threshold: Annotated[float, Bound(1)] | None = 1.0,
    momentum: Fraction | None = None,
    weight_decay: NonNegative = 0.0,
    *,
    epsilon: NonNegative = 1e-30,
    min_size: Size = 128,
    relative: bool = True,
    net: Layer | None = None,
) -> Any:
    """Adafactor: keeps only row and column means of a matrix's squared gradient.

    With a mean β R + (1 − β) mean_j G² of each row and C of each column, β = 1 − t^(−decay_rate)
    at step t, and d the clipping threshold, a matrix W of gradient G moves as::

        V = R C / mean(R)       U = G / √V       U ← U / max(1, rms(U) / d)
        W ← W − η (max(10⁻³, rms(W)) U + λ W)

    For vectors and small matrices, V is kept whole. Means never mix layers that `Repeat` stacked:
    each moves as it would alone. Layers declare in `weight_axes` which axes are one tensor; a table
    is a matrix here.

    Args:
      learning_rate: η, a number or a schedule.
      decay_rate: how fast β goes to 1.
      clipping_threshold: d, at least 1; None for no clipping.
      momentum: of the updates, which takes as much memory as the weights; None for none.
      weight_decay: λ, decoupled, times the learning rate; it spares biases and scales.
      epsilon: added to G².
      min_size: a matrix of fewer rows or columns has its V kept whole.
      relative: whether steps are relative to rms(W); if not, that factor is 1.
      net: the model; None takes the one of the `Loop`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range; when used, for
        weights of two axes or more whose model is not known, or whose layer does not declare them.

    References:
      Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235
    """
    optax = require('optax', 'train')
    alone = optax.adafactor(
        None,
        min_dim_size_to_factor=min_size,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=relative,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        eps=epsilon,
    )  # downwards already, so that what follows keeps the sign

    def made(net: Layer | None) -> Any:
        def scaled(learning_rate: Any) -> Any:
            return optax.chain(
                by_tensor(alone, functools.partial(tensors, 'optimizers.adafactor', net)),
                optax.add_decayed_weights(-weight_decay, mask=functools.partial(decayed, net)),
                optax.scale_by_learning_rate(learning_rate, flip_sign=False),
            )

        return optax.inject_hyperparams(scaled)(learning_rate=learning_rate)

    return for_model('optimizers.adafactor', made, net)


@injects_by_itself
@checked
def muon(
    learning_rate: NonNegative | Callable[[Any], Any] = 0.02,
    adam_fraction: NonNegative = 0.25,
    momentum: Fraction = 0.95,
    b1: Fraction = 0.9,
    b2: Fraction = 0.98,
    weight_decay: NonNegative = 0.0,
    *,
    unit_factor: NonNegative = 2.0,
    net: Layer | None = None,
) -> Any:
    """Muon for the matrices inside a model, Nesterov's Adam for tables, head, biases and scales.

    Layers declare in `weight_axes` which weights are matrices. A weight belongs to the head if it
    has an axis V or lies in a layer named ``head``.

    A matrix W moves along the momentum M of its gradient, made orthogonal: W ← W − η U Vᵀ √max(1,
    out / in), where M = U S Vᵀ, to the precision of five Newton–Schulz steps.

    A unit of a `SparseFF` is a row that sees few positions, and some units see many more than
    others; the rows of U Vᵀ differ likewise. As in NorMuon, each such row is divided by the root of
    the running mean of its square, relative to that of all rows, so that all units learn.

    Args:
      learning_rate: η, a number or a schedule.
      adam_fraction: Adam's learning rate as a fraction of η.
      momentum: of M.
      b1, b2: of Adam.
      weight_decay: of the matrices that Muon moves, units excepted, times the learning rate.
      unit_factor: multiplies the steps of units, after the division.
      net: the model; None takes the one of the `Loop`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range; when used, for
        weights of two axes or more whose model is not known, or whose layer does not declare them.

    References:
      Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Li et al. 2025, NorMuon,
      https://arxiv.org/abs/2510.05491
    """
    optax = require('optax', 'train')

    def adam_rate(step: Any) -> Any:
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return adam_fraction * rate

    changing = ('learning_rate', 'adam_learning_rate')
    fixed = set(inspect.signature(optax.contrib.muon).parameters) - set(changing)

    def made(net: Layer | None) -> Any:
        axes_of = functools.partial(tensors, 'optimizers.muon', net)

        def units(weights: Tree) -> Tree:
            return chosen_rows(axes_of(weights), weights)

        whole = optax.inject_hyperparams(optax.contrib.muon, static_args=tuple(fixed))(
            learning_rate=learning_rate,
            beta=momentum,
            weight_decay=weight_decay,
            weight_decay_mask=lambda weights: jax.tree.map(operator.not_, units(weights)),
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=lambda weights: matrices(axes_of(weights), weights),
        )
        evened = optax.chain(by_unit(decay=0.9), optax.scale(unit_factor))
        return optax.chain(whole, optax.masked(evened, units))

    return for_model('optimizers.muon', made, net)
