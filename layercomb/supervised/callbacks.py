"""Callbacks: your own code, called while a `Loop` runs."""

from __future__ import annotations

from typing import Any, Protocol

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
