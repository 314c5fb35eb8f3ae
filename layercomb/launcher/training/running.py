"""One run of an experiment: what is checked, written and trained, in this order."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layercomb.errors import UsageError, machine_errors, usage_errors
from layercomb.launcher import terminal
from layercomb.launcher.configurations import Config
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.pretrained import Pretrained, keep
from layercomb.launcher.training import devices, stopping
from layercomb.supervised import Loop, Profile
from layercomb.supervised.fingerprint import check_allowed


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command asks of this start alone: the run's configuration does not know it.

    Attributes:
      allowed: changes that are allowed, as of `Loop`.
      until: when to save and end, as `time.monotonic` counts; None for not before the last step.
      profile: the first and the last step that are traced; None for none.
      mesh: of devices; None for that of the configuration.
    """

    allowed: tuple[str, ...] = ()
    until: float | None = None
    profile: tuple[int, int] | None = None
    mesh: Any = None


def asked(options: argparse.Namespace) -> Asked:
    """What the options of ``train`` and ``finetune`` ask.

    Args:
      options: of the command, with `began`, when it started.

    Raises:
      UsageError: for a change that is none, or a mesh that does not fit the devices.
    """
    with usage_errors():
        allowed = check_allowed(options.allow_changes)
    hours = options.max_hours
    until = None if hours is None else options.began + 3600 * hours
    return Asked(allowed, until, options.profile, devices.mesh_of(options))


def run(
    config: Config,
    experiment: Experiment,
    directory: Path,
    asked: Asked,
    begin: Callable[[], None] | None = None,
) -> Loop | None:
    """Trains, or goes on training, and prints what came out.

    Args:
      config: what is written into the directory.
      experiment: that it describes. If it starts from a `Pretrained`, that gives its weights away.
      directory: of the run, absolute.
      asked: what the command asks of this start.
      begin: writes what else is kept in the directory, before training.

    Returns:
      The Loop, at the end; None if it was stopped before.

    Raises:
      UsageError: for a mistake, in which case nothing was written; or if training cannot go on.
    """
    with usage_errors():
        experiment.check_sample()
        profiles = _profiles(asked, experiment.steps, directory)
        # It checks the rest before anything is written.
        loop = experiment.loop(directory, asked.allowed, profiles, asked.mesh)
        for profile in profiles:
            _check_to_come(profile, loop)
        if devices.is_first():
            with machine_errors('choose another --output_dir'):
                directory.mkdir(parents=True, exist_ok=True)
                config.write(directory)
                if isinstance(experiment.model, Pretrained):
                    keep(experiment.model, directory)
                if begin is not None:
                    begin()
        if isinstance(experiment.model, Pretrained):
            experiment.model.weights = None  # the Loop has its own
    row = stopping.run(loop, experiment.steps, asked.until)
    for profile in profiles:
        if profile.written is not None:
            print(f'the trace of steps {profile.first} to {profile.last}: {profile.written}')
    if row is None:
        return None
    cure = 'it is trained and saved; put that right, and run the same again'
    with usage_errors(), machine_errors(cure):
        terminal.write_result(experiment, loop, row, directory)
    return loop


def _profiles(asked: Asked, steps: int, directory: Path) -> list[Profile]:
    """What takes the trace that is asked for, into the run's directory."""
    if asked.profile is None:
        return []
    first, last = asked.profile
    if last > steps:
        raise UsageError(
            f'--profile {first}:{last}: the run ends with step {steps}: give earlier steps'
        )
    return [Profile(first, last, directory)]


def _check_to_come(profile: Profile, loop: Loop) -> None:
    if profile.first <= loop.step:
        raise UsageError(
            f'--profile {profile.first}:{profile.last}: the run goes on after step {loop.step}: '
            'give later steps'
        )
