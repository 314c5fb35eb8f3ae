"""The loop: steps, and now and then a report, an evaluation, a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError, of_the_machine, require
from layercomb.layers.core.layer import Layer
from layercomb.model import Model, check_tokens, seeded
from layercomb.optimizers.tensors import bound
from layercomb.supervised import steps
from layercomb.supervised.batches import Batch, Batches, check_loss_weights, shaped_unlike
from layercomb.supervised.beginning import check_weights, fresh, trained_state
from layercomb.supervised.evaluation import evaluate
from layercomb.supervised.fingerprint import Fingerprint, check_allowed, fingerprint
from layercomb.supervised.fit import check_arity, check_fit, on_device
from layercomb.supervised.progress import Progress, Throughput
from layercomb.supervised.reports import MetricsLog, Row, read_metrics, write_report
from layercomb.supervised.resuming import Resumed, resume
from layercomb.supervised.tasks import EvalTask, TrainTask, check_count
from layercomb.trees import Tree

if TYPE_CHECKING:
    from layercomb.supervised.checkpoints import Checkpoints


class Loop:
    """Trains a model, and picks up where an earlier run in the same directory stopped.

    With an `output_dir` that holds checkpoints, the last one is restored at construction: weights,
    state, optimizer, random key and the data's position. What follows is bitwise what a run that
    was never stopped would have done, on the same machine. Without one, nothing is written. A
    checkpoint says what the run was made of, and a run made of something else is refused.

    A step is one compiled function that donates its carry, so arrays taken from `weights`, `state`
    or `opt_state` are valid until the next `run`. The loss of a step is looked at while the next
    one runs; nothing is saved, and nothing reported, before it was seen to be finite.

    Args:
      model: a layer that gives logits, whose weights are then made from `seed`; or an `lc.Model`,
        whose weights are where training starts. They are copied as far as they train, and the
        Model keeps its own.
      train_task: data, loss and optimizer.
      eval_tasks: what to measure, each under a name of its own.
      output_dir: the run's directory: `checkpoints/`, `metrics.jsonl`, TensorBoard events and
        `report.png`.
      seed: of the weights and of all that is random in training.
      eval_every: steps between evaluations; None for one at the end.
      checkpoint_every: steps between checkpoints; None for one at the end.
      log_every: steps between rows of metrics. Evaluations and the last step have a row too. Loss,
        gradient norm and learning rate of a row are those of its step alone, no means since the row
        before; tokens a second (positions of loss weight not 0) are over all steps since then.
      keep: how many checkpoints to keep.
      progress: where to show progress, by default standard error; False for nowhere.
      allow_changes: what may differ from the run so far: names out of `fingerprint.PARTS`, or
        'all'. `resuming.resume` says what then happens. How a run is computed and shown may always
        differ: `accumulate`, `loss_chunk_len`, the evaluations, and the arguments above but `seed`.

    Attributes:
      step: how many steps have been taken.

    Raises:
      TypeError, ValueError: for an argument that cannot be right, or a model that does not fit
        the data.
      UsageError: if the directory cannot be written to, or holds a damaged checkpoint or another
        run, naming what differs.
    """

    def __init__(
        self,
        model: Layer | Model,
        train_task: TrainTask,
        eval_tasks: Sequence[EvalTask] | EvalTask = (),
        output_dir: str | Path | None = None,
        *,
        seed: int = 0,
        eval_every: int | None = 500,
        checkpoint_every: int | None = 500,
        log_every: int = 10,
        keep: int = 3,
        progress: TextIO | bool | None = None,
        allow_changes: str | Sequence[str] = (),
    ) -> None:
        self._eval_tasks = tuple(eval_tasks) if isinstance(eval_tasks, Iterable) else (eval_tasks,)
        every = {'log_every': log_every, 'eval_every': eval_every}
        every |= {'checkpoint_every': checkpoint_every, 'keep': keep}
        check_arguments(model, train_task, self._eval_tasks, seed, every)
        self._net = model.layer if isinstance(model, Model) else model
        self._task, self._seed, self._progress = train_task, seed, progress
        self._every = (log_every, eval_every, checkpoint_every)
        self._allowed = check_allowed(allow_changes)
        self._optimizer = _optimizer(train_task, self._net)
        self._compiled = steps.compiled(
            self._net, train_task.loss, self._optimizer,
            train_task.accumulate, train_task.loss_chunk_len,
        )  # fmt: skip
        self._directory = None if output_dir is None else paths.local(output_dir, 'output_dir')
        self._checkpoints: Checkpoints | None = None
        if self._directory is not None:
            from layercomb.supervised.checkpoints import Checkpoints

            self._checkpoints = Checkpoints(self._directory / 'checkpoints', keep)
        self._batches = Batches(train_task.data)
        self._made_of: Fingerprint = {}
        self.step = 0
        self._begin(model)

    @property
    def weights(self) -> Tree:
        """The model's weights, valid until the next `run`."""
        return trees.merge(self._carry.trainable, self._frozen)

    @property
    def state(self) -> Tree:
        """The model's state, valid until the next `run`."""
        return self._carry.state

    @property
    def opt_state(self) -> Any:
        """The optimizer's state, valid until the next `run`."""
        return self._carry.opt_state

    def run(self, n_steps: int) -> Row:
        """Trains until `n_steps` steps have been taken, those of earlier runs included.

        Args:
          n_steps: where to stop. If so many have been taken already, nothing is done.

        Returns:
          The metrics of the last step: 'step', 'train/loss', …, 'valid/loss', …

        Raises:
          UsageError: if a loss is not finite, a token is outside the vocabulary, a loss weight is
            negative, a later batch cannot be made or its shape does not fit the model, the data
            ends, or the disk is full.
        """
        check_count('Loop.run', 'n_steps', n_steps)
        self._settle()
        if self.step >= n_steps:
            rows = [] if self._directory is None else read_metrics(self._directory)
            return next((r for r in rows if r['step'] == self.step), {'step': self.step})
        with of_the_machine('put that right, and run again to go on from the last checkpoint'):
            run = _Run(self, n_steps)
            try:
                while self.step < n_steps:
                    run.advance()
            finally:
                run.close()
            if self._directory is not None:
                write_report(self._directory)
        return run.row

    def _settle(self) -> None:
        """Finishes what an interrupt left undone beside a step that was taken."""
        taken = self._carry.step
        if taken.is_deleted():
            then = '; it goes on from the last checkpoint' if self._checkpoints else ''
            raise UsageError(
                f'the last run was interrupted inside a step, and its weights are gone: make the '
                f'Loop anew{then}'
            )
        if int(taken) > self.step:
            self._batches.take()
            self.step += 1

    def _begin(self, model: Layer | Model) -> None:
        """Sets the carry: from the last checkpoint, from the Model given, or from the seed."""
        if self._checkpoints is not None:
            self._batches.position()  # which must be what a checkpoint can hold
        self._first = self._batches.peek()
        check_arity(self._net, self._first, 'the data')
        signature = on_device(self._first[: self._net.n_in])
        init_key, self._key = jax.random.split(jax.random.key(self._seed))
        weights, state = jax.eval_shape(lambda key: self._net.init(signature, key), init_key)
        given = model.weights if isinstance(model, Model) else None
        if given is not None:
            check_weights(given, weights)
            weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        check_fit(self._net, weights, state, self._task, self._eval_tasks, self._first)
        resumed = self._resume(weights, state, given)
        if resumed is not None:
            self.step, weights, state = resumed.step, resumed.weights, resumed.state
            self._key = self._key if resumed.key is None else resumed.key
        elif isinstance(model, Model) and given is not None:
            weights, state = given, trained_state(model, signature, state)
        else:
            weights, state = fresh(self._net, signature, init_key)
        trainable, self._frozen = self._task.partition(weights)
        if weights is given:
            trainable = jax.tree.map(jnp.copy, trainable)  # donating would take the Model's own
        opt_state = None if resumed is None else resumed.opt_state
        if opt_state is None:
            with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
                opt_state = jax.jit(self._optimizer.init)(trainable)
        step = jnp.int32(self.step)
        self._carry = _distinct(steps.Carry(trainable, state, opt_state, step))

    def _resume(self, weights: Tree, state: Tree, given: Tree | None) -> Resumed | None:
        """What the last checkpoint holds, if there is one; weights and state are abstract."""
        if self._checkpoints is None:
            return None
        trainable, _ = self._task.partition(weights)
        with jax.numpy_dtype_promotion('standard'):
            opt_state = jax.eval_shape(self._optimizer.init, trainable)
        self._made_of = fingerprint(
            self._net, self._task, self._optimizer, trainable, given, self._first, self._seed
        )
        abstract = {'weights': weights, 'state': state, 'opt_state': opt_state}
        return resume(
            self._checkpoints, self._made_of, self._allowed,
            abstract, self._optimizer, trainable, self._batches,
        )  # fmt: skip

    def _save(self) -> None:
        """Starts to write a checkpoint of this step."""
        if self._checkpoints is None:
            return
        saved = {'weights': self.weights, 'state': self.state, 'opt_state': self.opt_state}
        record = {
            'made_of': self._made_of,
            'data': self._batches.position(),
            'key': np.asarray(jax.random.key_data(self._key)).tolist(),
            'key_impl': str(jax.random.key_impl(self._key)),
        }
        self._checkpoints.save(self.step, saved, record)

    def _advance(self) -> tuple[steps.Metrics, Batch]:
        """Sets off a step; its metrics are arrays still being computed."""
        batch, where = self._batches.peek(), f'the batch of step {self.step + 1}'
        check_loss_weights(batch, where)
        try:
            check_tokens(self._net, batch[: self._net.n_in])
        except ValueError as e:
            raise UsageError(f'{where}: {e}') from None
        with shaped_unlike(self._first, batch, where):
            self._carry, metrics = self._compiled(self._carry, self._frozen, self._key, batch)
        self._batches.take()
        self.step += 1
        return metrics, batch

    def _not_finite(self, step: int, what: str, value: float, batch: Batch) -> UsageError:
        """What to say when training has come to an end."""
        last = 'no checkpoint yet'
        if self._checkpoints is not None:
            self._checkpoints.wait()
            good = self._checkpoints.latest()
            if good is not None:
                last = (
                    f'last good checkpoint: step {good}, {self._checkpoints.directory / str(good)}'
                )
        cure = (
            _strange_target(self._net, batch)
            or _strange_weight(batch)
            or ('lower the learning rate or warm it up, set clip_norm, or look at the batch')
        )
        return UsageError(f'step {step}: {what} is {value} ({last}): {cure}')


