"""Metrics of a model over held-out data."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax

from layercomb import losses
from layercomb.errors import UsageError, UsageWarning
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.metrics.classification import Metric, weighted_sum
from layercomb.model import check_tokens
from layercomb.supervised.batches import Batch, check_loss_weights, made, shaped_unlike
from layercomb.supervised.fit import check_arity, no_batch
from layercomb.supervised.tasks import EvalTask
from layercomb.trees import Tree

_MANY = 10_000  # batches after which an evaluation without an end in sight says so

Sums = tuple[tuple[jax.Array, jax.Array], ...]  # Σ wv and Σ w, for each metric


def evaluate(
    net: Layer, weights: Tree, state: Tree, tasks: Sequence[EvalTask] | EvalTask
) -> dict[str, float]:
    """Measures a model, which is left as it is: nothing is random and no state is kept.

    Args:
      net: gives logits.
      weights: its weights.
      state: its state.
      tasks: what to measure, one or several; each goes through its data from the start.

    Returns:
      'task/metric' -> the metric of the weighted mean over all positions of all batches; what has
      loss weight 0 counts nowhere.

    Raises:
      UsageError: if there is no batch, or one cannot be made; if a token is outside the vocabulary,
        a loss weight is negative, a metric's sum is not finite, its weights are all 0, or a later
        batch's shape does not fit the model.
    """
    measured = {}
    for task in (tasks,) if isinstance(tasks, EvalTask) else tasks:
        metrics = cast(tuple[Metric, ...], task.metrics)  # made one by the task
        step = compiled(net, metrics, task.loss_chunk_len)
        sums = _run(task, net, functools.partial(step, weights, state))
        for metric, (total, weight) in zip(metrics, sums, strict=True):
            name = f'{task.name}/{metric.label}'
            measured[name] = float(metric.finish(_mean(name, total, weight)))
    return measured


@functools.lru_cache(maxsize=16)
def compiled(net: Layer, metrics: tuple[Metric, ...], chunk_len: int | None) -> Callable[..., Sums]:
    """A jitted function of (weights, state, batch), one for equal arguments."""
    scored = losses.attach(net, metrics, chunk_len)

    def step(weights: Tree, state: Tree, batch: tuple[Any, ...]) -> Sums:
        outputs, _ = scored.apply(weights, state, batch, mode=Mode.EVAL)
        return tuple(weighted_sum(v, w) for v, w in zip(outputs[::2], outputs[1::2], strict=True))

    return jax.jit(step)


def _run(task: EvalTask, net: Layer, step: Callable[[Any], Sums]) -> list[tuple[float, float]]:
    """Sums over batches, in double precision, one batch always being computed meanwhile."""
    per_batch: list[Any] = []
    first: Batch = ()
    batches = task.batches()
    for i in itertools.count(1):
        where = f'EvalTask {task.name!r}, batch {i}'
        with made(where):
            batch = next(batches, None)
        if batch is None:
            break
        if not first:
            check_arity(net, batch, f'EvalTask {task.name!r}')
        check_loss_weights(batch, where)
        try:
            check_tokens(net, batch[: net.n_in])
        except ValueError as e:
            raise UsageError(f'{where}: {e}') from None
        first = first or batch
        with shaped_unlike(first, batch, where):
            per_batch.append(step(batch))
        if i == _MANY and task.n_batches is None:
            warnings.warn(
                f'EvalTask {task.name!r}: {i:,} batches so far, and no end: if the data never '
                'ends, give n_batches',
                UsageWarning,
                stacklevel=2,
            )
        if len(per_batch) > 1:
            per_batch[-2] = jax.device_get(per_batch[-2])
    if not per_batch:
        raise no_batch(task)
    columns = zip(*jax.device_get(per_batch), strict=True)
    return [(_sum([t for t, _ in column]), _sum([w for _, w in column])) for column in columns]


def _sum(values: Sequence[Any]) -> float:
    numbers = [float(x) for x in values]  # fsum refuses infinities of both signs
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _mean(name: str, total: float, weight: float) -> float:
    """A weighted mean, or a UsageError where there is none."""
    if not (math.isfinite(total) and math.isfinite(weight)):
        raise UsageError(
            f'{name}: the sum over the data is {total} and of its weights {weight}: look at the '
            'targets and weights of the data, or train with a lower learning rate'
        )
    if weight == 0:
        raise UsageError(f'{name}: all loss weights are 0, so there is no mean: check the data')
    return total / weight
