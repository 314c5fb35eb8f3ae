"""What is installed: an editable installation would hide what setup.cfg forgets."""

import configparser
from pathlib import Path

import pytest

import layercomb

ROOT = Path(layercomb.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / 'setup.cfg').is_file(), reason='setup.cfg is in the repository alone'
)


@pytest.fixture(scope='module')
def setup():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / 'setup.cfg')
    return parsed


def test_every_package_is_listed(setup):
    found = [
        path.parent.relative_to(ROOT)
        for name in ('layercomb', 'layercomb_kernels')
        for path in (ROOT / name).rglob('__init__.py')
    ]
    folders = {'.'.join(path.parts) for path in found}
    renamed = dict(
        map(str.strip, line.split('='))
        for line in setup['options']['package_dir'].split('\n')
        if line
    )
    listed = setup['options']['packages'].split()
    assert sorted(listed) == sorted(folders | set(renamed))
    for folder in renamed.values():
        assert (ROOT / folder / '__init__.py').is_file()


def test_every_python_file_is_in_a_package(setup):
    for path in (ROOT / 'layercomb').rglob('*.py'):
        assert (path.parent / '__init__.py').is_file(), path


def test_data_is_declared(setup):
    declared = dict(setup['options.package_data'])
    assert declared == {
        'layercomb': 'py.typed',
        'layercomb.gin_configs': '*.gin',
        'layercomb.serving': 'page.html',
        'layercomb_kernels': '*.cc, *.h',
    }
    assert (ROOT / 'layercomb' / 'py.typed').is_file()
    assert list((ROOT / 'gin_configs').glob('*.gin'))
    folders = [path.parent for path in (ROOT / 'gin_configs').rglob('*.gin')]
    assert set(folders) == {ROOT / 'gin_configs'}, 'the pattern *.gin reaches no folder below'
