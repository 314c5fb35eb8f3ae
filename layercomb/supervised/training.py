"""The training loop: steps, reports, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from layercomb import paths, trees
from layercomb.errors import UsageError, machine_errors, one_line
from layercomb.layers.core.layer import Layer
from layercomb.layers.facts import processes
from layercomb.model import Model
from layercomb.parallel.even import check_alike
from layercomb.parallel.layout import Layout, laid_out
from layercomb.supervised import steps
from layercomb.supervised.batches import Batch, Batches, check_loss_weights, shaped_unlike
from layercomb.supervised.beginning import (
    check_weights,
    clipped,
    distinct,
    first_state,
    fresh,
    trained_state,
)
from layercomb.supervised.callbacks import Callback
from layercomb.supervised.evaluation import evaluate
from layercomb.supervised.fingerprint import Fingerprint, check_allowed, fingerprint
from layercomb.supervised.fit import (
    check_arguments,
    check_arity,
    check_fit,
    check_inputs,
    on_device,
    why_not_finite,
)
from layercomb.supervised.inflight import InFlight
from layercomb.supervised.offloading import places_of
from layercomb.supervised.preference.reference import References
from layercomb.supervised.progress import Progress, Throughput
from layercomb.supervised.reports import MetricsLog, Row, read_metrics, write_report
from layercomb.supervised.resuming import Resumed, resume
from layercomb.supervised.tasks import (
    EvalTask,
    TrainTask,
    check_count,
    early,
    lower_is_better,
    reading,
)
from layercomb.trees import Tree

if TYPE_CHECKING:
    from layercomb.supervised.checkpoints import Checkpoints


_ASK_EVERY = 10  # steps: to ask each other, processes wait for those dispatched so far


class Loop:
    """Trains a model, and resumes an earlier run in the same directory.

    If `output_dir` holds checkpoints, the constructor restores the last one: weights, state,
    optimizer, random key and the data's position. On the same machine, a resumed run is bitwise
    equal to an uninterrupted one. A checkpoint records what the run was made of, and a run made of
    something else is refused. Without `output_dir`, nothing is written.

    A step is one compiled function that donates its carry, so arrays taken from `weights`, `state`
    or `opt_state` are valid until the next `run`. Losses are read while later steps run, so that
    the device never waits for Python: up to `inflight.AHEAD` steps are dispatched ahead.

    Of preferences (`data.preference_batches`), the model that training starts from is the
    reference: its log-likelihoods are computed first, and kept in the run's directory.

    If a loss is not finite, the run stops with an error that names the step. Nothing after that
    step is reported or saved: all losses are read before a checkpoint is written.

    Args:
      model: a layer that gives logits, whose weights are made from `seed`; or an `lc.Model`, whose
        weights are where training starts. The trained ones are copied: the Model keeps its own.
      train_task: data, loss and optimizer.
      eval_tasks: what to measure, each task under its own name.
      output_dir: the run's directory: `checkpoints/`, `metrics.jsonl`, TensorBoard events and
        `report.png`.
      seed: seeds the weights and all randomness in training.
      eval_every: steps between evaluations; None for one at the end.
      checkpoint_every: steps between checkpoints; None for one at the end.
      log_every: steps between rows of metrics. Evaluations and the last step have a row too. Loss,
        gradient norm and learning rate are those of the row's step, not means. Tokens a second
        (positions whose loss weight is not 0) are averaged over the steps since the last row.
      keep: how many of the last checkpoints to keep.
      keep_best: a metric of the eval tasks, such as 'valid/loss'. Whenever it reaches a new best, a
        checkpoint is written, and kept until a better one is. The metric's class says which way is
        better. The best so far is remembered when a run resumes. None keeps no best.
      callbacks: objects of classes derived from `Callback`, called in this order.
      progress: where to show progress, by default standard error; False for nowhere.
      allow_changes: what may differ from the run so far: names out of `fingerprint.PARTS`, or
        'all'. `resuming.resume` says what then happens. What does not need permission:
        `accumulate`, `accumulate_dtype`, `loss_chunk_len`, the evaluations, and the arguments
        except `seed`.
      mesh: of `parallel.make_mesh`, to train on several devices; or a `parallel.Layout` with rules
        of your own. A run may go on on another mesh.
      offload: 'blocks' keeps the weights of each `Repeat` and `ReversibleRepeat`, and their
        optimizer's state, in host memory; a block's part is on the device while it is computed.
        'blocks+inputs' keeps the inputs of blocks that are not reversible there too. A run may be
        switched from one to another. Optimizers have to move each block by itself. 'streams' keeps
        residual streams of a reversible model there, and 'blocks+streams' both.
      offload_dtype: 'bfloat16' computes blocks with matrices rounded to it, whose last 16 bits are
        sent for the update alone: see docs/scaling.md. Evaluations and checkpoints are float32.

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
        keep_best: str | None = None,
        callbacks: Sequence[Callback] = (),
        progress: TextIO | bool | None = None,
        allow_changes: str | Sequence[str] = (),
        mesh: Mesh | Layout | None = None,
        offload: str | None = None,
        offload_dtype: str = 'float32',
    ) -> None:
        self._eval_tasks = tuple(eval_tasks) if isinstance(eval_tasks, Iterable) else (eval_tasks,)
        options = {'seed': seed, 'keep': keep, 'keep_best': keep_best, 'callbacks': callbacks}
        options |= {'log_every': log_every, 'eval_every': eval_every}
        options |= {'checkpoint_every': checkpoint_every}
        check_arguments(model, train_task, self._eval_tasks, options)
        if keep_best is not None and output_dir is None:
            raise ValueError(f'Loop: keep_best={keep_best!r} needs an output_dir to keep it in')
        self._net = model.layer if isinstance(model, Model) else model
        self._directory = None if output_dir is None else paths.local(output_dir, 'output_dir')
        self._references = References(model, self._directory)
        train_task = self._references.referred(train_task)
        self._eval_tasks = tuple(map(self._references.referred, self._eval_tasks))
        self._task, self._seed, self._progress = train_task, seed, progress
        self._every = (log_every, eval_every, checkpoint_every)
        self._keep_best, self._callbacks = keep_best, tuple(callbacks)
        self._in_flight, self._stopping = InFlight(), False
        self._saved = 0  # the last step that needs no saving any more
        self._allowed = check_allowed(allow_changes)
        self._lay_out(mesh, offload, offload_dtype)
        self._checkpoints: Checkpoints | None = None
        if self._directory is not None:
            from layercomb.supervised.checkpoints import Checkpoints

            self._checkpoints = Checkpoints(self._directory / 'checkpoints', keep)
        self._batches = Batches(train_task.data)
        self._made_of: Fingerprint = {}
        self.step = 0
        self._begin(model)
        self._compile(train_task)

    def _lay_out(self, mesh: Any, offload: str | None, dtype: str) -> None:
        """Says where arrays are."""
        self._optimizer, self._layout = clipped(self._task, self._net), laid_out(mesh)
        self._streams = offload == 'streams'
        self._places = places_of(
            offload, self._task, self._net, self._optimizer, self._layout, dtype
        )

    def _compile(self, task: TrainTask) -> None:
        """Makes the step, and those of the stages before; each is compiled at its first use."""
        of_task = functools.partial(
            steps.of_task, task, self._optimizer, layout=self._layout, streams=self._streams
        )
        if self._places is not None:
            of_task = functools.partial(self._places.step, task)
        self._compiled = of_task(reading(task, self._net))
        self._early = [(n, of_task(denser)) for n, denser in early(task, self._net)]

    @property
    def weights(self) -> Tree:
        """The model's weights, valid until the next `run`; with `offload`, copies on the device."""
        weights = trees.merge(self._carry.trainable, self._frozen)
        return weights if self._places is None else self._places.whole(weights)

    @property
    def state(self) -> Tree:
        """The model's state, valid until the next `run`."""
        return self._carry.state

    @property
    def opt_state(self) -> Any:
        """The optimizer's state, valid until the next `run`."""
        carry = self._carry
        if self._places is None:
            return carry.opt_state
        return self._places.received(carry.trainable, carry.opt_state)

    def run(self, n_steps: int) -> Row:
        """Trains until `n_steps` steps have been taken in all, or until `stop` is called.

        Args:
          n_steps: where to stop. If so many have been taken already, nothing is done, except that
            the last is reported and saved if an interrupt prevented that.

        Returns:
          The metrics of the last step: 'step', 'train/loss', …, 'valid/loss', …

        Raises:
          UsageError: if a loss is not finite, a token is outside the vocabulary, a loss weight is
            negative, a later batch cannot be made or its shape does not fit the model, the data
            ends, or the disk is full.
        """
        check_count('Loop.run', 'n_steps', n_steps)
        self._settle()
        if self._checkpoints is not None and self._checkpoints.take_failure():
            self._saved = self._checkpoints.latest() or 0
        finished = self.step >= n_steps and self._saved == self.step
        if finished or self._is_asked_to_stop():
            self._stopping = False
            return self._last_row()
        with machine_errors('put that right, and run again to go on from the last checkpoint'):
            self._references.write()
            run = _Run(self, n_steps)
            try:
                while self.step < n_steps and not self._is_asked_to_stop():
                    run.advance()
                run.end()
            except BaseException as e:
                self._tell_callbacks(e)
                raise
            finally:
                self._stopping = False
                run.close()
            if self._directory is not None and jax.process_index() == 0:
                write_report(self._directory)
        return run.row

    def _tell_callbacks(self, error: BaseException) -> None:
        """Lets callbacks close what is theirs; what goes wrong there is a note of the error."""
        for callback in self._callbacks:
            try:
                callback.at_error(self)
            except Exception as e:
                error.add_note(f'{type(callback).__name__}.at_error: {one_line(e)}')

    def stop(self) -> None:
        """Ends the run in progress, or else the next run before its first step.

        Steps already dispatched are finished and reported, and the last one is saved but not
        evaluated. Safe to call from callbacks, signal handlers and other threads. Of several
        processes, all stop if one is asked to, at the next tenth step or sooner.
        """
        self._stopping = True

    def _is_asked_to_stop(self) -> bool:
        if processes.is_alone():
            return self._stopping
        if self.step % min(self._every[0], _ASK_EVERY):
            return False
        return bool(processes.from_all(self._stopping).any())

    def _settle(self) -> None:
        """Brings data position and step count up to a step that an interrupt cut short."""
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

    def _last_row(self) -> Row:
        """What was reported of the last step, if it was."""
        rows = [] if self._directory is None else read_metrics(self._directory)
        return next((r for r in rows if r['step'] == self.step), {'step': self.step})

    def _begin(self, model: Layer | Model) -> None:
        """Sets the carry: from the last checkpoint, from the Model given, or from the seed."""
        self._first = self._first_batch()
        signature = on_device(self._first[: self._net.n_in])
        init_key, self._key = jax.random.split(jax.random.key(self._seed))
        weights, state = jax.eval_shape(lambda key: self._net.init(signature, key), init_key)
        given = model.weights if isinstance(model, Model) else None
        if given is not None:
            check_weights(given, weights)
            weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        with processes.hearing():
            check_fit(
                self._net, weights, state, self._task, self._eval_tasks, self._first, self._layout
            )
        if self._places is not None:
            self._places = self._places.checked(self._task.partition(weights)[0])
        resumed = self._resume(weights, state, given)
        if resumed is not None:
            self.step, weights, state = resumed.step, resumed.weights, resumed.state
            self._saved = self.step
            self._key = self._key if resumed.key is None else resumed.key
        elif isinstance(model, Model) and given is not None:
            weights, state = given, trained_state(model, signature, state)
        elif self._places is not None:
            weights, state = self._places.fresh(signature, init_key)
        else:
            weights, state = fresh(self._net, signature, init_key, self._layout)
        trainable, self._frozen = self._task.partition(weights)
        if weights is given and (self._layout.mesh is None or self._layout.mesh.size == 1):
            trainable = jax.tree.map(jnp.copy, trainable)  # the step donates its weights
        elif weights is given:
            trainable = jax.tree.map(np.array, trainable)  # copied on the way to several devices
        trainable, self._frozen = (
            self._layout.put(self._net, x, x) for x in (trainable, self._frozen)
        )
        opt_state = None if resumed is None else resumed.opt_state
        if self._places is not None:
            trainable, self._frozen = self._places.put(trainable, self._frozen)
            opt_state = (
                self._places.first_state(trainable)
                if opt_state is None
                else self._places.sent(trainable, opt_state)
            )
        elif opt_state is None:
            opt_state = first_state(self._optimizer, self._net, trainable, self._layout)
        carry = distinct(steps.Carry(trainable, state, opt_state, jnp.int32(self.step)))
        put = functools.partial(self._layout.put, self._net, trainable)
        self._carry = put(carry) if self._places is None else self._places.put_rest(carry)

    def _first_batch(self) -> Batch:
        """The first batch of the data, which is like those of other processes."""
        with processes.hearing():
            if self._checkpoints is not None:
                self._batches.position()  # fails now if a checkpoint could not hold it
            first = self._batches.peek()
            check_arity(self._task, self._net, first, 'the data')
        check_alike(first, 'the batch of step 1')
        return first

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
        if self._places is None:
            abstract = self._layout.placed(self._net, weights, abstract)
        else:
            abstract = self._places.placed(trainable, abstract)
        return resume(
            self._checkpoints, self._made_of, self._allowed,
            abstract, self._optimizer, trainable, self._batches,
        )  # fmt: skip

    def _save(self) -> None:
        """Starts to write a checkpoint of this step, unless a weight is not finite."""
        if self._checkpoints is None:
            self._saved = self.step
            return
        finite_of = _finite if self._places is None else self._places.finite
        for path, finite in trees.flatten(finite_of(self._carry.trainable)).items():
            if (
                finite is not None and not finite
            ):  # by an update that a finite loss and gradient led to
                raise UsageError(
                    f'step {self.step}: {path} is not finite after its update '
                    f'({self._last_good()}): lower the learning rate, or give the optimizer a '
                    'greater eps'
                )
        carry, weights, frozen = self._carry, self._carry.trainable, self._frozen
        if self._places is not None:
            weights, frozen = map(self._places.saved, (weights, frozen))
        saved = {'weights': weights, 'state': carry.state, 'opt_state': self.opt_state}
        record = {
            'made_of': self._made_of,
            'data': self._batches.position(),
            'key': np.asarray(jax.random.key_data(self._key)).tolist(),
            'key_impl': str(jax.random.key_impl(self._key)),
        }
        self._checkpoints.save(self.step, saved, record, frozen)
        self._saved = self.step

    def _advance(self) -> None:
        """Dispatches a step; its metrics are read later, when they are computed."""
        number = self.step + 1
        batch, where = self._batches.peek(), f'the batch of step {number}'
        check_loss_weights(batch, where)
        check_inputs(self._task, self._net, batch, where)
        step = next((s for until, s in self._early if self.step < until), self._compiled)
        annotated = jax.profiler.StepTraceAnnotation('train', step_num=number)  # for profilers
        with shaped_unlike(self._first, batch, where), annotated:
            self._layout.check_rows(len(batch[0]), where)
            given = self._layout.rows(batch)
            self._carry, metrics = step(self._carry, self._frozen, self._key, given)
        self._batches.take()
        self.step += 1
        self._in_flight.add(self.step, metrics, batch)

    def _not_finite(self, step: int, what: str, value: float, batch: Batch) -> UsageError:
        """What to say when training has come to an end."""
        why = why_not_finite(self._net, batch)
        return UsageError(f'step {step}: {what} is {value} ({self._last_good()}): {why}')

    def _last_good(self) -> str:
        """Where training can be gone on with."""
        if self._checkpoints is not None:
            with contextlib.suppress(UsageError):  # what went wrong before is the news
                self._checkpoints.wait()
            good = self._checkpoints.latest()
            if good is not None:
                where = self._checkpoints.directory / str(good)
                return f'last good checkpoint: step {good}, {where}'
        return 'no checkpoint yet'


