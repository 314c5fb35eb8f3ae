"""Whether a model, its tasks and their data fit together: known before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from layercomb import losses
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.model import check_tokens
from layercomb.shapes import Signature, signature_of
from layercomb.supervised.batches import Batch, made
from layercomb.supervised.tasks import EvalTask, TrainTask
from layercomb.trees import Tree


def check_fit(
    net: Layer,
    weights: Tree,
    state: Tree,
    train_task: TrainTask,
    eval_tasks: Sequence[EvalTask],
    first: Batch,
) -> None:
    """Traces a model with its losses on the first batches; nothing is computed.

    Args:
      net: gives logits.
      weights, state: its own, as `jax.ShapeDtypeStruct`.
      train_task: what it trains on.
      eval_tasks: what is measured; the first batch of each is made.
      first: the first batch of the training data.

    Raises:
      TypeError, ValueError: if model, losses and data do not fit together.
      UsageError: if a token is outside the vocabulary, or an evaluation has no batch.
    """
    n_rows = first[0].shape[0]
    if n_rows % train_task.accumulate:
        raise ValueError(
            f'accumulate={train_task.accumulate} does not divide a batch of {n_rows} rows: '
            'choose a batch size that it divides'
        )

    def trace(metrics: Any, chunk_len: int | None, batch: Batch, where: str, mode: Mode) -> None:
        try:
            check_tokens(net, batch[: net.n_in])
        except ValueError as e:
            raise UsageError(f'{where}: {e}') from None
        scored = losses.attach(net, metrics, chunk_len)

        def run(weights: Tree, state: Tree, batch: Batch, rng: jax.Array) -> Any:
            given = weights, state, batch, batch[-1]
            return losses.apply_counted(scored, *given, rng=rng, mode=mode)

        key = jax.eval_shape(jax.random.key, 0)
        jax.eval_shape(run, weights, state, on_device(batch), key)

    where = 'the batch of step 1'
    trace(train_task.loss, train_task.loss_chunk_len, first, where, Mode.TRAIN)
    for task in eval_tasks:
        where = f'EvalTask {task.name!r}'
        with made(f'{where}, batch 1'):
            batch = next(task.batches(), None)
        if batch is None:
            raise no_batch(task)
        check_arity(net, batch, where)
        trace(task.metrics, task.loss_chunk_len, batch, f'{where}, batch 1', Mode.EVAL)


def check_arity(net: Layer, batch: Batch, where: str) -> None:
    """Raises a TypeError unless a batch has the model's inputs, targets and loss weights."""
    if len(batch) != net.n_in + 2:
        raise TypeError(
            f'the model takes {net.n_in} inputs, so a batch is {net.n_in + 2} arrays (inputs…, '
            f'targets, loss_weights), and {where} yields {len(batch)}: check the data'
        )


def no_batch(task: EvalTask) -> UsageError:
    """What to say of an evaluation without data."""
    return UsageError(f'EvalTask {task.name!r}: the data holds no batch: check its source')


def on_device(batch: tuple[Any, ...]) -> Signature:
    """The signature of a batch once it is an array of JAX's."""
    return tuple(
        jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
        for x in signature_of(batch)
    )
