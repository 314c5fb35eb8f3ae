"""How many steps fit into some minutes: measured on the model and the data themselves."""

from __future__ import annotations

import time

from layercomb.launcher.experiment import Experiment
from layercomb.supervised import Loop

_TIMED = 3  # steps
_EVALUATIONS = 4  # of a run, see `Plan.pace`
_FORWARD = 0.4  # of a step: a batch that is measured


def steps_within(experiment: Experiment, seconds: float) -> int:
    """How many steps fit, with what compiling and measuring them takes.

    A few steps are taken from the weights where training starts, and thrown away.

    Args:
      experiment: with any number of steps; its model has weights.
      seconds: until training should end.

    Returns:
      At least 1.
    """
    began = time.monotonic()
    loop = Loop(experiment.model, experiment.train_task, seed=experiment.seed, progress=False)
    loop.run(1)
    compiled = time.monotonic()
    loop.run(1 + _TIMED)
    each = (time.monotonic() - compiled) / _TIMED
    # The schedule is a part of the program, which is compiled anew for the steps found here.
    left = seconds - (time.monotonic() - began) - (compiled - began - each)
    batches = sum(task.n_batches or 0 for task in experiment.eval_tasks)
    if batches:
        left -= (compiled - began) / 3 + _EVALUATIONS * batches * _FORWARD * each
    return max(1, int(left / each))
