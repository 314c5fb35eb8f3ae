"""Kernels that a wheel brings: which of them a machine takes, and that a wheel with them works."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest

import layercomb_kernels as kernels
from layercomb_kernels import build, library, packaged

ROOT = Path(kernels.__file__).resolve().parents[1]
WIDE, MIDDLE, ARM = packaged.LEVELS
PRODUCT = 'import numpy as np, jax, layercomb_kernels as k; x = np.ones((2, 8), np.float32); '
PRODUCT += 'print(k.row_products(x, x, np.zeros((0, 0), np.float32))[0, 0], k.why_not())'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package whose libraries are empty files, on an Intel machine."""
    monkeypatch.setattr(packaged, 'FOLDER', tmp_path / 'built')
    monkeypatch.setattr(packaged.platform, 'machine', lambda: 'x86_64')
    packaged.FOLDER.mkdir()
    for level in (WIDE, MIDDLE):
        level.path(packaged.FOLDER).write_bytes(b'')
    (packaged.FOLDER / 'about.json').write_text(json.dumps({'interface': packaged.interface()}))
    return packaged.FOLDER


def test_the_interface_is_that_of_jaxlib():
    major, minor = packaged.interface()
    header = Path(jax.ffi.include_dir(), 'xla/ffi/api/c_api.h').read_text()
    assert f'XLA_FFI_API_MAJOR {major}\n' in header and f'XLA_FFI_API_MINOR {minor}\n' in header


def test_an_unknown_interface_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.ffi, 'include_dir', lambda: str(tmp_path))
    with pytest.raises(build.Unavailable, match=r'c_api\.h does not say which interface jaxlib'):
        packaged.interface()


def test_each_level_needs_what_its_flags_make_a_compiler_use():
    assert ARM.needs == frozenset() and ARM.machine == 'aarch64'
    assert MIDDLE.needs < WIDE.needs
    if sys.platform == 'linux' and build.tuned()[0] == '-march=native':
        assert 'fpu' in packaged.features()  # of all processors of this kind


@pytest.mark.parametrize(
    ('has', 'level'),
    [
        (WIDE.needs | {'amx_tile'}, WIDE),
        (WIDE.needs, WIDE),
        (WIDE.needs - {'avx512_bf16'}, MIDDLE),
        (MIDDLE.needs, MIDDLE),
    ],
)
def test_the_processor_chooses(folder, has, level):
    assert packaged.best(has) == level


def test_what_suits_no_processor_is_refused(folder, monkeypatch):
    said = r'are for x86-64-v4-vnni-bf16, x86-64-v3, and this processor is none: install a C\+\+'
    with pytest.raises(build.Unavailable, match=said):
        packaged.best(MIDDLE.needs - {'fma'})
    monkeypatch.setattr(packaged.platform, 'machine', lambda: 'arm64')
    with pytest.raises(build.Unavailable, match=said):
        packaged.best(WIDE.needs)
    ARM.path(folder).write_bytes(b'')
    assert packaged.best(frozenset()) == ARM


def test_a_level_that_is_not_packaged_is_not_taken(folder):
    WIDE.path(folder).unlink()
    assert packaged.best(WIDE.needs) == MIDDLE


