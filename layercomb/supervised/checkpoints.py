"""The checkpoints of a run: the last few steps and the best, written while training goes on.

A step's directory holds `weights`, `state` and `opt_state`, and a record: the data's position, the
random key, and which step is the best so far. The directory appears only when it is complete. So if
the process is killed at any moment, the previous step and the best one can still be restored.

Weights that are frozen never change, so they are written once, into the directory `frozen` beside
the steps, before the first step that needs them. The record of a step says which of its
subdirectories, named after that first step, holds the rest of its weights.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layercomb import checkpoints, paths, trees
from layercomb.checkpoints import Tree, ocp
from layercomb.errors import UsageError, machine_errors
from layercomb.layers.facts import processes

_BEST = 'best'
_FROZEN = 'frozen'


class Best(NamedTuple):
    """The best step so far.

    Attributes:
      name: the metric's name, such as 'valid/loss'.
      value: the metric's value after that step.
      step: the number of the step, which has a checkpoint.
    """

    name: str
    value: float
    step: int


class Checkpoints:
    """The last `keep` checkpoints of a run and the best one, in one directory.

    The directory is made at the first save.

    Args:
      directory: holds a directory for each step.
      keep: how many of the last steps to keep; older ones are deleted, except the best.

    Attributes:
      best: the best step so far; None if there is none. It is kept, and each save records it.
      frozen: the subdirectory of `frozen` with the weights that do not train; None if the next save
        has to write them.

    Raises:
      UsageError: if the directory cannot be made or written to.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        self.directory, self._keep = paths.local(directory, 'output_dir'), int(keep)
        self.best: Best | None = None
        self.frozen: int | None = None
        self._saving, self._has_failed = checkpoints.Background(), False
        paths.check_for_arrays(self.directory)
        try:
            paths.check_can_hold(self.directory)
        except OSError as e:
            raise _unwritable(self.directory, e) from None

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager. It makes the directory, so it is made at the first save."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(self, self._keep),
            cleanup_tmp_directories=True,
            async_options=self._saving.options(),
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self.directory, options=options)
        except OSError as e:
            raise _unwritable(self.directory, e) from None

    def latest(self) -> int | None:
        """The number of the last complete step; None if there is none."""
        return max(_steps(self.directory), default=None)

    def save(
        self,
        step: int,
        trees: Mapping[str, Tree],
        record: Mapping[str, Any],
        frozen: Tree | None = None,
    ) -> None:
        """Starts to save a step; returns when the arrays may be donated again.

        Waits for the save before it, as `settle` does. Of several processes, all have to save.

        Args:
          step: the number of the step, greater than any saved before.
          trees: named trees of arrays.
          record: what else to keep, as JSON can hold it.
          frozen: the rest of the tree 'weights', which does not train, with None in the places of
            what does. It is written by the first save alone.

        Raises:
          UsageError: if this step, or the one before it, cannot be written.
        """
        self.settle()
        more: dict[str, Any] = {} if self.best is None else {_BEST: self.best._asdict()}
        if jax.tree.leaves(frozen):
            if self.frozen is None:
                with self._told(step):
                    self._write_frozen(step, frozen)
            more[_FROZEN] = self.frozen
        trees = {name: _without_none(x) if name == 'weights' else x for name, x in trees.items()}
        args = checkpoints.save_args(trees, {**record, **more})
        with self._told(step):
            self._saving.start(self._manager, step, args)

    def _write_frozen(self, step: int, frozen: Tree) -> None:
        """Writes frozen weights, whole or not at all, before the step that needs them."""
        directory = self.directory.parent / _FROZEN / str(step)
        shutil.rmtree(directory, ignore_errors=True)  # of a run that ended before this step
        directory.parent.mkdir(parents=True, exist_ok=True)
        args = checkpoints.save_args({'weights': _without_none(frozen)}, {})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory, args=args)
        self.frozen = step

    def note_best(self, name: str, value: float, step: int) -> None:
        """Records that the step to be saved next is the best so far.

        Args:
          name: the metric's name, such as 'valid/loss'.
          value: the metric's value.
          step: the number of the step.
        """
        self.best = Best(name, value, step)

    def remember_best(self, record: Mapping[str, Any]) -> None:
        """Sets `best` from a checkpoint's record; to None if that step is no longer there."""
        self.best = _best(self.directory, record)

    def remember_frozen(self, record: Mapping[str, Any]) -> None:
        """Sets `frozen` from a checkpoint's record, if the same weights train as in that step."""
        self.frozen = record.get(_FROZEN)

    def record(self, step: int) -> tuple[dict[str, Any], dict[str, checkpoints.Kinds]]:
        """What a step keeps beside arrays, and the type and shape of each array.

        Args:
          step: a complete step.

        Returns:
          (record, kinds): the record as it was saved, and for each tree, path -> 'float32[4,5]'.

        Raises:
          UsageError: if it cannot be read.
        """
        record = checkpoints.read_record(self.directory / str(step), _cure(self.directory, step))
        return record['values'], record['arrays']

    def restore(self, step: int, abstract: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict]:
        """Reads a step back.

        Args:
          step: a complete step.
          abstract: named trees of `jax.ShapeDtypeStruct` (or of arrays), as they were saved; an
            array goes where the struct's sharding says, by default on the first device.

        Returns:
          (trees, record), as they were saved.

        Raises:
          UsageError: if the step is damaged, or of another model or optimizer.
        """
        return _restore(self.directory, step, abstract)

    def settle(self) -> None:
        """Waits until all processes have all saves on the disk; what went wrong in one, all raise.

        Raises:
          UsageError: if a step cannot be written.
        """
        if self._saving.failed():
            with processes.hearing():
                self.wait()

    def wait(self) -> None:
        """Waits until all saves of this process are on the disk.

        Raises:
          UsageError: if a step cannot be written.
        """
        with self._told(self._saving.step):
            self._saving.wait()

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Turns what the machine refuses into a UsageError that says where the run can go on."""
        last = self.latest()
        where = 'start' if last is None else f'go on from step {last}'
        what = f'step {step} cannot be saved in {str(self.directory)!r}'
        try:
            with machine_errors(f'put that right, and run the same again to {where}', what):
                yield
        except UsageError as e:
            self._forget()
            cause = e.__cause__
            if isinstance(cause, TimeoutError) and not processes.is_alone():
                raise (cause.__cause__ or cause) from None  # another process, and no disk
            raise

    def _forget(self) -> None:
        """Begins anew after a save that failed, which Orbax would tell of again."""
        self._has_failed = True
        if processes.is_alone():
            vars(self).pop('_manager', None)

    def take_failure(self) -> bool:
        """Whether a save has failed since this was asked last: its step is not on the disk."""
        failed, self._has_failed = self._has_failed, False
        return failed

    def close(self) -> None:
        """Waits for all saves, and ends the background threads."""
        self.wait()
        if '_manager' in vars(self):
            self._manager.close()


class _LastAndBest:
    """Orbax's policy of what to keep: the last few steps, and the best one."""

    def __init__(self, checkpoints: Checkpoints, n_last: int) -> None:
        self._checkpoints, self._n_last = checkpoints, n_last

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each checkpoint, in order of steps; Orbax calls this.

        Args:
          checkpoints: Orbax's descriptions of the steps, oldest first.
          context: not used.

        Returns:
          A bool for each.
        """
        best = self._checkpoints.best
        first = len(checkpoints) - self._n_last
        return [
            i >= first or (best is not None and checkpoint.step == best.step)
            for i, checkpoint in enumerate(checkpoints)
        ]


def saved_weights(
    run_dir: str | Path,
    weights: Tree,
    state: Tree | None = None,
    checkpoint: str | int = 'last',
) -> tuple[Tree, Tree, int]:
    """Weights and state from one of a run's checkpoints. Nothing is written.

    Args:
      run_dir: the output directory of a run, which may still be training.
      weights: the weights as `jax.ShapeDtypeStruct`: `jax.eval_shape(net.init, …)[0]`.
      state: the state as `jax.ShapeDtypeStruct`; None if the model has none.
      checkpoint: 'last'; 'best', the one that `keep_best` kept; or the number of a step.

    Returns:
      (weights, state, step).

    Raises:
      UsageError: if there is no such checkpoint, it is damaged, or it is of another model.
    """
    directory = paths.local(run_dir, 'run_dir') / 'checkpoints'
    step = _chosen(directory, str(run_dir), str(checkpoint))
    abstract = {'weights': weights, 'state': {} if state is None else state}
    trees, _ = _restore(directory, step, abstract)
    return trees['weights'], trees['state'], step


def _chosen(directory: Path, run: str, checkpoint: str) -> int:
    """The step that 'last', 'best' or a number means."""
    steps = _steps(directory)
    if not steps:
        raise UsageError(f'no checkpoint in {run!r}: give the output_dir of a run')
    if checkpoint == 'last':
        return steps[-1]
    there = f'there are last and {", ".join(map(str, steps))}'
    if checkpoint == 'best':
        last = checkpoints.read_record(directory / str(steps[-1]), _cure(directory, steps[-1]))
        best = _best(directory, last['values'])
        if best is None:
            raise UsageError(
                f'no best checkpoint in {run!r}, as it was trained without keep_best: {there}'
            )
        return best.step
    if checkpoint.isdecimal() and int(checkpoint) in steps:
        return int(checkpoint)
    raise UsageError(f'no checkpoint {checkpoint!r} in {run!r}: {there}')


def _best(directory: Path, record: Mapping[str, Any]) -> Best | None:
    """The best step in a record; None if there is none, or it was deleted."""
    best = record.get(_BEST)
    return Best(**best) if best and best['step'] in _steps(directory) else None


def _unwritable(directory: Path, error: OSError) -> UsageError:
    return UsageError(
        f'cannot write to {str(directory)!r} ({error.strerror}): choose another output_dir'
    )


def _steps(directory: Path) -> list[int]:
    """The complete steps in a directory, which may not exist."""
    if not directory.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(directory))


def _restore(
    directory: Path, step: int, abstract: Mapping[str, Tree]
) -> tuple[dict[str, Tree], dict]:
    """Reads one step; errors name the step to continue from instead."""
    path, cure = directory / str(step), _cure(directory, step)
    frozen = checkpoints.read_record(path, cure)['values'].get(_FROZEN)
    if frozen is None or 'weights' not in abstract:
        return checkpoints.read(path, abstract, cure)
    beside = directory.parent / _FROZEN / str(frozen)
    again = 'start again in another directory, for all steps need it'
    with processes.hearing():
        there = checkpoints.read_record(beside, again)['arrays']['weights']
    flat = trees.flatten(abstract['weights'])
    training = trees.unflatten({path: x for path, x in flat.items() if path not in there})
    others = trees.unflatten({path: x for path, x in flat.items() if path in there})
    made, record = checkpoints.read(path, {**abstract, 'weights': training}, cure)
    rest, _ = checkpoints.read(beside, {'weights': others}, again)
    both = trees.flatten(made['weights']) | trees.flatten(rest['weights'])
    return {**made, 'weights': trees.unflatten(both)}, record


def _without_none(tree: Tree) -> Tree:
    """A nested dict without the places where None stands."""
    return trees.unflatten({path: x for path, x in trees.flatten(tree).items() if x is not None})


def _cure(directory: Path, step: int) -> str:
    """What to do about a damaged step."""
    others = [s for s in _steps(directory) if s < step]
    then = f'continue from step {others[-1]}' if others else 'start again'
    return f'delete that directory to {then}'
