"""`Metric`: a layer from (outputs, targets, weights) to values and their weights.

Each metric gives two outputs of the targets' shape, a value and a weight, both float32. The result
is the weighted mean of the values (`weighted_mean`), passed through `Metric.finish`. Padding has
weight 0. In classification, outputs are logits (…, V), targets (…) integers, weights (…). In
regression all three have one shape. Shapes are checked and never broadcast: labels (B, 1) with
outputs (B, V) would otherwise make B × B losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import snake_case
from layercomb.shapes import Signature, describe
from layercomb.trees import Tree

Shape = tuple[int, ...]


class Metric(Layer):
    """(outputs, targets, weights) → (values, weights); subclasses write `values`.

    Outputs are the model's. By default targets (…) are a class for each row of logits (…, V);
    override `targets_shape` for another shape. Weights, and the result of `values`, have the
    targets' shape. Override `scores` if there is not one value for each target.
    Declare ``position_wise = True`` if a value depends on one position alone: the metric can then
    be computed on one slice of the sequence at a time.
    Declare ``has_gradient = False`` for a metric
    without a gradient, such as an accuracy: no task trains on it. ``lower_is_better`` says which of
    two results is better; None if neither is.

    A metric that is no mean overrides `sums`, which are added over all batches, and `total`, which
    computes the metric from them. No task trains on it either. See `counts`. One whose `sums` are
    still a sum and what it is divided by, such as a mean over pairs of rows, keeps `total`, and
    trains; ``together`` says how many rows in sequence belong together. See `preference`.

    >>> class Margin(Metric):
    ...     '''How far the largest logit is above the mean.'''
    ...
    ...     position_wise = True
    ...
    ...     def values(self, outputs, targets):
    ...         return outputs.max(-1) - outputs.mean(-1)

    Raises:
      TypeError: when applied, if outputs or weights are complex, or `values` gives no array of real
        numbers.
      ValueError: when applied, if the shapes are not those.
    """

    n_in = 3
    n_out = 2
    float32 = True
    has_gradient: ClassVar[bool] = True
    lower_is_better: ClassVar[bool | None] = None
    together: ClassVar[int] = 1
    takes: ClassVar[str] = 'logits (…, V), targets (…) and weights (…)'
    computes_in: ClassVar[tuple[str, ...]] = ('apply', 'scores', 'values')

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name or snake_case(type(self).__name__)

    def targets_shape(self, outputs_shape: Shape) -> Shape:
        """The shape that targets must have beside outputs of a shape; by default all but V."""
        return outputs_shape[:-1]

    def values(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """A value for each target.

        Args:
          outputs: float32, (…, V) by default.
          targets: (…), of the dtype that the batch has.

        Returns:
          Real numbers or booleans, of the targets' shape.
        """
        raise NotImplementedError

    def scores(
        self, outputs: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Values, and weights of the same shape.

        Args:
          outputs: float32, (…, V) by default.
          targets: (…).
          weights: float32 (…).
        """
        values = self.values(outputs, targets)
        self._check_values(values, targets.shape, 'one number for each target')
        return values, weights

    def finish(self, mean: float) -> float:
        """The metric, computed from the weighted mean of its values."""
        return mean

    def sums(self, values: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        """The sums of one batch, which are added over all batches.

        Args:
          values: float32, from `scores`.
          weights: float32, of the same shape.

        Returns:
          Float32 arrays, of the same shapes for all batches; by default Σ wv and Σ w. The entries
          of the last one add up to 0 only if nothing counted.
        """
        return weighted_sum(values, weights)

    def total(self, sums: Sequence[Any]) -> Any:
        """The metric, computed from its `sums` over all batches.

        Args:
          sums: finite float64 arrays, as many as `sums` returns.

        Returns:
          A number, or lists of lists of numbers for a table.
        """
        total, weight = sums
        return float(self.finish(float(total) / float(weight)))

    @property
    def is_mean(self) -> bool:
        """Whether the metric is Σ / Σ of its two `sums`, which a gradient can lower."""
        return type(self).total is Metric.total

    def check(self, outputs: Any, targets: Any, weights: Any) -> None:
        """Checks three arrays, or their signatures.

        Raises:
          TypeError: if outputs or weights are complex.
          ValueError: if the shapes are not those that the metric takes.
        """
        for name, x in (('outputs', outputs), ('weights', weights)):
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise TypeError(
                    f'{type(self).__name__} takes real {name}, got {describe([x])}: give e.g. '
                    'their absolute values'
                )
        shape, got = tuple(outputs.shape), tuple(targets.shape)
        wanted = tuple(self.targets_shape(shape))
        what = ''
        if not shape and type(self).targets_shape is Metric.targets_shape:
            what = 'the outputs have no axis of classes'
        elif got != wanted:
            what = f'targets must be {wanted} here: {cure_of_targets(targets, shape, wanted)}'
        elif tuple(weights.shape) != wanted:
            cure = _cure_of_weights(tuple(weights.shape), wanted)
            what = f'weights must be {wanted} here: {cure}'
        if what:
            raise ValueError(
                f'{type(self).__name__} takes {self.takes}, got {shape}, {got} and '
                f'{tuple(weights.shape)}; {what}'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights and no state; checks the signatures, as `check` does."""
        self.check(*signature)
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(outputs, targets, weights) → (values, weights), float32, after `check`."""
        outputs, targets, loss_weights = inputs
        self.check(outputs, targets, loss_weights)
        scored: Any = self.scores(
            outputs.astype(jnp.float32), targets, loss_weights.astype(jnp.float32)
        )
        values, loss_weights = scored
        self._check_values(values, loss_weights.shape, 'one number for each weight')
        return _as_float32(values, loss_weights), state

    def _check_values(self, values: Any, wanted: Shape, words: str) -> None:
        owner = type(self).__name__
        if not isinstance(values, (jax.Array, np.ndarray, np.generic)) or not (
            jnp.issubdtype(values.dtype, jnp.bool_)
            or jnp.issubdtype(values.dtype, jnp.integer)
            or jnp.issubdtype(values.dtype, jnp.floating)
        ):
            raise TypeError(
                f'{owner}.values must give an array of real numbers, got {describe([values])}: '
                f'{_cure_of_values(values)}'
            )
        if values.shape != tuple(wanted):
            wider = values.shape[: len(wanted)] == tuple(wanted)
            axes = tuple(range(len(wanted) - len(values.shape), 0))
            cure = (
                f'e.g. values.mean({axes[0] if len(axes) == 1 else axes})'
                if wider
                else (
                    'nothing is broadcast; the same value everywhere is '
                    'jnp.full(targets.shape, …), and a metric with one value for several targets '
                    'writes `scores`, which gives its weight too'
                )
            )
            raise ValueError(
                f'{owner}.values must give {words}, of the shape {tuple(wanted)}, got '
                f'{tuple(values.shape)}: {cure}'
            )


def weighted_mean(values: jax.Array, weights: jax.Array | float) -> jax.Array:
    """Σ wv / Σ w, over the positions whose weight is not 0; 0 if there is none.

    Args:
      values: (…).
      weights: of the same shape, or one number for all.

    Raises:
      ValueError: if values and weights are of two shapes.
    """
    total, weight = weighted_sum(values, weights)
    return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


def weighted_sum(values: jax.Array, weights: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Σ wv and Σ w; a value of weight 0 adds nothing, not even a NaN.

    Args:
      values: (…).
      weights: of the same shape, or one number for all.

    Raises:
      ValueError: if values and weights are of two shapes.
    """
    wanted, got = jnp.shape(values), jnp.shape(weights)
    if not got:
        wide = jnp.result_type(values) == jnp.float64
        weights = jnp.full(wanted, weights, jnp.float64 if wide else jnp.float32)
        values = jnp.asarray(values).astype(weights.dtype)
    elif wanted != got:
        raise ValueError(
            f'values {wanted} and weights {got} must be of one shape: '
            f'{_cure_of_weights(got, wanted)}'
        )
    return jnp.sum(jnp.where(weights == 0, 0, values * weights)), jnp.sum(weights)


def _as_float32(*arrays: Any) -> Arrays:
    return tuple(jnp.asarray(x).astype(jnp.float32) for x in arrays)


def cure_of_targets(targets: Any, outputs: Shape, wanted: Shape) -> str:
    """What to do about targets that should have the shape `wanted`, beside outputs of a shape."""
    got = tuple(targets.shape)
    if got == (*wanted, 1):
        return 'drop the last axis, np.squeeze(targets, -1), which is targets[:, 0] of (B, 1)'
    if (*got, 1) == wanted:
        return 'add the last axis, targets[..., None]'
    if got != outputs or wanted != outputs[:-1]:
        return 'a batch is (inputs…, targets, loss_weights)'
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return 'give the class instead of a one-hot row, targets.argmax(-1)'
    return (
        "targets of the outputs' shape are for regression, e.g. tl.L2Loss(), or for a metric with "
        'its own targets_shape'
    )


def _cure_of_values(values: Any) -> str:
    if hasattr(values, 'dtype'):
        return 'give real ones, e.g. their absolute values'
    if isinstance(values, (bool, int, float)):
        return 'the same value everywhere is jnp.full(targets.shape, …)'
    if isinstance(values, (list, tuple)):
        return 'give jnp.stack(values); the same value everywhere is jnp.full(targets.shape, …)'
    return 'give one for each target; the same value everywhere is jnp.full(targets.shape, …)'


def _cure_of_weights(got: Shape, wanted: Shape) -> str:
    if got == (*wanted, 1):
        return 'drop the last axis, np.squeeze(weights, -1), which is weights[:, 0] of (B, 1)'
    cures = []
    if len(got) < len(wanted) and got and got == wanted[: len(got)]:
        index = ', '.join([':'] * len(got) + ['None'] * (len(wanted) - len(got)))
        cures.append(f'np.broadcast_to(weights[{index}], {wanted}) gives each row one weight')
    try:
        fits = np.broadcast_shapes(got, wanted) == wanted
    except ValueError:
        fits = False
    if fits:
        cures.append(f'np.broadcast_to(weights, {wanted}) repeats them')
    return ', '.join(cures) or 'give one for each target'