@pytest.mark.parametrize(('major', 'minor', 'fits'), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_libraries_work_with_their_interface_and_newer_minor_ones(
    folder, monkeypatch, major, minor, fits
):
    here = packaged.interface()
    made_for = [here[0] + major, here[1] + minor]
    (folder / 'about.json').write_text(json.dumps({'interface': made_for}))
    monkeypatch.setattr(packaged, 'features', lambda: WIDE.needs)
    loaded = []
    monkeypatch.setattr(ctypes, 'CDLL', loaded.append)
    if fits:
        assert packaged.load()[1] == WIDE and loaded == [str(WIDE.path(folder))]
        (folder / 'about.json').write_text(json.dumps({'interface': [here[0], 0]}))
        assert packaged.load()[1] == WIDE
    else:
        said = f'for version {made_for[0]}.{made_for[1]} of the interface that jaxlib has in '
        with pytest.raises(build.Unavailable, match=f'{said}version {here[0]}.{here[1]}: install'):
            packaged.load()


def test_a_library_that_cannot_be_loaded(folder, monkeypatch):
    monkeypatch.setattr(packaged, 'features', lambda: WIDE.needs)
    with pytest.raises(build.Unavailable, match='the packaged kernels cannot be loaded: '):
        packaged.load()


def test_a_compiler_comes_first_and_both_reasons_are_told(folder, monkeypatch):
    monkeypatch.setattr(packaged, 'features', lambda: WIDE.needs)
    monkeypatch.setattr(build, '_COMPILERS', ('no-such-compiler',))
    with pytest.raises(build.Unavailable, match=r'^no C\+\+ compiler: .*; the packaged kernels ca'):
        library.load()
    monkeypatch.setattr(packaged.ctypes, 'CDLL', lambda path: path)
    found = library.load()
    assert found.path == WIDE.path(folder) and found.handlers == str(found.path)
    assert found.origin.startswith('packaged for x86-64-v4-vnni-bf16 (no C++ compiler: ')
    monkeypatch.setattr(build, 'load', lambda: 'made here')
    monkeypatch.setattr(build, 'library_path', lambda: Path('there.so'))
    assert library.load() == library.Library(
        'made here', Path('there.so'), 'compiled here for this processor'
    )


def test_switched_off_is_off_with_packaged_ones_too(folder, monkeypatch):
    monkeypatch.setenv(build.SWITCH, '0')
    with pytest.raises(build.Unavailable, match=r'^switched off by LAYERCOMB_KERNELS=0$'):
        library.load()


def test_kernels_that_jaxlib_refuses_are_no_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: version 0.0 is not supported\nat …')

    monkeypatch.setattr(jax.ffi, 'register_ffi_target', refuse)
    said = kernels._register.__wrapped__()
    if kernels.available():
        assert said == 'jaxlib refuses them: INVALID_ARGUMENT: version 0.0 is not supported'


def test_more_flags_are_part_of_the_library(monkeypatch):
    if not shutil.which('c++'):
        pytest.skip('no C++ compiler')
    usual = build.library_path()
    monkeypatch.setenv(build.FLAGS, "-DNOTHING='of note'")
    assert build._command(())[-1] == '-DNOTHING=of note'
    assert build.library_path() != usual
    monkeypatch.setenv(build.FLAGS, "'")
    with pytest.raises(build.Unavailable, match=r'^LAYERCOMB_KERNELS_FLAGS cannot be read: No clo'):
        build.library_path()


def test_a_machine_of_no_level(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged.platform, 'machine', lambda: 'riscv64')
    with pytest.raises(build.Unavailable, match='no kernels can be packaged for riscv64: make a w'):
        packaged.make(tmp_path / 'built')
    assert not (tmp_path / 'built').exists()


def environment(folder):
    """A new environment that sees the libraries of this one, but not layercomb."""
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    (site,) = folder.glob('lib/python*/site-packages')
    (site / 'theirs.pth').write_text(f'{Path(jax.__file__).parents[1]}\n')
    return folder / 'bin' / 'python'


def run(*command, **variables):
    kept = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', build.SWITCH)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=kept | variables, cwd='/'
    )
    assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / 'setup.py').is_file(), reason='setup.py is in the repository alone')
@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_a_wheel_with_kernels_works_without_a_compiler(tmp_path):
    source = tmp_path / 'source'
    ours = ('setup.*', 'pyproject.toml', 'README.md', 'LICENSE', 'layercomb*')
    for path in (found for pattern in ours for found in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, source / path.name)
        elif path.is_file():
            source.mkdir(exist_ok=True)
            shutil.copy(path, source)
    maker = environment(tmp_path / 'maker')
    run(maker, '-m', 'pip', 'install', '--ignore-installed', 'setuptools>=77')
    make = (maker, '-m', 'pip', 'wheel', source, '--no-build-isolation', '--no-deps', '-w')
    run(*make, tmp_path / 'with', LAYERCOMB_WHEEL_KERNELS='1')
    run(*make, tmp_path / 'without')
    (wheel,), (plain,) = ((tmp_path / name).glob('*.whl') for name in ('with', 'without'))
    levels = [x for x in packaged.LEVELS if x.machine == packaged._machine()]
    names = {f'layercomb_kernels/built/{x.path(Path()).name}' for x in levels}
    assert wheel.name.split('-py3-none-')[1] not in ('', 'any.whl')
    assert names < set(zipfile.ZipFile(wheel).namelist())
    assert plain.name.endswith('-py3-none-any.whl')  # nothing is left of the other
    assert not [x for x in zipfile.ZipFile(plain).namelist() if 'built' in x]

    user = environment(tmp_path / 'user')
    run(user, '-m', 'pip', 'install', '--no-deps', wheel)
    bare = {'PATH': str(user.parent), 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    said = run(user, '-m', 'layercomb_kernels', **bare)
    level = next(x for x in levels if x.needs <= packaged.features())
    assert f'packaged for {level.name} (no C++ compiler' in said
    assert run(user, '-c', PRODUCT, **bare).split() == ['8.0', 'None']
    assert not (tmp_path / 'cache').exists()
    said = run(user, '-m', 'layercomb_kernels', XDG_CACHE_HOME=str(tmp_path / 'cache'))
    assert said.strip().endswith('.so, compiled here for this processor')
    assert list((tmp_path / 'cache' / 'layercomb').glob('*.so'))
