"""Metrics of a model over held-out data."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np

from layercomb import losses
from layercomb.checks import ChunkLen
from layercomb.errors import UsageError, UsageWarning
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts import processes
from layercomb.layers.metrics.metric import Metric
from layercomb.parallel.even import evened
from layercomb.parallel.layout import ALONE, Layout
from layercomb.supervised.batches import Batch, check_loss_weights, made, shaped_unlike
from layercomb.supervised.fit import check_arity, check_inputs, no_batch
from layercomb.supervised.tasks import EvalTask, reading
from layercomb.trees import Tree

_MANY = 10_000  # batches after which an evaluation without n_batches warns that it may not end

Sums = tuple[tuple[jax.Array, ...], ...]  # for each metric, its `sums` of a batch


def evaluate(
    net: Layer,
    weights: Tree,
    state: Tree,
    tasks: Sequence[EvalTask] | EvalTask,
    layout: Layout = ALONE,
) -> dict[str, Any]:
    """Measures a model in ``EVAL``, without randomness. The model is not changed.

    Args:
      net: gives logits.
      weights: its weights.
      state: its state; what the batches would make of it is dropped.
      tasks: what to measure, one or several; each goes through its data from the start.
      layout: where the arrays are, if there are several devices.

    Returns:
      'task/metric' -> the metric over all positions of all batches: a number, or lists of lists of
      numbers for a table (`tl.ConfusionMatrix`). Positions of loss weight 0 do not count.

    Raises:
      UsageError: if there is no batch, or one cannot be made; if a token is outside the vocabulary,
        a loss weight is negative, a metric's sum is not finite, its weights are all 0, or a later
        batch's shape does not fit the model.
    """
    measured = {}
    for task in (tasks,) if isinstance(tasks, EvalTask) else tasks:
        metrics = cast(tuple[Metric, ...], task.metrics)  # made one by the task
        step = compiled(reading(task, net), metrics, task.loss_chunk_len, layout)
        sums = _run(task, net, functools.partial(step, weights, state), layout)
        for metric, of_metric in zip(metrics, sums, strict=True):
            name = f'{task.name}/{metric.label}'
            _check_sums(name, of_metric)
            measured[name] = metric.total(of_metric)
    return measured


@functools.lru_cache(maxsize=16)
def compiled(
    net: Layer, metrics: tuple[Metric, ...], chunk_len: ChunkLen | None, layout: Layout = ALONE
) -> Callable[..., Sums]:
    """The jitted evaluation step: (weights, state, batch) → each metric's sums over the batch.

    Args:
      net: gives logits.
      metrics: what to measure. Equal arguments share one function.
      chunk_len: how many positions of logits exist at a time, as of `losses.attach`.
      layout: where the arrays are, if there are several devices.
    """

    def step(scored: Layer, weights: Tree, state: Tree, batch: tuple[Any, ...]) -> Sums:
        outputs, _ = scored.apply(weights, state, batch, mode=Mode.EVAL)
        scores = zip(metrics, outputs[::2], outputs[1::2], strict=True)
        return tuple(metric.sums(values, counts) for metric, values, counts in scores)

    return jax.jit(layout.sums(losses.attach(net, metrics, chunk_len), step))


def _run(
    task: EvalTask, net: Layer, step: Callable[[Any], Sums], layout: Layout
) -> list[list[np.ndarray]]:
    """Sums over batches, in double precision; one batch is computed while another is read."""
    per_batch: list[Any] = []
    first: Batch = ()
    batches = task.batches()
    together = max(metric.together for metric in cast(tuple[Metric, ...], task.metrics))
    for i in itertools.count(1):
        where = f'EvalTask {task.name!r}, batch {i}'
        batch = _next(task, net, batches, where, layout, is_first=not first)
        batch = evened(batch, layout, together, where)
        if batch is None:
            break
        first = first or batch
        with shaped_unlike(first, batch, where):
            per_batch.append(step(layout.rows(batch)))
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
    of_metrics = zip(*jax.device_get(per_batch), strict=True)
    return [list(map(_sum, zip(*of_batches, strict=True))) for of_batches in of_metrics]


def _next(
    task: EvalTask, net: Layer, batches: Iterator[Batch], where: str, layout: Layout, is_first: bool
) -> Batch | None:
    """The next batch, checked; what is wrong with it in one process, all hear."""
    with processes.hearing() if layout.mesh is not None else contextlib.nullcontext():
        with made(where):
            batch = next(batches, None)
        if batch is not None:
            _check_batch(task, net, batch, where, is_first)
    return batch


def _check_batch(task: EvalTask, net: Layer, batch: Batch, where: str, is_first: bool) -> None:
    """Raises unless a batch has the model's inputs, known tokens and no negative loss weight."""
    if is_first:
        check_arity(task, net, batch, f'EvalTask {task.name!r}')
    check_loss_weights(batch, where)
    check_inputs(task, net, batch, where)


def _sum(of_batches: Sequence[Any]) -> np.ndarray:
    """Σ of arrays of one shape, in double precision; of single numbers, rounded once."""
    arrays = [np.asarray(x, np.float64) for x in of_batches]
    numbers = [float(x) for x in arrays if not x.shape]
    if numbers and all(map(math.isfinite, numbers)):  # fsum refuses infinities of both signs
        return np.asarray(math.fsum(numbers))
    with np.errstate(invalid='ignore'):
        return np.sum(arrays, 0)


def _check_sums(name: str, sums: Sequence[np.ndarray]) -> None:
    """Raises a UsageError where sums are not finite, or nothing counted."""
    if not all(np.isfinite(x).all() for x in sums):
        total = sums[0].sum()
        weight = f' and of its weights {sums[1]}' if len(sums) == 2 and not sums[1].shape else ''
        raise UsageError(
            f'{name}: the sum over the data is {total}{weight}: look at the targets and weights of '
            'the data, or train with a lower learning rate'
        )
    if sums[-1].sum() == 0:
        raise UsageError(f'{name}: all loss weights are 0, so there is no mean: check the data')