class _Run:
    """One call of `Loop.run`: what has to happen beside the steps, one step behind them."""

    def __init__(self, loop: Loop, n_steps: int) -> None:
        self._loop, self._n_steps = loop, n_steps
        self._log_every, self._eval_every, self._checkpoint_every = loop._every
        directory = loop._directory
        self._log = None if directory is None else MetricsLog(directory, loop.step)
        self._progress = Progress(loop.step, n_steps, loop._progress)
        self._throughput = Throughput()
        self._pending: tuple[int, steps.Metrics, Batch] | None = None
        self.row: Row = {}

    def advance(self) -> None:
        """Takes a step, and finishes the one before it, or both where something is due."""
        metrics, batch = self._loop._advance()
        self._finish_pending()
        self._pending = (self._loop.step, metrics, batch)
        if self._due(self._eval_every) or self._due(self._checkpoint_every):
            self._finish_pending()
        if self._due(self._checkpoint_every):
            self._loop._save()
            self._throughput.pause()

    def close(self) -> None:
        """Closes what is open, and waits for the checkpoint being written."""
        self._progress.close()
        if self._log is not None:
            self._log.close()
        if self._loop._checkpoints is not None:
            self._loop._checkpoints.wait()

    def _due(self, every: int | None) -> bool:
        step = self._loop.step
        return step == self._n_steps or (every is not None and step % every == 0)

    def _finish_pending(self) -> None:
        """Waits for a step, checks it, and reports it if it is the turn."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        values = {name: float(metrics[name]) for name in steps.METRICS if name in metrics}
        for name, what in (('loss', 'the loss'), ('grad_norm', "the gradient's norm")):
            if not math.isfinite(values[name]):
                raise self._loop._not_finite(step, what, values[name], batch)
        self._throughput.step(int(np.count_nonzero(batch[-1])))
        self._progress.step()
        # The weights are those of this step only if no other was set off meanwhile.
        evaluating = step == self._loop.step and self._due(self._eval_every)
        if evaluating or step == self._n_steps or step % self._log_every == 0:
            self._report(step, values, evaluating)

    def _report(self, step: int, values: dict[str, float], evaluating: bool) -> None:
        self.row = {'step': step, **{f'train/{name}': value for name, value in values.items()}}
        speed = self._throughput.tokens_per_second()
        if speed is not None:
            self.row['train/tokens_per_second'] = speed
        loop = self._loop
        if evaluating and loop._eval_tasks:
            self._throughput.pause()
            self.row |= evaluate(loop._net, loop.weights, loop.state, loop._eval_tasks)
        if self._log is not None:
            self._log.write(self.row)
        self._progress.row(self.row, self._throughput.seconds_left(self._n_steps - step))


def _optimizer(task: TrainTask, net: Layer) -> Any:
    """The task's optimizer for a model, behind clipping where that is asked for."""
    optimizer = bound(task.optimizer, net)
    if task.clip_norm is None:
        return optimizer
    optax = require('optax', 'train')
    return optax.chain(optax.clip_by_global_norm(task.clip_norm), optimizer)


