"""How the library is built: sizes, docstrings, and who reaches into whom, beside the goals.

python benchmarks/house.py [--root .] [--json] [--check]

It reads source files only: neither JAX nor the library is imported. Each measure is defined in the
docstring of the function that takes it. A line of code is one that holds a token of code: neither a
comment nor a docstring, and not blank.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import io
import itertools
import json
import math
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)
LAYOUT = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
)  # fmt: skip

LONG_FUNCTION, LONG_FILE = 50, 400


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a measure should be: at most, or at least, a number."""

    what: str
    measure: str
    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a figure meets the goal."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f'at {"least" if self.at_least else "most"} {self.limit:g}'


GOALS = [
    Goal('files in one folder of the library', 'widest_folder', 16),
    Goal('files in one folder of the tests', 'widest_folder_of_tests', 16),
    Goal('private names used across modules', 'n_private', 0),
    Goal('lines of code of a function, 90th percentile', 'p90', 20),
    Goal('lines of code of the longest function', 'longest', LONG_FUNCTION),
    Goal('lines of docstring per line of public code', 'docstrings', 0.6, at_least=True),
    Goal('lines of code of layers/core', 'core', 500),
    Goal('lines of code of layers/core/layer.py', 'base', 120),
]


@dataclasses.dataclass(frozen=True)
class File:
    """A source file.

    Attributes:
      path: where it is.
      module: its dotted name, `layercomb.data.pairs`; a package's is that of its folder.
    """

    path: Path
    module: str

    @functools.cached_property
    def text(self) -> str:
        """What is in it."""
        return self.path.read_text(encoding='utf-8')

    @functools.cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.text)

    @functools.cached_property
    def docstrings(self) -> dict[ast.AST, range]:
        """The lines of the docstring of the module and of each class and function."""
        return {
            node: range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.Module, *SCOPES)) and ast.get_docstring(node, clean=False)
        }

    @functools.cached_property
    def code(self) -> frozenset[int]:
        """The numbers of its lines of code; all lines of a text that is no docstring are."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        held = (range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in LAYOUT)
        return frozenset(itertools.chain(*held)).difference(*self.docstrings.values())

    @property
    def is_package(self) -> bool:
        """Whether it is an `__init__.py`."""
        return self.path.stem == '__init__'

    @property
    def folder(self) -> str:
        """The dotted name of the package that holds it."""
        return self.module if self.is_package else self.module.rpartition('.')[0]

    @property
    def room(self) -> str:
        """The package that holds it; a module at the top of the library is a room of its own."""
        return self.folder if '.' in self.folder else self.module

    def n_code(self, node: ast.AST) -> int:
        """The lines of code of a class or function, its decorators and what is in it included."""
        return len(self.code.intersection(span(node)))


def span(node: ast.AST) -> range:
    """The lines of a class or function, its decorators included."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return range(first, node.end_lineno + 1)


@dataclasses.dataclass(frozen=True)
class Import:
    """One module of the library that another names in an import statement.

    Attributes:
      source, target: the modules that import and are imported.
      name: what is taken from the target; '' for the module itself.
      alias: what the source calls it.
      inside: whether the statement stands in a function.
    """

    source: str
    target: str
    name: str
    alias: str
    inside: bool


