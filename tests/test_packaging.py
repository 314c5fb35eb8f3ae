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


def test_packages_are_found_and_no_others(setup):
    assert setup['options']['packages'] == 'find:'
    wanted = setup['options.packages.find']['include'].split()
    assert wanted == ['layercomb', 'layercomb.*', 'layercomb_kernels']


def test_configurations_lie_at_the_top_for_readers():
    there = ROOT / 'gin_configs'
    assert there.is_symlink() and there.resolve() == ROOT / 'layercomb/gin_configs'


def test_every_python_file_is_in_a_package(setup):
    for path in (ROOT / 'layercomb').rglob('*.py'):
        assert (path.parent / '__init__.py').is_file(), path


def test_data_is_declared(setup):
    declared = dict(setup['options.package_data'])
    assert declared == {
        'layercomb': 'py.typed',
        'layercomb.data.corpora': '*.jsonl',
        'layercomb.gin_configs': '*.gin',
        'layercomb.gin_configs.mesh': '*.gin',
        'layercomb.serving': 'page.html',
        'layercomb_kernels': '*.cc, *.h',
    }
    assert (ROOT / 'layercomb' / 'py.typed').is_file()
    assert list((ROOT / 'layercomb/gin_configs').glob('*.gin'))
    folders = [path.parent for path in (ROOT / 'layercomb/gin_configs').rglob('*.gin')]
    top = ROOT / 'layercomb/gin_configs'
    assert set(folders) == {top, top / 'mesh'}, 'the pattern *.gin reaches no folder below'


def test_kernels_are_compiled_into_wheels_only_if_asked(setup):
    text = (ROOT / 'setup.py').read_text()
    assert "os.environ.get('LAYERCOMB_WHEEL_KERNELS', '0') == '1'" in text
    assert not (ROOT / 'layercomb_kernels' / 'built').exists()  # they are in the wheel alone
    jax = next(line for line in setup['options']['install_requires'].split('\n') if 'jax' in line)
    assert f"setup_requires=['{jax}']" in text
