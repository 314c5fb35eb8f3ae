"""``include 'base.gin'`` in a configuration: looked for beside the file that says it.

Gin would look in the directory of the process, where there may be another of that name.
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
      gin: the module, which the launcher alone imports.
    """

    def __init__(self, gin: Any) -> None:
        self._gin = gin
        self._open: list[Path] = []
        self._texts: list[str] = []

    def parse(self, text: str, file: Path) -> None:
        """Parses a text as if it stood in `file`, which need not be there.

        Raises:
          UsageError: if what is included is not there, or includes itself.
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
        """The imports of all that was parsed; where two give one name, the outer file's is last."""
        lines = [line for text in reversed(self._texts) for line in _IMPORT.findall(text)]
        return '\n'.join(
            sorted(dict.fromkeys(lines), key=lambda x: not x.startswith('from __gin__'))
        )

    def _include(self, name: str, skip_unknown: Any = False, *_: Any) -> Any:
        """What gin calls for a file by its name."""
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
    """Leaves gin as it was, so that a configuration means the same whatever was read before it.

    Gin keeps for good what one has named, and later ones, in a notebook for instance, would find it
    by parts of its name: without the import that they lack, or in place of a macro of their own.
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
            if name not in named and made.import_source is not None:  # not by a decorator of gin
                config._REGISTRY.pop(name)
                config._INVERSE_REGISTRY.pop(made.wrapped, None)
        for name in {name for made in _constants.values() for name in made} - constants.keys():
            if name in config._CONSTANTS:
                config._CONSTANTS.pop(name)


_constants: dict[str, dict[str, Any]] = {}  # what importing a module made, which happens but once


def _noting_constants(process_import: Any, constants: Any) -> Any:
    """Gin's `process_import`, after which a module's constants are there each time."""

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
    """What gin writes of a configuration, as gin can read it again.

    Gin sorts imports as ASCII does, where a module in capitals comes before ``__gin__``, and then
    refuses what it wrote, since its own imports must come first.
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


def place(error: BaseException) -> str:
    """Where in an included file an error of gin was: 'in line 3 of /path/base.gin', or ''."""
    found = re.search(r'In file "([^"]*)", line (\d+)', str(error))
    if found is None and isinstance(error, SyntaxError) and error.filename:
        return f'in line {error.lineno} of {error.filename}'
    return '' if found is None else f'in line {found[2]} of {found[1]}'


_IMPORT = re.compile(r'^(?:from|import) .*$', re.MULTILINE)


class _Named(io.StringIO):
    """A text that gin's messages call by the name of its file."""

    name: str


def _find(name: str, includer: Path) -> Path:
    """The file that an `include` means: beside the one that says it, or of the library."""
    file = paths.local(name, 'include', includer.parent)
    if file.is_file():
        return file
    known = library()
    if name.removesuffix('.gin') in known:
        return known[name.removesuffix('.gin')]
    raise UsageError(
        f'{includer.name} includes {name!r}, and there is no file {str(file)!r}: check its path, '
        f'which goes from {str(includer.parent)!r}, or name one of {", ".join(known)}'
    )