@jax.jit
def _finite(weights: Tree) -> Tree:
    """Which weights are finite throughout; None where a weight does not train."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), weights)


class _Run:
    """One call of `Loop.run`: reports, evaluations and checkpoints of its steps."""

    def __init__(self, loop: Loop, n_steps: int) -> None:
        self._loop, self._n_steps = loop, n_steps
        self._log_every, self._eval_every, self._checkpoint_every = loop._every
        directory = loop._directory
        # Of several processes, one tells and writes; checkpoints are written by all.
        tells = jax.process_index() == 0
        self._log = MetricsLog(directory, loop.step) if directory is not None and tells else None
        self._progress = Progress(loop.step, n_steps, loop._progress if tells else False)
        self._throughput = Throughput()
        self._reported = loop.step
        self.row: Row = loop._last_row()

    def advance(self) -> None:
        """Dispatches a step, reads the metrics of finished steps, and does what is due."""
        loop = self._loop
        for callback in loop._callbacks:
            callback.before_step(loop)
        if loop._is_asked_to_stop():
            return
        try:
            loop._advance()
        except UsageError:  # of a batch: what the steps before it came to is told first
            self._look(wait=True, evaluating=False)
            raise
        evaluating = bool(loop._eval_tasks) and self._due(loop.step, self._eval_every)
        saving = loop._checkpoints is not None and self._due(loop.step, self._checkpoint_every)
        self._look(evaluating or saving or self._throughput.paused, evaluating)
        if evaluating:
            self._evaluate()
            saving |= self._is_best()
        if saving:
            self._save()
        if evaluating:
            for callback in loop._callbacks:
                callback.after_evaluation(loop, self.row)

    def end(self) -> None:
        """Finishes, reports and saves the last step, also where none of these was due."""
        loop = self._loop
        self._look(wait=True, evaluating=False)
        if self._reported < loop.step:
            self._report()
        if loop._saved < loop.step:
            self._save()
        for callback in loop._callbacks:
            callback.at_end(loop, self.row)
        if loop._checkpoints is not None:
            loop._checkpoints.settle()

    def close(self) -> None:
        """Closes what is open, and waits for the checkpoint being written."""
        self._progress.close()
        try:
            if self._log is not None:
                self._log.close()
        finally:
            if self._loop._checkpoints is not None:
                self._finish(self._loop._checkpoints)

    def _finish(self, checkpoints: Any) -> None:
        """Waits for the checkpoint being written; its error is a note of one that ends the run."""
        error = sys.exc_info()[1]
        try:
            checkpoints.wait()
        except UsageError as e:
            if error is None:
                raise
            error.add_note(one_line(e))

    def _due(self, step: int, every: int | None) -> bool:
        return step == self._n_steps or (every is not None and step % every == 0)

    def _look(self, wait: bool, evaluating: bool) -> None:
        """Checks the finished steps (all steps if `wait`), and reports those that are due.

        If an evaluation follows the last step, that step is reported with it.
        """
        loop = self._loop
        finished = loop._in_flight.finished(wait)
        self._throughput.together(len(finished))
        for step, values, batch in finished:
            for name, what in (('loss', 'the loss'), ('grad_norm', "the gradient's norm")):
                if not math.isfinite(values[name]):
                    raise loop._not_finite(step, what, values[name], batch)
            loop._in_flight.drop()
            self._throughput.step(jax.process_count() * int(np.count_nonzero(batch[-1])))
            self._progress.step()
            self.row = {'step': step, **{f'train/{name}': x for name, x in values.items()}}
            turn = self._due(step, self._eval_every) or step % self._log_every == 0
            if turn and not (evaluating and step == loop.step):
                self._report()
            for callback in loop._callbacks:
                callback.after_step(loop, self.row)

    def _evaluate(self) -> None:
        """Measures the eval tasks after the last step, and reports both."""
        loop = self._loop
        self._throughput.pause()
        net = loop._net if loop._places is None else loop._places.reading
        weights = trees.merge(loop._carry.trainable, loop._frozen)
        self._report(evaluate(net, weights, loop.state, loop._eval_tasks, loop._layout))

    def _report(self, measured: Mapping[str, Any] | None = None) -> None:
        """Shows and writes the last step that was read, and what was measured after it."""
        speed = self._throughput.tokens_per_second()
        if speed is not None:
            self.row['train/tokens_per_second'] = speed
        self.row = {**self.row, **(measured or {})}
        self._reported = step = self.row['step']
        if self._log is not None:
            self._log.write(self.row)
        self._progress.row(self.row, self._throughput.seconds_left(self._n_steps - step))

    def _is_best(self) -> bool:
        """Whether the evaluation just made is the best so far; if so, that is noted."""
        name, checkpoints = self._loop._keep_best, self._loop._checkpoints
        if name is None or checkpoints is None:
            return False
        value, best = self.row[name], checkpoints.best
        if best is not None and best.name == name:
            lower = lower_is_better(name, self._loop._eval_tasks)
            if not (value < best.value if lower else value > best.value):
                return False
        checkpoints.note_best(name, value, self.row['step'])
        return True

    def _save(self) -> None:
        self._loop._save()
        self._throughput.pause()
