"""The jitted step of training: gradient, accumulation, clipping, update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb import losses, trees
from layercomb.checks import ChunkLen
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.metric import Metric
from layercomb.optimizers.rounding import tree_to_bfloat16
from layercomb.parallel.layout import ALONE, Layout
from layercomb.parallel.streams import streamed
from layercomb.supervised.updates import hyperparams, update
from layercomb.trees import Tree

if TYPE_CHECKING:
    from layercomb.supervised.tasks import TrainTask

Batch = tuple[Any, ...]
Metrics = dict[str, jax.Array]

METRICS = ('loss', 'grad_norm', 'learning_rate')  # of a step, in the order of reports


class Carry(NamedTuple):
    """What a step takes, donates and returns.

    Attributes:
      trainable: the weights that train; None in the places of frozen weights.
      state: the model's state.
      opt_state: the optimizer's state.
      step: int32 (), how many steps have been taken.
    """

    trainable: Tree
    state: Tree
    opt_state: Any
    step: jax.Array


@functools.lru_cache(maxsize=16)
def compiled(
    net: Layer,
    loss: Metric,
    optimizer: Any,
    accumulate: int,
    chunk_len: ChunkLen | None,
    accumulate_dtype: str = 'float32',
    layout: Layout = ALONE,
    streams: bool = False,
) -> Callable[..., tuple[Carry, Metrics]]:
    """The jitted training step: (carry, frozen weights, key, batch) → (carry, metrics).

    Equal arguments share one function. The carry is donated. Each step's key is the run's key with
    the step number folded in.

    Args:
      net: gives logits.
      loss: a metric with a gradient.
      optimizer: an `optax.GradientTransformation`.
      accumulate: how many micro batches a batch is cut into; it must divide the batch's rows, or
        the groups of rows that the loss takes together.
      chunk_len: how many positions of logits exist at a time, as of `losses.attach`.
      accumulate_dtype: of the sums of micro batches' gradients: 'float32', or 'bfloat16', to which
        each sum is rounded by chance.
      layout: where the arrays are, if there are several devices.
      streams: whether residual streams are in host memory, as of `parallel.streams`.

    Returns:
      The function. Its metrics are float32 (): 'loss', 'grad_norm', and 'learning_rate' if the
      optimizer's state has one.
    """
    whole, narrow = losses.attach(net, loss, chunk_len), accumulate_dtype == 'bfloat16'
    whole = streamed(whole) if streams else whole
    how = functools.partial(_gradient, loss, accumulate, narrow, layout)
    gradient = layout.gradient(whole, how)
    value_of = _value_of(gradient)

    def step(carry: Carry, frozen: Tree, key: jax.Array, batch: Batch) -> tuple[Carry, Metrics]:
        key = jax.random.fold_in(key, carry.step)
        value, state, grads = gradient(carry.trainable, frozen, carry.state, key, batch)

        def loss_of(trainable: Tree) -> jax.Array:  # only line searches ask for it
            return value_of(trainable, frozen, carry.state, key, batch)

        trainable, opt_state = update(
            optimizer, grads, carry.opt_state, carry.trainable, value, loss_of
        )
        metrics = {'loss': value, 'grad_norm': norm(grads), **learning_rate(opt_state)}
        made = Carry(trainable, state, opt_state, carry.step + 1)
        return layout.constrained(net, carry.trainable, made), metrics

    return jax.jit(step, donate_argnums=0)


def of_task(
    task: TrainTask,
    optimizer: Any,
    net: Layer,
    layout: Layout = ALONE,
    streams: bool = False,
) -> Callable[..., tuple[Carry, Metrics]]:
    """The `compiled` step of a task.

    Args:
      task: says the rest.
      optimizer: the task's, told the model, and after clipping.
      net: what reads the task's inputs.
      layout: where the arrays are.
      streams: as of `compiled`.
    """
    pieces = task.accumulate, task.loss_chunk_len, task.accumulate_dtype
    return compiled(net, task.loss, optimizer, *pieces, layout, streams)


def _value_of(gradient: Callable[..., tuple[jax.Array, Tree, Tree]]) -> Callable[..., jax.Array]:
    """The loss as a function of the trainable weights, whose gradient is the one given."""

    @jax.custom_vjp
    def value_of(*args: Any) -> jax.Array:
        return gradient(*args)[0]

    def forward(*args: Any) -> tuple[jax.Array, Tree]:
        value, _, grads = gradient(*args)
        return value, grads

    def backward(grads: Tree, ct: jax.Array) -> tuple[Any, ...]:
        return jax.tree.map(lambda g: g * ct.astype(g.dtype), grads), None, None, None, None

    value_of.defvjp(forward, backward)
    return value_of


class Scored(NamedTuple):
    """A model with its loss, the loss alone, which makes sums of values of positions, and devices.

    What is computed is this device's summand of a value, where rows are split over several.
    """

    net: Layer
    loss: Metric
    layout: Layout


def _gradient(
    loss: Metric, accumulate: int, narrow: bool, layout: Layout, net: Layer, *args: Any
) -> Any:
    """(loss, state, gradient) of a batch; `net` has its loss attached."""
    scored = Scored(net, loss, layout)
    made = _whole(scored) if accumulate == 1 else _accumulated(scored, accumulate, narrow)
    return made(*args)


def _whole(scored: Scored) -> Callable[..., tuple[jax.Array, Tree, Tree]]:
    """(loss, state, gradient) of a batch at once."""

    both = jax.value_and_grad(functools.partial(mean, scored), has_aux=True)

    def gradient(*args: Any) -> tuple[jax.Array, Tree, Tree]:
        (value, state), grads = both(*args)
        return value, state, grads

    return gradient


def mean(
    scored: Scored, trainable: Tree, frozen: Tree, state: Tree, key: jax.Array, batch: Batch
) -> tuple[jax.Array, Tree]:
    """The loss of a batch, auxiliary losses included, and the new state.

    Args:
      scored: the model with its loss.
      trainable, frozen, state: of the model.
      key: of the step.
      batch: inputs, targets and loss weights.
    """
    total, weight, aux, state = _sums(scored, trainable, frozen, state, key, batch)
    weight = scored.layout.total(weight)
    return total / _positive(weight) + scored.layout.share(aux), state


def _accumulated(
    scored: Scored, n: int, narrow: bool
) -> Callable[..., tuple[jax.Array, Tree, Tree]]:
    """The same from `n` micro batches: sums of losses and weights, divided once.

    An auxiliary loss counts for each micro batch as much as its weights do. Sums that are `narrow`
    are kept in bfloat16, and rounded so that their mean is that of wide ones.
    """
    together = scored.loss.together

    def total(trainable: Tree, frozen: Tree, state: Tree, key: jax.Array, batch: Batch) -> Any:
        total, weight, aux, state = _sums(scored, trainable, frozen, state, key, batch)
        return total + aux * weight, (weight, state)

    def gradient(
        trainable: Tree, frozen: Tree, state: Tree, key: jax.Array, batch: Batch
    ) -> tuple[jax.Array, Tree, Tree]:
        def add(carry: Any, micro: Any) -> Any:
            value, weight, state, grads = carry
            i, rows = micro
            (v, (w, state)), g = jax.value_and_grad(total, has_aux=True)(
                trainable, frozen, state, jax.random.fold_in(key, i), rows
            )
            grads = jax.tree.map(_added, grads, g)
            if narrow:
                rounding = jax.random.fold_in(jax.random.fold_in(key, n), i)  # no micro batch's
                grads = tree_to_bfloat16(grads, rounding)
            return (value + v, weight + w, state, grads), None

        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.bfloat16 if narrow else _at_least_float32(x)),
            trainable,
        )
        micros = (jnp.arange(n, dtype=jnp.int32), tuple(_cut(x, n, together) for x in batch))
        (value, weight, state, grads), _ = jax.lax.scan(add, (zero, zero, state, zeros), micros)
        scale = 1 / _positive(scored.layout.total(weight))
        grads = jax.tree.map(functools.partial(_scaled, scale), grads, trainable)
        return value * scale, state, grads

    return gradient


def _sums(
    scored: Scored, trainable: Tree, frozen: Tree, state: Tree, key: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array, Tree]:
    weights = trees.merge(trainable, frozen)
    (values, loss_weights), state = losses.apply_counted(
        scored.net, weights, state, batch, batch[-1], rng=key
    )
    total, weight = scored.loss.sums(values, loss_weights)
    return total, jax.lax.stop_gradient(weight), losses.total(state), state


def _cut(x: jax.Array, n: int, together: int) -> jax.Array:
    """Gives every n-th row, or group of rows, to one micro batch.

    So each micro batch is spread over the batch's devices.
    """
    check_rows(x.shape[0], n, together)
    if together == 1:
        return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)  # (n, B / n, …)
    x = jnp.moveaxis(x.reshape(-1, n, together, *x.shape[1:]), 1, 0)  # (n, B / n / t, t, …)
    return x.reshape(n, -1, *x.shape[3:])  # (n, B / n, …)


def check_rows(n_rows: int, accumulate: int, together: int) -> None:
    """Raises a ValueError unless the rows of a batch can be cut into micro batches.

    Args:
      n_rows: B.
      accumulate: how many micro batches there are.
      together: how many rows in sequence the loss takes together.
    """
    if n_rows % (accumulate * together):
        groups = '' if together == 1 else f', {together} of which belong together'
        raise ValueError(
            f'accumulate={accumulate} does not divide a batch of {n_rows} rows{groups}: '
            'choose a batch size that it divides'
        )


def _positive(weight: jax.Array) -> jax.Array:
    """The weight, or 1 if it is 0: a batch without weights has loss 0, not 0 / 0."""
    return jnp.where(weight == 0, 1, weight)


def _at_least_float32(x: jax.Array) -> Any:
    return x.dtype if x.dtype.itemsize >= 4 else jnp.float32


def _added(total: jax.Array, grad: jax.Array) -> jax.Array:
    """The sum, in the total's dtype, or in float32 if that is narrower."""
    dtype = _at_least_float32(total)
    return total.astype(dtype) + grad.astype(dtype)


def _scaled(scale: jax.Array, total: jax.Array, weight: jax.Array) -> jax.Array:
    """A total times the scale, in the dtype of the weight that it is the gradient of."""
    dtype = _at_least_float32(total)
    return (total.astype(dtype) * scale.astype(dtype)).astype(weight.dtype)


def norm(grads: Tree) -> jax.Array:
    """√ Σ g², over all gradients.

    Args:
      grads: a tree.
    """
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def learning_rate(opt_state: Any) -> Metrics:
    """The learning rate, where `optax.inject_hyperparams` keeps it.

    Args:
      opt_state: the optimizer's state.

    Returns:
      'learning_rate' -> float32 (), if there is one.
    """
    found = hyperparams(opt_state).items()
    rates = (x for path, x in found if path.endswith('hyperparams/learning_rate') and not x.shape)
    rate = next(rates, None)
    return {} if rate is None else {'learning_rate': rate}
