"""``include 'base.gin'`` in a configuration: the file beside the one that includes it.

Gin itself would look in the working directory, which may hold another file of that name.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError
from layercomb.launcher import runs


class Includes:
    """Parses configurations and what they include.

    Args:
      gin: the module; only the launcher imports it.
    """

    def __init__(self, gin: Any) -> None:
        self._gin = gin
        self._open: list[Path] = []
        self._texts: list[str] = []

    def parse(self, text: str, file: Path) -> None:
        """Parses a configuration as if it were the content of `file`.

        Args:
          text: the configuration.
          file: its path, which need not exist; included files are looked for beside it.

        Raises:
          UsageError: if an included file is missing, or includes itself.
        """
        config = self._gin.config
        own, config.parse_config_file = config.parse_config_file, self._include
        self._open = [file]
        self._texts.append(text)
        try:
            self._gin.parse_config(text)
        finally:
            config.parse_config_file = own

    @property
    def imports(self) -> str:
        """The import lines of all parsed files; the outermost file's come last, and so win."""
        lines = [line for text in reversed(self._texts) for line in _IMPORT.findall(text)]
        return '\n'.join(
            sorted(dict.fromkeys(lines), key=lambda x: not x.startswith('from __gin__'))
        )

    def _include(self, name: str, skip_unknown: Any = False, *_: Any) -> Any:
        """Parses an included file; gin calls it with the file's name."""
        file = _find(name, self._open[-1])
        chain = [path.resolve() for path in self._open]
        if file.resolve() in chain:
            names = [path.name for path in (*chain[chain.index(file.resolve()) :], file)]
            raise UsageError(f'{" includes ".join(names)}: take one of these includes out')
        source = _Named(runs.read_text(file))
        source.name = str(file)
        self._texts.append(source.getvalue())
        self._open.append(file)
        includes, imports = self._gin.parse_config(source, skip_unknown)
        self._open.pop()
        return self._gin.config.ParsedConfigFileIncludesAndImports(str(file), imports, includes)


@contextlib.contextmanager
def alone(gin: Any) -> Iterator[None]:
    """Restores gin afterwards, so that a configuration does not depend on those read before it.

    Gin never forgets a registered name. A later configuration, in a notebook for instance, would
    find it by a part of its name, without importing it, or instead of its own macro.

    Args:
      gin: the module.
    """
    config = gin.config
    named, constants = dict(config._REGISTRY.items()), dict(config._CONSTANTS.items())
    own, config.ParseContext.process_import = (
        config.ParseContext.process_import,
        _noting_constants(config.ParseContext.process_import, config._CONSTANTS),
    )
    gin.clear_config()
    try:
        yield
    finally:
        config.ParseContext.process_import = own
        gin.clear_config()
        for name, made in list(config._REGISTRY.items()):
            if name not in named and made.import_source is not None:  # keeps decorated functions
                config._REGISTRY.pop(name)
                config._INVERSE_REGISTRY.pop(made.wrapped, None)
        for name in {name for made in _constants.values() for name in made} - constants.keys():
            if name in config._CONSTANTS:
                config._CONSTANTS.pop(name)


_constants: dict[str, dict[str, Any]] = {}  # gin constants by module, made when it was imported


def _noting_constants(process_import: Any, constants: Any) -> Any:
    """Gin's `process_import`, which also restores the constants of a module imported earlier."""

    def noting(context: Any, statement: Any) -> None:
        before, loaded = dict(constants.items()), set(sys.modules)
        process_import(context, statement)
        made = {name: value for name, value in constants.items() if name not in before}
        if made:  # by this module, or by one that it imports
            for module in {statement.module} | (set(sys.modules) - loaded):
                _constants.setdefault(module, {}).update(made)
        for name, value in _constants.get(statement.module, {}).items():
            if name not in constants:
                constants[name] = value

    return noting


def written(gin: Any, write: Callable[[], str]) -> str:
    """The text that gin writes of a configuration, with imports in an order that gin can read.

    Gin sorts imports by ASCII, so a module in capitals comes before ``__gin__``. It then refuses
    its own text, since ``__gin__`` must come first.

    Args:
      gin: the module.
      write: a function of gin's that returns the text, such as ``gin.config_str``.
    """
    manager = gin.config.ImportManager
    own = manager.sorted_imports

    def order(statement: Any) -> tuple[bool, str]:
        return not statement.module.startswith('__gin__.'), statement.module

    manager.sorted_imports = property(lambda self: sorted(self.imports, key=order))
    try:
        return write()
    finally:
        manager.sorted_imports = own


def library() -> dict[str, Path]:
    """The configurations that come with the library, by name."""
    folder = Path(str(importlib.resources.files('layercomb.gin_configs')))
    return {path.stem: path for path in sorted(folder.glob('*.gin'))}


def meshes() -> dict[str, Path]:
    """The meshes that come with the library, to be included after an experiment: mesh/fsdp …"""
    folder = Path(str(importlib.resources.files('layercomb.gin_configs.mesh')))
    return {f'mesh/{path.stem}': path for path in sorted(folder.glob('*.gin'))}


def place(error: BaseException) -> str:
    """The place of an error in an included file: 'in line 3 of /path/base.gin'; '' if unknown."""
    found = re.search(r'In file "([^"]*)", line (\d+)', str(error))
    if found is None and isinstance(error, SyntaxError) and error.filename:
        return f'in line {error.lineno} of {error.filename}'
    return '' if found is None else f'in line {found[2]} of {found[1]}'


_IMPORT = re.compile(r'^(?:from|import) .*$', re.MULTILINE)


class _Named(io.StringIO):
    """A text with a file name, which gin shows in messages."""

    name: str


def _find(name: str, includer: Path) -> Path:
    """The file that an `include` means: beside the including file, else one of the library."""
    file = paths.local(name, 'include', includer.parent)
    if file.is_file():
        return file
    known = {**library(), **meshes()}
    if name.removesuffix('.gin') in known:
        return known[name.removesuffix('.gin')]
    raise UsageError(
        f'{includer.name} includes {name!r}, and there is no file {str(file)!r}: check its path, '
        f'which goes from {str(includer.parent)!r}, or name one of {", ".join(known)}'
    )
