"""The measures of how the library is built, on a toy of known figures, and on the library."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'house.py'

TOY = {
    'toy/__init__.py': '',
    'toy/top.py': '''
        """A module.

        In two lines that say something.
        """

        from typing import Any

        from toy.room import one, two
        from toy.room.one import Shown, _hidden  # a comment


        @one.decorated
        def function(x: Any) -> Any:
            """One line."""
            # a comment
            text = """no
            docstring"""

            def nested():
                return one._secret(text)

            return nested, two.late, Shown._made, x._kept


        def _private():
            return 1
        ''',
    'toy/room/__init__.py': '',
    'toy/room/one.py': '''
        import toy.other.three


        def _hidden():
            return toy.other.three._deep


        class Shown:
            """A class."""

            _kept = 1

            def method(self):
                return self._kept, self._kept_elsewhere
        ''',
    'toy/room/two.py': '''
        def late():
            """Imports what imports it."""
            from toy.room import one
            from toy.other import three
        ''',
    'toy/other/__init__.py': '',
    'toy/other/three.py': """
        from toy.room import two

        _deep = 2
        """,
    'tests/test_toy.py': 'x = 1\n' * 401,
}


@pytest.fixture(scope='module')
def house():
    spec = importlib.util.spec_from_file_location('house', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['house'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['house']


@pytest.fixture
def toy(tmp_path):
    for name, text in TOY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    return tmp_path


def test_lines_functions_and_docstrings(house, toy):
    (top,) = (f for f in house.files_of(toy / 'toy') if f.module == 'toy.top')
    assert len(top.code) == 12
    assert dict(house.functions(top)) == {
        'toy.top.function': 7,
        'toy.top.function.nested': 2,
        'toy.top._private': 2,
    }
    # The module's docstring has three lines that are not blank, the function's one.
    assert house.documentation(top) == (4, 7)
    assert house.n_any(top) == 2


def test_a_toy_is_measured(house, toy):
    figures = house.measured(toy, 'toy')
    assert figures['private'] == [
        'toy.room.one: toy.other.three._deep',
        'toy.top: toy.room.one.Shown._made',
        'toy.top: toy.room.one._hidden',
        'toy.top: toy.room.one._secret',
    ]
    assert figures['private_attributes'] == [
        'toy.room.one: toy.other.three._deep',
        'toy.top: x._kept',
    ]
    assert figures['back_and_forth'] == {
        'modules_top': [],
        'modules_inside': [['toy.other.three', 'toy.room.two']],
        'rooms_top': [['toy.other', 'toy.room']],
        'rooms_inside': [],
    }
    assert figures['widest_folder'] == 3 and figures['widest_folders'] == ['toy/room', 'tests']
    assert figures['long_files'] == [[401, 'tests.test_toy']]
    assert set(figures['packages']) == {'toy', 'toy.room', 'toy.other'}
    assert figures['whole']['files'] == 7 and figures['longest'] == 7


def test_private_names_are_a_goal_that_a_check_tells(toy):
    (toy / 'toy').rename(toy / 'layercomb')
    ask = [sys.executable, str(SCRIPT), '--root', str(toy)]
    assert subprocess.run([*ask, '--json'], capture_output=True, check=True).stdout
    assert subprocess.run([*ask, '--check'], capture_output=True).returncode == 1


@pytest.mark.parametrize('values', [[], [3], [1, 2], list(range(1, 11)), [5] * 7])
def test_percentiles(house, values):
    for share in (0.5, 0.9):
        least = [v for v in sorted(values) if sum(w <= v for w in values) >= share * len(values)]
        assert house.percentile(values, share) == (least[0] if values else 0)


def test_the_library_meets_its_goals(house):
    code = f'import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import house; house.main(); '
    code += "print('jax' in sys.modules, 'layercomb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, '-c', code, '--json'], capture_output=True, text=True, check=True
    )
    text, _, imported = done.stdout.rstrip().rpartition('\n')
    assert imported == 'False False'
    missed = {goal.measure for goal in house.missed(json.loads(text))}
    assert not missed
    assert not json.loads(text)['back_and_forth']['modules_top']
