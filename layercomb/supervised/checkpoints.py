"""The checkpoints of a run: the last few steps, written while training goes on.

A step's directory holds `weights`, `state` and `opt_state`, and a record of where the data stood
and of the random key. It appears when it is complete, so a process killed at any moment leaves the
step before it restorable.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from layercomb import checkpoints, paths
from layercomb.checkpoints import Tree, ocp
from layercomb.errors import UsageError


class Checkpoints:
    """The last `keep` checkpoints of a run, in one directory, which is made at the first save.

    Args:
      directory: where the steps' directories stand.
      keep: how many steps to keep; older ones are deleted.

    Raises:
      UsageError: if the directory cannot be, or cannot be written to.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        self.directory, self._keep = paths.local(directory, 'output_dir'), keep
        paths.check_for_arrays(self.directory)
        try:
            paths.check_can_hold(self.directory)
        except OSError as e:
            raise _unwritable(self.directory, e) from None

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which makes the directory: not before there is something to keep."""
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self.directory, options=options)
        except OSError as e:
            raise _unwritable(self.directory, e) from None

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return max(_steps(self.directory), default=None)

    def save(self, step: int, trees: Mapping[str, Tree], record: Mapping[str, Any]) -> None:
        """Starts to save a step; returns when the arrays may be donated again.

        Args:
          step: the number of the step, greater than any saved before.
          trees: named trees of arrays.
          record: what else to keep, as JSON can hold it.
        """
        self._manager.save(step, args=checkpoints.save_args(trees, record))

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

    def wait(self) -> None:
        """Waits until what was saved is on the disk; errors of writing it are raised here."""
        if '_manager' in vars(self):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets the background threads go."""
        if '_manager' in vars(self):
            self._manager.close()


def latest_weights(
    run_dir: str | Path, weights: Tree, state: Tree | None = None
) -> tuple[Tree, Tree, int]:
    """The model of a run's last checkpoint, without its optimizer; writes nothing.

    Args:
      run_dir: the output directory of a run, which may still be training.
      weights: the weights as `jax.ShapeDtypeStruct`: `jax.eval_shape(net.init, …)[0]`.
      state: the state, likewise; nothing if the model has none.

    Returns:
      (weights, state, step).

    Raises:
      UsageError: if there is no checkpoint, it is damaged, or it is of another model.
    """
    directory = paths.local(run_dir, 'run_dir') / 'checkpoints'
    step = max(_steps(directory), default=None)
    if step is None:
        raise UsageError(f'no checkpoint in {str(run_dir)!r}: give the output_dir of a run')
    abstract = {'weights': weights, 'state': {} if state is None else state}
    trees, _ = _restore(directory, step, abstract)
    return trees['weights'], trees['state'], step


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
    """Reads one step, naming in an error the step that would come before it."""
    path = directory / str(step)
    return checkpoints.read(path, abstract, _cure(directory, step))


def _cure(directory: Path, step: int) -> str:
    """What to do about a damaged step."""
    others = [s for s in _steps(directory) if s < step]
    then = f'continue from step {others[-1]}' if others else 'start again'
    return f'delete that directory to {then}'
