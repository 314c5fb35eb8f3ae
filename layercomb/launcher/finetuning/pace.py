"""How many steps fit into some minutes: measured on the model and the data themselves."""

from __future__ import annotations

import dataclasses
import time

from layercomb.data.judged.batches import PreferenceBatches
from layercomb.data.sources import Mapped
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.finetuning.plan import EVALUATIONS
from layercomb.supervised import EvalTask, Loop, TrainTask

_TIMED = 3  # steps
_FORWARD = 0.4  # of a step: a batch that is measured
_LAST = 8.0  # seconds: the last checkpoint, the report and an answer


def steps_within(experiment: Experiment, seconds: float) -> int:
    """How many steps fit, with what compiling and measuring them takes.

    A few steps are taken from the weights where training starts, and thrown away.

    Args:
      experiment: with any number of steps; its model has weights.
      seconds: until all should be over.

    Returns:
      At least 1.
    """
    began = time.monotonic()
    task = _of_few_pairs(experiment.train_task)
    loop = Loop(experiment.model, task, seed=experiment.seed, progress=False)
    loop.run(1)
    compiled = time.monotonic()
    loop.run(1 + _TIMED)
    each = (time.monotonic() - compiled) / _TIMED
    # The schedule is a part of the program, which is compiled anew for the steps found here.
    left = seconds - _LAST - (time.monotonic() - began) - (compiled - began - each)
    batches = sum(task.n_batches or 0 for task in experiment.eval_tasks)
    if batches:
        left -= (compiled - began) / 3 + EVALUATIONS * batches * _FORWARD * each
    tasks: list[TrainTask | EvalTask] = [experiment.train_task, *experiment.eval_tasks]
    for of in tasks:  # a reference reads all pairs first
        if isinstance(of.data, PreferenceBatches):
            left -= len(of.data.source) / of.data.options['batch_size'] * _FORWARD * each
    return max(1, int(left / each))


def _of_few_pairs(task: TrainTask) -> TrainTask:
    """The task on as few pairs as are timed, so that a reference need not read them all twice."""
    if not isinstance(task.data, PreferenceBatches):
        return task
    source = task.data.source
    n = min(len(source), (1 + _TIMED) * task.data.options['batch_size'])
    few = dataclasses.replace(task.data, source=Mapped(range(n), source.__getitem__))
    return dataclasses.replace(task, data=few)
