"""Checks that a model, its tasks and their data fit together, before anything is computed.

Also finds the likely cause of a loss that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from layercomb import losses
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.reversible.bidirectional import BidirectionalRepeat
from layercomb.model import Model, check_tokens, seeded
from layercomb.parallel.layout import ALONE, Layout
from layercomb.shapes import Signature, signature_of
from layercomb.supervised import steps
from layercomb.supervised.batches import Batch, check_segments, made
from layercomb.supervised.callbacks import check_callbacks
from layercomb.supervised.tasks import (
    EvalTask,
    TrainTask,
    check_count,
    lower_is_better,
    reading,
)
from layercomb.trees import Tree


def check_fit(
    net: Layer,
    weights: Tree,
    state: Tree,
    train_task: TrainTask,
    eval_tasks: Sequence[EvalTask],
    first: Batch,
    layout: Layout = ALONE,
) -> None:
    """Traces a model with its losses on the first batches; nothing is computed.

    Args:
      net: gives logits.
      weights, state: its own, as `jax.ShapeDtypeStruct`.
      train_task: what it trains on.
      eval_tasks: what is measured; the first batch of each is made.
      first: the first batch of the training data.
      layout: where the arrays are, if there are several devices.

    Raises:
      TypeError, ValueError: if model, losses and data do not fit together.
      UsageError: if a token is outside the vocabulary, or an evaluation has no batch.
    """
    n_rows, together = first[0].shape[0], train_task.loss.together
    layout.check_rows(n_rows, 'the batch of step 1', train_task.accumulate * together)
    steps.check_rows(n_rows, train_task.accumulate, together)
    layout.specs(net, weights)  # refuses weights that the mesh does not divide

    def trace(task: Any, metrics: Any, batch: Batch, where: str, mode: Mode) -> None:
        check_inputs(task, net, batch, where)
        scored = losses.attach(reading(task, net), metrics, task.loss_chunk_len)
        layout.check_spans(scored, batch, where)

        def run(weights: Tree, state: Tree, batch: Batch, rng: jax.Array) -> Any:
            given = weights, state, batch, batch[-1]
            return losses.apply_counted(scored, *given, rng=rng, mode=mode)

        key = jax.eval_shape(jax.random.key, 0)
        jax.eval_shape(run, weights, state, on_device(batch), key)

    where = 'the batch of step 1'
    trace(train_task, train_task.loss, first, where, Mode.TRAIN)
    for task in eval_tasks:
        where = f'EvalTask {task.name!r}'
        with made(f'{where}, batch 1'):
            batch = next(task.batches(), None)
        if batch is None:
            raise no_batch(task)
        check_arity(task, net, batch, where)
        trace(task, task.metrics, batch, f'{where}, batch 1', Mode.EVAL)


def check_arity(task: TrainTask | EvalTask, net: Layer, batch: Batch, where: str) -> None:
    """Raises a TypeError unless a batch has the model's inputs, targets and loss weights.

    Args:
      task: whose batch it is; if it is packed, segments follow the inputs.
      net: the model.
      batch: a tuple of ``net.n_in + 2`` arrays, or one more, if it is right.
      where: what messages call the data.
    """
    n = net.n_in + 2 + task.packed
    if len(batch) == n:
        return
    cure = 'check the data'
    if len(batch) == n + 1 and not task.packed:
        cure = f'if it packs documents, say {type(task).__name__}(…, packed=True), or {cure}'
    raise TypeError(
        f'the model takes {net.n_in} inputs, so a {"packed " * task.packed}batch is {n} arrays '
        f'(inputs…, {"segments, " * task.packed}targets, loss_weights), and {where} yields '
        f'{len(batch)}: {cure}'
    )


def check_inputs(task: TrainTask | EvalTask, net: Layer, batch: Batch, where: str) -> None:
    """Raises a UsageError for what compiled code could not refuse: tokens, and segments if packed.

    Args:
      task: whose batch it is.
      net: the model.
      batch: of as many arrays as `check_arity` wants.
      where: what messages call the batch.
    """
    try:
        check_tokens(net, batch[: net.n_in])
    except ValueError as e:
        raise UsageError(f'{where}: {e}') from None
    if task.packed:
        check_segments(batch, where)


def no_batch(task: EvalTask) -> UsageError:
    """The error for an evaluation without data, to be raised."""
    return UsageError(f'EvalTask {task.name!r}: the data holds no batch: check its source')


def on_device(batch: tuple[Any, ...]) -> Signature:
    """The signature of a batch on the device, with dtypes as JAX canonicalizes them."""
    return tuple(
        jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
        for x in signature_of(batch)
    )


def why_not_finite(net: Layer, batch: Batch) -> str:
    """The likely cause of a loss that is not finite, and what to do about it.

    Args:
      net: gives logits.
      batch: the batch with that loss.

    Returns:
      A target outside the logits or a loss weight that is not finite, if the batch has one; else
      general advice.
    """
    return (
        _strange_target(net, batch)
        or _strange_weight(batch)
        or f'lower the learning rate or warm it up, set clip_norm, or look at the batch{_grid(net)}'
    )


def check_arguments(
    model: Any, train_task: Any, eval_tasks: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    """Raises a TypeError or ValueError for arguments of a `Loop` that cannot be right.

    Args:
      model, train_task, eval_tasks: as of `Loop`.
      options: 'seed', 'keep_best', 'callbacks' and the numbers of steps, by the names of `Loop`.
    """
    if not isinstance(model, (Layer, Model)):
        raise TypeError(f'Loop: model={model!r} is no layer: give e.g. tl.Serial(…), or lc.Model')
    if not isinstance(train_task, TrainTask):
        raise TypeError(f'Loop: train_task={train_task!r}: give a TrainTask')
    for task in eval_tasks:
        if not isinstance(task, EvalTask):
            raise TypeError(f'Loop: eval_tasks holds {task!r}: give EvalTasks')
    names = [task.name for task in eval_tasks]
    if len(set(names)) < len(names):
        raise ValueError(f'Loop: two eval_tasks have one name in {names}: give each its own')
    seed = options['seed']
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f'Loop: seed={seed!r}: give an integer')
    seeded('Loop: seed', seed)
    for name in ('log_every', 'eval_every', 'checkpoint_every', 'keep'):
        optional = name in ('eval_every', 'checkpoint_every')
        check_count('Loop', name, options[name], optional)
    check_callbacks('Loop', options['callbacks'])
    if options['keep_best'] is not None:
        lower_is_better(options['keep_best'], eval_tasks)


def _strange_target(net: Layer, batch: Batch) -> str | None:
    """What to do about a target outside the logits, if there is one."""
    targets, weights = batch[-2:]
    targets, weights = np.asarray(targets), np.asarray(weights)
    if targets.ndim > weights.ndim and targets.dtype == np.int32:  # of preferences
        if np.isnan(targets[..., 1].view(np.float32)).any():
            return (
                'the log-likelihoods of the reference are missing; a Loop fills them in, from the '
                'model that it starts from'
            )
        targets = targets[..., 0]
    counted = targets[weights != 0]
    if not np.issubdtype(counted.dtype, np.integer) or counted.size == 0:
        return None
    n_logits = net.output_signature(on_device(batch[: net.n_in]))[0].shape[-1]
    strange = counted[(counted < 0) | (counted >= n_logits)]
    if strange.size == 0:
        return None
    return (
        f'target {strange[0]} is none of the {n_logits} logits; check the tokenizer and vocab_size'
    )


def _grid(net: Layer) -> str:
    """What else may be the cause in a model that `transforms.reversible` made."""
    limits = [x.limit for _, x in walk(net) if isinstance(x, BidirectionalRepeat)]
    if not limits:
        return ''
    return f'; or streams reach ±{min(limits)}: give transforms.reversible a smaller fraction'


def _strange_weight(batch: Batch) -> str | None:
    weights = np.asarray(batch[-1])
    strange = weights[~np.isfinite(weights)]
    return f'a loss weight is {strange[0]}; check the data' if strange.size else None
