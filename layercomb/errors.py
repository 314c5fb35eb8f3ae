"""Errors that are a person's mistake: one line of cause and cure."""

from __future__ import annotations

import importlib
from types import ModuleType


class UsageError(Exception):
    """Something a person can put right: the message states the cause and the cure, in one line.

    The launcher prints it and exits with code 2. Mistakes in a model's own description raise
    ordinary ``TypeError`` and ``ValueError``; this class is for what is outside the model: files,
    data, run directories, missing extras, a loss that is no longer finite.
    """


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or says which extra to install.

    Args:
      module: the dotted name of a module that only one feature needs.
      extra: the extra in setup.cfg that brings it.

    Returns:
      The module.

    Raises:
      UsageError: if the module cannot be found.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split('.')[0] != module.split('.')[0]:
            raise
        raise UsageError(f'{module} is not installed: pip install "layercomb[{extra}]"') from None