def files_of(root: Path) -> list[File]:
    """The source files of a package, by path."""
    made = []
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root.parent).with_suffix('').parts
        made.append(File(path, '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)))
    return made


def functions(file: File) -> Iterator[tuple[str, int]]:
    """Each function of a file, methods and nested ones too: its name and its lines of code.

    A function's lines are those from its first decorator to its end, without its docstring; those
    of a function inside it are counted for both.
    """
    for name, node in definitions(file.tree):
        if isinstance(node, FUNCTIONS):
            yield f'{file.module}.{name}', file.n_code(node)


def definitions(tree: ast.AST, prefix: str = '') -> Iterator[tuple[str, ast.AST]]:
    """The classes and functions in a module, with their dotted names in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, SCOPES):
            yield prefix + node.name, node
            yield from definitions(node, f'{prefix}{node.name}.')
        else:
            yield from definitions(node, prefix)


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore, `__init__` and its like apart."""
    return name.startswith('_') and not (name.startswith('__') and name.endswith('__'))


def documentation(file: File) -> tuple[int, int]:
    """The lines of docstrings of what is public, and the lines of public code.

    Public are classes and functions at the top of a module, and methods, whose names begin with no
    underscore, but for special methods. Code is theirs, that of private methods left out. The
    docstring of the module counts too; blank lines of a docstring do not.
    """
    lines = file.text.splitlines()
    public, private = set(), set()
    shown = [file.docstrings.get(file.tree, range(0))]
    for name, node in definitions(file.tree):
        if any(map(is_private, name.split('.'))):
            private.update(span(node))
        else:
            public.update(span(node))
            shown.append(file.docstrings.get(node, range(0)))
    n_shown = sum(bool(lines[n - 1].strip()) for n in itertools.chain(*shown))
    return n_shown, len(file.code & (public - private))


def n_any(file: File) -> int:
    """How often a file says `Any`, its import apart."""
    names = (node for node in ast.walk(file.tree) if isinstance(node, (ast.Name, ast.Attribute)))
    return sum('Any' in (getattr(n, 'id', ''), getattr(n, 'attr', '')) for n in names)


def imports(files: list[File]) -> list[Import]:
    """The imports of one module of the library by another, relative ones apart.

    `from package import module` imports the module. Whatever runs at import time, under `if` and
    `try` too, is at the top level.
    """
    modules = {file.module for file in files}
    made = []
    for file in files:
        inside = {
            id(node)
            for scope in ast.walk(file.tree)
            if isinstance(scope, (*FUNCTIONS, ast.Lambda))
            for node in ast.walk(scope)
        }
        for node in ast.walk(file.tree):
            for target, name, alias in imported(node, modules):
                if target != file.module:
                    made.append(Import(file.module, target, name, alias, id(node) in inside))
    return made


def imported(node: ast.AST, modules: set[str]) -> Iterator[tuple[str, str, str]]:
    """The module, the name in it, and the alias, of what one statement imports of the library."""
    if isinstance(node, ast.Import):
        found = [(n.name, '', n.asname or n.name) for n in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        found = [
            (f'{node.module}.{n.name}', '', n.asname or n.name)
            if f'{node.module}.{n.name}' in modules
            else (str(node.module), n.name, n.asname or n.name)
            for n in node.names
        ]
    else:
        found = []
    return (each for each in found if each[0] in modules)


def private_names(files: list[File], found: list[Import]) -> list[str]:
    """Private names of one module that another uses: ``from x import _y``, and ``x._y``.

    `x` is a module, or a class or function imported from one. A module whose own name is private
    counts too. For other objects see `private_attributes`.
    """
    made = []
    for each in found:
        names = [each.name, each.target.rpartition('.')[2]]
        made += [f'{each.source}: {each.target}.{n}'.rstrip('.') for n in names if is_private(n)]
    for file in files:
        ours = (i for i in found if i.source == file.module)
        known = {i.alias: f'{i.target}.{i.name}'.rstrip('.') for i in ours}
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                target = known.get(ast.unparse(node.value))
                made += [f'{file.module}: {target}.{node.attr}'] * (target is not None)
    return sorted(set(made))


def private_attributes(files: list[File]) -> list[str]:
    """Private attributes of objects that a module uses and another one defines.

    A module defines the names of its classes and functions, and all that it assigns to. So a base
    class's private method that a subclass elsewhere calls is found, and one of another library's
    is not.
    """
    defined = {file.module: set(assigned(file.tree)) for file in files}
    everywhere = set().union(*defined.values())
    return sorted(
        {
            f'{file.module}: {ast.unparse(node)}'
            for file in files
            for node in ast.walk(file.tree)
            if isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and node.attr in everywhere - defined[file.module]
        }
    )


def assigned(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines or assigns to, attributes too."""
    for node in ast.walk(tree):
        if isinstance(node, SCOPES):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def mutual(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs that stand in both orders."""
    known = set(pairs)
    return sorted((a, b) for a, b in known if a < b and (b, a) in known)


def back_and_forth(files: list[File], found: list[Import]) -> dict[str, list[list[str]]]:
    """Pairs of modules, and of rooms, each of which imports the other.

    A room is a folder of the library; a module at its top is a room of its own. `top` are pairs
    whose imports are all at the top level, `inside` those that need one in a function.
    """
    room = {file.module: file.room for file in files}
    made = {}
    for kind, name in (('modules', lambda m: m), ('rooms', room.__getitem__)):
        pairs = [(name(i.source), name(i.target), i.inside) for i in found]
        top = mutual((a, b) for a, b, inside in pairs if not inside)
        every = mutual((a, b) for a, b, _ in pairs)
        made[f'{kind}_top'] = [list(pair) for pair in top]
        made[f'{kind}_inside'] = [list(pair) for pair in every if pair not in top]
    return made


def percentile(values: list[int], share: float) -> int:
    """The least value that so large a share of the values does not exceed; 0 of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0


def sizes(files: list[File]) -> dict[str, Any]:
    """The figures of some files: how many, their functions, code, docstrings and `Any`.

    `docstrings` is lines of docstring per line of public code, see `documentation`; `any` is how
    often `Any` stands in a hundred lines of code; `p50`, `p90` and `longest` are lines of code of
    functions.
    """
    lengths = [n for file in files for _, n in functions(file)]
    n_code = sum(len(file.code) for file in files)
    shown, public = map(sum, zip(*map(documentation, files), strict=True))
    return {
        'files': len(files),
        'functions': len(lengths),
        'code': n_code,
        'docstrings': round(shown / max(1, public), 2),
        'any': round(100 * sum(map(n_any, files)) / max(1, n_code), 1),
        'p50': percentile(lengths, 0.5),
        'p90': percentile(lengths, 0.9),
        'longest': max(lengths, default=0),
    }


def widest(root: Path) -> tuple[int, str]:
    """The greatest number of source files that lie in one folder, and that folder."""
    folders = [p for p in (root, *root.rglob('*')) if p.is_dir()]
    counts = [(len(list(p.glob('*.py'))), p.relative_to(root.parent).as_posix()) for p in folders]
    return max(counts, default=(0, ''))


def measured(root: Path, name: str = 'layercomb') -> dict[str, Any]:
    """All measures of the library `name` and of the tests beside it.

    Args:
      root: the folder that holds both.
      name: of the package.
    """
    files = files_of(root / name)
    found = imports(files)
    private = private_names(files, found)
    core = [file for file in files if file.folder == f'{name}.layers.core']
    every = [(n, where) for file in files for where, n in functions(file)]
    folders = sorted({file.folder for file in files})
    whole = sizes(files)
    wide, wide_tests = widest(root / name), widest(root / 'tests')
    return {
        'whole': whole,
        'packages': {f: sizes([x for x in files if x.folder == f]) for f in folders},
        'widest_folder': wide[0],
        'widest_folder_of_tests': wide_tests[0],
        'widest_folders': [wide[1], wide_tests[1]],
        'n_private': len(private),
        'private': private,
        'private_attributes': private_attributes(files),
        'p90': whole['p90'],
        'longest': whole['longest'],
        'long_functions': [list(f) for f in sorted(every, reverse=True) if f[0] > LONG_FUNCTION],
        'long_files': long_files([*files, *files_of(root / 'tests')]),
        'docstrings': whole['docstrings'],
        'back_and_forth': back_and_forth(files, found),
        'core': sum(len(file.code) for file in core),
        'base': sum(len(file.code) for file in core if file.path.name == 'layer.py'),
    }


def long_files(files: list[File]) -> list[list[Any]]:
    """Files of more than 400 lines, of any kind, the longest first."""
    counts = [[len(file.text.splitlines()), file.module] for file in files]
    return sorted((c for c in counts if c[0] > LONG_FILE), reverse=True)


def missed(figures: dict[str, Any]) -> list[Goal]:
    """The goals that the figures do not meet."""
    return [goal for goal in GOALS if not goal.holds(figures[goal.measure])]


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    columns = list(figures['whole'])
    print(f'{"package":34}' + ''.join(f'{c:>11}' for c in columns))
    for name, row in {**figures['packages'], 'all': figures['whole']}.items():
        print(f'{name:34}' + ''.join(f'{row[c]:>11}' for c in columns))
    print()
    for goal in GOALS:
        value = figures[goal.measure]
        verdict = '' if goal.holds(value) else '  MISSED'
        print(f'{goal.what:46}{value:>8}  ({goal}){verdict}')
    print('widest folders:', *figures['widest_folders'])
    for title, rows in (
        ('private names used across modules', figures['private']),
        ('private attributes that another module defines', figures['private_attributes']),
        (f'functions of over {LONG_FUNCTION} lines of code', figures['long_functions']),
        (f'files of over {LONG_FILE} lines', figures['long_files']),
        *((f'back and forth, {k}', pairs) for k, pairs in figures['back_and_forth'].items()),
    ):
        print(f'\n{title}: {len(rows)}')
        for row in rows:
            print('  ' + (row if isinstance(row, str) else '  '.join(map(str, row))))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument('--json', action='store_true', help='print all figures as JSON')
    parser.add_argument('--check', action='store_true', help='exit with 1 if a goal is missed')
    options = parser.parse_args()
    figures = measured(options.root)
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures)
    return int(options.check and bool(missed(figures)))


if __name__ == '__main__':
    sys.exit(main())
