"""Errors that the user can put right: one line of cause and cure."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from types import ModuleType


class UsageError(Exception):
    """A mistake that the user can put right; the message is one line of cause and cure.

    The launcher prints it and exits with code 2. Mistakes in the description of a model raise
    ``TypeError`` and ``ValueError``. This class is for everything outside the model: files, data,
    run directories, missing extras, a loss that is not finite.
    """


class UsageWarning(UserWarning):
    """Something the user should look at, although the run may be right.

    The launcher prints the message in one line.
    """


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or tells which extra to install.

    Args:
      module: the dotted name of a module that only one feature needs.
      extra: the extra in setup.cfg that installs it.

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
def machine_errors(cure: str, what: str = '') -> Iterator[None]:
    """Turns errors of the operating system, such as a full disk, into a UsageError.

    Args:
      cure: what the user can do about it.
      what: what could not be done, if the message should say so.

    Raises:
      UsageError: for an OSError, and for the ValueError that TensorStore raises for one. A
        BrokenPipeError is raised as it is.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as e:
        raise UsageError(f'{what and what + ": "}{_refusal(e)}: {cure}') from e


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns errors of code that handles the user's values only into a UsageError of one line.

    Raises:
      UsageError: for errors of wrong values, names and types, with the notes that say in which
        layer.
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
    """The first line of an error's message, or its class if it has no message.

    >>> one_line(ValueError('too long\\nby far')), one_line(KeyError('no such name'))
    ('too long', 'no such name')
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), '')
    return first or type(error).__name__


def _refusal(error: OSError | ValueError) -> str:
    """The message of the operating system; an error of another origin is raised again."""
    if isinstance(error, OSError):
        where = f' ({error.filename})' if error.filename else ''
        return (error.strerror or str(error) or type(error).__name__).splitlines()[0] + where
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        raise error
    return os.strerror(int(code[1]))
