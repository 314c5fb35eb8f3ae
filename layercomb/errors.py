"""Errors that are a person's mistake: one line of cause and cure."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from types import ModuleType


class UsageError(Exception):
    """Something a person can put right: the message states the cause and the cure, in one line.

    The launcher prints it and exits with code 2. Mistakes in a model's own description raise
    ordinary ``TypeError`` and ``ValueError``; this class is for what is outside the model: files,
    data, run directories, missing extras, a loss that is no longer finite.
    """


class UsageWarning(UserWarning):
    """Something a person should look at, of which a run may be right all the same.

    The launcher prints its message in one line.
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


@contextlib.contextmanager
def of_the_machine(cure: str) -> Iterator[None]:
    """Turns what the operating system refuses, such as a write to a full disk, into a UsageError.

    Args:
      cure: what a person can do about it.

    Raises:
      UsageError: for an OSError, and for the ValueError that TensorStore makes of one. A closed
        pipe is no error of the machine and stays as it is.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as e:
        raise UsageError(f'{_refusal(e)}: {cure}') from e


@contextlib.contextmanager
def of_the_person() -> Iterator[None]:
    """Turns errors of construction, where all values are a person's, into a UsageError of one line.

    Raises:
      UsageError: for what wrong values, names and types raise, with our notes of where it was.
    """
    try:
        yield
    except (UsageError, BrokenPipeError):
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, OSError) as e:
        notes = [n for n in getattr(e, '__notes__', ()) if n.startswith('in ')]
        where = f' ({", ".join(notes)})' if notes else ''
        raise UsageError(f'{one_line(e)}{where}') from e


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing.

    >>> one_line(ValueError('too long\\nby far')), one_line(KeyError('no such name'))
    ('too long', 'no such name')
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), '')
    return first or type(error).__name__


def _refusal(error: OSError | ValueError) -> str:
    """What the operating system said; an error of another origin is raised again."""
    if isinstance(error, OSError):
        where = f' ({error.filename})' if error.filename else ''
        return (error.strerror or str(error) or type(error).__name__).splitlines()[0] + where
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        raise error
    return os.strerror(int(code[1]))
