"""Imports point one way, and `import layercomb` brings nothing heavy along."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import layercomb

ROOT = Path(layercomb.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))

# Each floor may import from those below it, and from itself; a name may be a package or a module.
FLOORS = [
    {'version', 'errors', 'paths', 'checks', 'methods', 'shapes', 'trees', 'gin_configs'},
    {'layers'},
    {'checkpoints', 'transforms'},
    {'losses'},
    {'model', 'models'},
    {'summary', 'capture', 'testing'},
    {'data', 'optimizers', 'parallel', 'interop', 'supervised'},
    {'export', 'serving'},
    {'launcher'},
    {'cli', '__main__'},
]

# Rooms of layers/, each of which may import from those in floors below it, and from itself.
ROOMS = [
    {'core', 'facts', 'state'},
    {'combinators', 'decoding'},
    {'quantized'},
    {'basic'},
    {'metrics', 'positions'},
    {'reversible'},
    {'attention'},
    {'sparse'},
]

HEAVY = [
    'tensorflow', 'tensorflow_datasets', 'grain', 'orbax', 'gin', 'matplotlib', 'tensorboardX',
    'optax', 'torch', 'tqdm', 'sentencepiece', 'tokenizers', 'safetensors', 'pandas', 'starlette',
    'uvicorn', 'flatbuffers', 'gguf', 'jinja2', 'pyarrow', 'datasets',
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, inside `if` and `try` too."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            todo += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
            todo += [n for h in getattr(node, 'handlers', ()) for n in h.body]


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The full names of what import statements import, modules and names in them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'imports are absolute'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def floor(name: str) -> tuple[int, int]:
    _, part, *inside = name.split('.')
    of_room = -1
    if part == 'layers' and inside:
        of_room = next(i for i, rooms in enumerate(ROOMS) if inside[0] in rooms)
    elif part == 'layers':
        of_room = len(ROOMS)  # the names of all layers
    return next(i for i, parts in enumerate(FLOORS) if part in parts), of_room


def is_ours(name: str) -> bool:
    return name.startswith('layercomb.')


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = module_name(path)
    if name == 'layercomb':
        return
    here = floor(name)
    for other in filter(is_ours, imported(top_level(ast.parse(path.read_text())))):
        part = other.split('.')[1]
        known = any(part in parts for parts in FLOORS)
        assert known, f'{name} takes {part} from the package: import it from where it is defined'
        assert floor(other) <= here, f'{name} imports {other}, which stands above it'


def test_modules_do_not_import_each_other_in_a_circle():
    names = {module_name(p) for p in FILES}
    edges = {}
    for path in FILES:
        name = module_name(path)
        found = filter(is_ours, imported(top_level(ast.parse(path.read_text()))))
        modules = {n if n in names else n.rpartition('.')[0] for n in found}
        edges[name] = {m for m in modules if m in names and m not in (name, 'layercomb')}
    done: set[str] = set()
    while edges:
        free = [n for n, needs in edges.items() if needs <= done]
        assert free, f'a circle among {sorted(edges)}'
        done.update(free)
        for n in free:
            del edges[n]


def needed(name: str) -> set[str]:
    """The modules of the library that a module imports, and those that these import."""
    names = {module_name(p): p for p in FILES}
    found, todo = set(), [name]
    while todo:
        here = todo.pop()
        for other in filter(is_ours, imported(top_level(ast.parse(names[here].read_text())))):
            module = other if other in names else other.rpartition('.')[0]
            if module in names and module not in found:
                found.add(module)
                todo.append(module)
    return found


def test_a_dense_layer_needs_no_attention():
    found = needed('layercomb.layers.basic.dense')
    rooms = {name.split('.')[2] for name in found if name.startswith('layercomb.layers.')}
    assert rooms <= {'core', 'facts', 'state', 'combinators', 'decoding', 'quantized', 'basic'}


def test_only_the_launcher_knows_gin():
    for path in FILES:
        found = imported(ast.walk(ast.parse(path.read_text())))
        if any(name.split('.')[0] == 'gin' for name in found):
            assert path.name == 'cli.py', f'{path.name} imports gin'


def test_importing_brings_nothing_heavy():
    code = (
        'import sys; import jax; before = set(sys.modules); import layercomb; '
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    brought = done.stdout.split()
    assert 'layercomb' in brought
    assert 'layercomb_kernels' in brought  # later, JAX would compile again what it has compiled
    assert not set(brought) & set(HEAVY)
