"""One run of an experiment: what is checked, written and trained, in this order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from layercomb.errors import machine_errors, usage_errors
from layercomb.launcher import stopping, terminal
from layercomb.launcher.configurations import Config
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.pretrained import Pretrained, keep
from layercomb.supervised import Loop


def run(
    config: Config,
    experiment: Experiment,
    directory: Path,
    allowed: Sequence[str] = (),
    begin: Callable[[], None] | None = None,
) -> Loop | None:
    """Trains, or goes on training, and prints what came out.

    Args:
      config: what is written into the directory.
      experiment: that it describes. If it starts from a `Pretrained`, that gives its weights away.
      directory: of the run, absolute.
      allowed: changes that are allowed, as of `Loop`.
      begin: writes what else is kept in the directory, before training.

    Returns:
      The Loop, at the end; None if it was stopped before.

    Raises:
      UsageError: for a mistake, in which case nothing was written; or if training cannot go on.
    """
    with usage_errors():
        experiment.check_sample()
        loop = experiment.loop(directory, allowed)  # checks the rest before anything is written
        with machine_errors('choose another --output_dir'):
            directory.mkdir(parents=True, exist_ok=True)
            config.write(directory)
            if isinstance(experiment.model, Pretrained):
                keep(experiment.model, directory)
                experiment.model.weights = None  # the Loop has its own
            if begin is not None:
                begin()
    row = stopping.run(loop, experiment.steps)
    if row is None:
        return None
    cure = 'it is trained and saved; put that right, and run the same again'
    with usage_errors(), machine_errors(cure):
        terminal.write_result(experiment, loop, row, directory)
    return loop
