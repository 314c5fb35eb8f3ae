"""Adapters of a served model: those of PEFT, and runs that trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from layercomb import paths, transforms, trees
from layercomb.errors import UsageError, usage_errors
from layercomb.launcher import runs
from layercomb.model import Model


def with_adapters(
    model: Model, directories: Mapping[str, str], of_run: Callable[[str], Model]
) -> Model:
    """A model with several adapters, of which each request has its own.

    Args:
      model: the base.
      directories: of the adapters, by their names.
      of_run: reads the model of a run.

    Raises:
      UsageError: if a directory holds no adapter, or one for another base.
    """
    if not directories:
        return model
    named = {}
    for name, directory in directories.items():
        its = _adapted(model, name, directory, of_run)
        named[name] = (its.layer, its.weights or {})
    with usage_errors():
        made = transforms.adapters(model.layer, model.weights or {}, named)
    return Model(*made, model.state)


def _adapted(model: Model, name: str, directory: str, of_run: Callable[[str], Model]) -> Model:
    """The model with one adapter."""
    from layercomb.interop import peft

    folder = paths.local(directory, '--adapter')
    if (folder / 'adapter_config.json').is_file():
        return peft.load(folder, model)
    if not runs.is_run(folder):
        raise UsageError(
            f'--adapter {name}: {directory!r} holds no adapter of PEFT (adapter_config.json is '
            f'missing), nor a run ({runs.CONFIG} is missing): give the directory of one'
        )
    its = of_run(directory)
    ours, theirs = trees.flatten(model.weights or {}), trees.flatten(its.weights or {})
    for path, x in ours.items():
        y = theirs.get(path)
        if y is None or (y.shape, y.dtype) != (x.shape, x.dtype):
            continue  # the run keeps it in other bits, or its adapter does not fit either
        if not np.array_equal(x, y):
            raise UsageError(
                f'--adapter {name}: the run {directory!r} has another {path} than this model, so '
                'it trained more than an adapter, or on another base: serve the run by itself'
            )
    return its
