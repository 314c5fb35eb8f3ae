"""The command ``layercomb finetune``: its run, with what is told around it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable

from layercomb.errors import UsageError, usage_errors
from layercomb.launcher import runs
from layercomb.launcher.configurations import Config
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.finetuning import pace, telling
from layercomb.launcher.finetuning.options import plan
from layercomb.launcher.finetuning.plan import Plan
from layercomb.launcher.pretrained import Pretrained, inside, pretrained_tokenizer
from layercomb.launcher.training import devices, running

Configured = Callable[[str, list[str], str], contextlib.AbstractContextManager[Config]]

_CURE = 'give the options of that run to go on with it, or choose another --output_dir'
_PACED = ('steps', 'eval_every', 'checkpoint_every', 'log_every', 'train_task')


def finetune(options: argparse.Namespace, configured: Configured) -> None:
    """Fine-tunes; the same command again goes on.

    Args:
      options: of the command.
      configured: parses a configuration: its text, further bindings, and what messages call it.

    Raises:
      UsageError: for a mistake, in which case nothing was written.
    """
    made = plan(options)
    asked = running.asked(options)
    with inside(made.directory):
        tokenizer = pretrained_tokenizer(options.source)
        documents = made.documents(tokenizer)
        lengths = telling.lengths(made, documents)
        steps = made.known_steps()
        if steps is None and (options.distributed or options.mesh):
            raise UsageError(
                'finetune measures on one device how many steps fit into the minutes: give --steps '
                'with --mesh and --distributed'
            )
        text = made.text(len(documents)) + made.pace(steps or 2)
        with configured(text, options.gin_param, 'finetune') as config:
            runs.check_directory(made.directory, config.text, bool(asked.allowed), cure=_CURE)
            experiment = config.build()
            model = experiment.model
            if not isinstance(model, Pretrained):
                raise UsageError('finetune trains a model that exists: leave train.model as it is')
            print(f'{lengths}\n\n{telling.what_trains(experiment, model)}', flush=True)
            question = telling.question_of(made, documents, tokenizer)
            with usage_errors():
                said = telling.before(model, question, made.directory)
            if steps is None:
                seconds = 60 * made.minutes - (time.monotonic() - options.began)
                experiment = _paced(made, config, experiment, options.gin_param, seconds)
            loop = running.run(
                config, experiment, made.directory, asked,
                begin=lambda: telling.remember(said, made.directory),
            )  # fmt: skip
            weights = None if loop is None else devices.on_one(loop.weights)
            if loop is None or weights is None:
                return
            with usage_errors():
                state = devices.on_one(loop.state)
                telling.after(made, model, weights, state, question, said)


def _paced(
    made: Plan, config: Config, experiment: Experiment, bindings: list[str], seconds: float
) -> Experiment:
    """The experiment with as many steps as fit into the time."""
    with usage_errors():
        steps = pace.steps_within(experiment, seconds)
    print(f'{steps:,} steps fit into {made.minutes:g} minutes', flush=True)
    config.bind('\n'.join((made.pace(steps), *bindings)))
    return dataclasses.replace(experiment, **{name: config.value(name) for name in _PACED})