def _distinct(carry: steps.Carry) -> steps.Carry:
    """Copies an array that stands in two places, which cannot be donated twice."""
    seen: set[int] = set()

    def once(x: jax.Array) -> jax.Array:
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(once, carry)


def _strange_target(net: Layer, batch: Batch) -> str | None:
    """What to do about a target that no logit stands for, if there is one."""
    targets, weights = batch[-2:]
    counted = np.asarray(targets)[np.asarray(weights) != 0]
    if not np.issubdtype(counted.dtype, np.integer) or counted.size == 0:
        return None
    n_logits = net.output_signature(on_device(batch[: net.n_in]))[0].shape[-1]
    strange = counted[(counted < 0) | (counted >= n_logits)]
    if strange.size == 0:
        return None
    return (
        f'target {strange[0]} is none of the {n_logits} logits; check the tokenizer and vocab_size'
    )


def _strange_weight(batch: Batch) -> str | None:
    weights = np.asarray(batch[-1])
    strange = weights[~np.isfinite(weights)]
    return f'a loss weight is {strange[0]}; check the data' if strange.size else None


def check_arguments(
    model: Any, train_task: Any, eval_tasks: tuple[Any, ...], seed: Any, every: dict[str, Any]
) -> None:
    """Raises a TypeError or ValueError for arguments of a `Loop` that cannot be right."""
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
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f'Loop: seed={seed!r}: give an integer')
    seeded('Loop: seed', seed)
    for name, value in every.items():
        check_count('Loop', name, value, optional=name in ('eval_every', 'checkpoint_every'))
