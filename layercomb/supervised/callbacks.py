"""Callbacks: your own code, called while a `Loop` runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

import jax

from layercomb import paths
from layercomb.checks import Size, check_value
from layercomb.errors import UsageError
from layercomb.supervised.reports import Row
from layercomb.trees import Tree


class Running(Protocol):
    """What a callback sees of a `Loop`.

    Attributes:
      step: how many steps were dispatched.
    """

    step: int

    @property
    def weights(self) -> Tree:
        """The model's weights after `step` steps, valid until the callback returns."""

    @property
    def state(self) -> Tree:
        """The model's state after `step` steps, valid until the callback returns."""

    @property
    def opt_state(self) -> Any:
        """The optimizer's state after `step` steps, valid until the callback returns."""

    def stop(self) -> None:
        """Ends the run; see `Loop.stop`."""


class Callback:
    """The base class of callbacks of a `Loop`; subclasses override the methods they need.

    ``loop.stop()`` ends the run. An exception in a callback ends it at once and reaches the caller
    of `Loop.run`, an OSError as the cause of a UsageError. A checkpoint that is being written is
    finished first, and no other is begun. `row` is a dict of numbers: 'step', 'train/loss',
    'train/grad_norm', and 'train/learning_rate' if the optimizer's state has one.

    >>> class Patience(Callback):
    ...     '''Ends a run once the loss has not fallen for some evaluations.'''
    ...
    ...     def __init__(self, evaluations):
    ...         self.left = self.evaluations = evaluations
    ...         self.least = float('inf')
    ...
    ...     def after_evaluation(self, loop, row):
    ...         self.left = self.evaluations if row['valid/loss'] < self.least else self.left - 1
    ...         self.least = min(self.least, row['valid/loss'])
    ...         if not self.left:
    ...             loop.stop()
    """

    def before_step(self, loop: Running) -> None:
        """Called before each step is dispatched; earlier ones may still be computed.

        Args:
          loop: the Loop; the step is number ``loop.step + 1``. Stopped here, it is not taken.
        """

    def after_step(self, loop: Running, row: Row) -> None:
        """Called for every step, in order, once its numbers are on the host.

        Later steps are already dispatched: `loop.step` is up to `inflight.AHEAD` more than
        ``row['step']``, and `loop.weights` are those after `loop.step` steps. Reading their values
        stalls the device; reading `row` does not.

        Args:
          loop: the Loop.
          row: the step's numbers. Those of an evaluation come with `after_evaluation`.
        """

    def after_evaluation(self, loop: Running, row: Row) -> None:
        """Called after the eval tasks were measured; `loop.weights` are the measured weights.

        If a checkpoint is due, or `keep_best` asks for one, writing it has already begun.

        Args:
          loop: the Loop, with ``loop.step == row['step']``.
          row: the step's numbers, and what was measured: 'valid/loss', …
        """

    def at_end(self, loop: Running, row: Row) -> None:
        """Called once when a run ends by itself or by `Loop.stop`; not after an error.

        Args:
          loop: the Loop, with ``loop.step == row['step']``; its last step is being saved.
          row: what `Loop.run` returns.
        """

    def at_error(self, loop: Running) -> None:
        """Called once when an error or an interrupt ends a run, before it reaches the caller.

        Args:
          loop: the Loop; its weights may be gone.
        """


class Profile(Callback):
    """Traces some steps of a run with JAX's profiler.

    The trace holds these steps alone: the earlier ones are waited for, and so are they before the
    next one. It begins with what a step compiles, if it does. Each time it is taken makes a folder
    of its own, ``directory/plugins/profile/TIME``, which TensorBoard's profile plugin shows
    (``tensorboard --logdir directory``). Its ``perfetto_trace.json.gz`` can be opened at
    https://ui.perfetto.dev. An error ends the trace; a run that goes on has the rest in another.

    Args:
      first: the first step that is traced, by the number that reports give it, from 1.
      last: the last one. A run that ends before has a trace up to its end, and one that resumes in
        between has the rest.
      directory: where to write it; that of the run is a good choice.

    Attributes:
      written: the folder of the trace; None before it is written.

    Raises:
      TypeError, ValueError: for numbers that are no steps, or not in this order.
      UsageError: in training, if something else takes a trace at that time.

    References:
      https://docs.jax.dev/en/latest/profiling.html
    """

    def __init__(self, first: int, last: int, directory: str | Path) -> None:
        check_value('Profile', 'first', first, Size)
        check_value('Profile', 'last', last, Size)
        if last < first:
            raise ValueError(f'Profile: first={first} comes after last={last}: swap them')
        self.first, self.last = first, last
        self.written: Path | None = None
        self._directory = paths.local(directory, 'Profile: directory')
        self._taking = False

    def before_step(self, loop: Running) -> None:
        """Begins before the first of the steps, and ends before the step after the last."""
        if self._taking and loop.step >= self.last:
            self._end(loop)
        elif not self._taking and self.first - 1 <= loop.step < self.last:
            self._directory.mkdir(parents=True, exist_ok=True)
            jax.block_until_ready(loop.weights)
            try:
                jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            except RuntimeError as e:
                raise UsageError(
                    f'Profile: no trace can be taken ({e}): end the other one first'
                ) from None
            self._taking = True

    def at_end(self, loop: Running, row: Row) -> None:
        """Ends with the run."""
        if self._taking:
            self._end(loop)

    def at_error(self, loop: Running) -> None:
        """Ends with what there is; that it cannot be written is no news beside the error."""
        if self._taking:
            with contextlib.suppress(Exception):
                self._stop()

    def _end(self, loop: Running) -> None:
        jax.block_until_ready(loop.weights)
        self._stop()

    def _stop(self) -> None:
        self._taking = False
        jax.profiler.stop_trace()
        self.written = max((self._directory / 'plugins' / 'profile').iterdir())


def check_callbacks(owner: str, callbacks: Any) -> None:
    """Raises a TypeError unless `callbacks` is a tuple or list of `Callback` objects.

    Args:
      owner: who was given them, for messages.
      callbacks: the value to check.
    """
    if not isinstance(callbacks, (tuple, list)):
        raise TypeError(f'{owner}: callbacks={callbacks!r}: give a tuple of supervised.Callback')
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f'{owner}: callbacks holds {callback!r}: give objects of classes derived from '
                'supervised.Callback'
            )
