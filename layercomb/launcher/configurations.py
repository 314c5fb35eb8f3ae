"""Configurations: a gin file and further bindings, parsed, and what they describe."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError, machine_errors, one_line, usage_errors
from layercomb.launcher import includes, runs, terminal


class Config:
    """A parsed configuration, valid while its context is open.

    Args:
      gin: the module.
      train: makes the experiment; configurations bind its arguments.

    Attributes:
      text: the bindings, as gin writes them.
    """

    def __init__(self, gin: Any, train: Callable[..., Any]) -> None:
        self._gin, self._train = gin, train
        self.text: str = includes.written(gin, gin.config_str)

    def bind(self, text: str) -> None:
        """Adds bindings, or replaces earlier ones.

        Args:
          text: lines of them, of names that the configuration imports.
        """
        with self._gin.unlock_config(), usage_errors():
            self._gin.parse_config(text)
        self.text = includes.written(self._gin, self._gin.config_str)

    def build(self) -> Any:
        """Builds the experiment.

        Raises:
          UsageError: if the configuration does not bind `train`, or a value in it is wrong.
        """
        with usage_errors():
            try:
                make = self._gin.get_configurable(self._train)
            except KeyError:
                raise UsageError(
                    'the configuration trains nothing: write "from layercomb import cli" and bind '
                    'cli.train.model and cli.train.train_task'
                ) from None
            return make()

    def write(self, directory: Path) -> None:
        """Writes the bindings, by which runs are compared, and the operative configuration.

        The latter also has the defaults of everything built so far.

        Args:
          directory: the run's directory, which must exist.
        """
        runs.write_text(directory / runs.CONFIG, self.text)
        operative = includes.written(self._gin, self._gin.operative_config_str)
        runs.write_text(directory / runs.OPERATIVE, operative)

    def value(self, name: str) -> Any:
        """Builds one argument of `train`, without the others.

        Args:
          name: of the argument.

        Returns:
          Its value; None if it is not bound.
        """
        with usage_errors():
            try:
                value = self._gin.query_parameter(f'cli.train.{name}')
            except ValueError:
                return None
            made = getattr(value, 'scoped_configurable_fn', None)
            return made() if made is not None else value


@contextlib.contextmanager
def configured(
    gin: Any,
    train: Callable[..., Any],
    text: str,
    bindings: Sequence[str],
    name: str,
    file: Path | None = None,
) -> Iterator[Config]:
    """Parses a configuration and then further bindings, such as ``train.steps=100``.

    Args:
      gin: the module; only the launcher imports it.
      train: makes the experiment; configurations bind its arguments.
      text: the configuration.
      bindings: bindings that override it; their includes are looked for in the working directory.
      name: what messages call it.
      file: its path; included files are looked for beside it.

    Raises:
      UsageError: if something in it is unknown, or does not parse.
    """
    parser = includes.Includes(gin)
    with includes.alone(gin):
        with _parsing(f'in {name}'):
            parser.parse(text, file or Path(name))
        for binding in bindings:
            with _parsing(f'in --gin_param {binding!r}'):
                terminal.check_text(binding, '--gin_param')
                imports = parser.imports
                try:
                    parser.parse(binding, Path('--gin_param'))
                except ValueError:  # a name that the file does not use needs the file's imports
                    if "doesn't have a parameter" in str(sys.exc_info()[1]):
                        raise
                    parser.parse(f'{imports}\n{binding}', Path('--gin_param'))
        gin.finalize()
        yield Config(gin, train)


@contextlib.contextmanager
def _parsing(where: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        where = includes.place(e) or where
        raise UsageError(f'{one_line(e)} ({where}){_nearest(e)}') from e


def find_config(name: str) -> Path:
    """The path of a configuration.

    Args:
      name: a path, or the name of a configuration that comes with the library.

    Raises:
      UsageError: if there is none, listing those of the library.
    """
    known = includes.library()
    stem = name.removesuffix('.gin')
    with machine_errors('check the path'):
        if stem in known and not Path(name).is_file():
            return known[stem]
        path = paths.local(name, 'config')
        if path.is_file():
            return path
    raise UsageError(
        f'no configuration {name!r}: give the path of a .gin file, or one of {", ".join(known)}'
    )


def _nearest(error: BaseException) -> str:
    """': did you mean …?' for a misspelt name of a module, a layer or a parameter."""
    text = str(error)
    if 'was not provided by an import' in text:
        return ': write the name in full, as the file does, e.g. models.TransformerLM'
    attribute = re.search(r"<module '([\w.]+)'.*> has no attribute (\w+)", text)
    if attribute is None:
        return ''
    names = [n for n in dir(sys.modules[attribute[1]]) if not n.startswith('_')]
    close = difflib.get_close_matches(attribute[2], names, n=3)
    return f': did you mean {" or ".join(close)}?' if close else f': there are {", ".join(names)}'
