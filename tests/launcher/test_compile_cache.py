"""Where compiled programs are kept, and that nothing about it is ever an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from layercomb import cli
from layercomb.launcher import compile_cache

PROGRAM = """
import jax, jax.numpy as jnp
from layercomb.launcher import compile_cache
with compile_cache.kept():
    print(float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(5.0))))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def run(tmp_path):
    """Runs the program in a process of its own; gives what it printed, and warnings are errors."""

    def run(**environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
        own = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)}
        command = [sys.executable, '-W', 'error', '-c', PROGRAM]
        done = subprocess.run(
            command, env={**inherited, **own, **environment},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ''
        return done.stdout.split()

    return run


def entries(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob('*-cache')}


def test_small_programs_too_are_kept_and_found(run, tmp_path):
    home = {'XDG_CACHE_HOME': str(tmp_path)}
    first = run(**home)
    there = entries(tmp_path / 'layercomb' / 'compiled')
    assert there and first[1] == 'None'
    assert run(**home) == first and entries(tmp_path) == there


def test_damaged_entries_and_folders_that_cannot_be_are_passed_over(run, tmp_path):
    wanted = run(XDG_CACHE_HOME=str(tmp_path))
    there = sorted(entries(tmp_path))
    for i, path in enumerate(there):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes((content, content[:-9], b'')[i % 3])
    assert run(XDG_CACHE_HOME=str(tmp_path)) == wanted
    (tmp_path / 'file').write_text('')
    assert run(XDG_CACHE_HOME=str(tmp_path / 'file')) == wanted
    said = str(tmp_path / 'file' / 'x')
    assert run(JAX_COMPILATION_CACHE_DIR=said) == [wanted[0], said]


def test_what_a_person_has_set_for_jax_stays(run, tmp_path):
    own, other = tmp_path / 'own', str(tmp_path / 'other')
    assert run(JAX_COMPILATION_CACHE_DIR=str(own), XDG_CACHE_HOME=other)[1] == str(own)
    assert entries(own) and not entries(other)
    run(JAX_ENABLE_COMPILATION_CACHE='false', XDG_CACHE_HOME=other)
    slow = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '99'}
    run(**slow, XDG_CACHE_HOME=other)
    assert not entries(other)


def test_a_folder_belongs_to_a_jaxlib_and_a_cpu(tmp_path, monkeypatch):
    environment = {'XDG_CACHE_HOME': str(tmp_path)}
    here = compile_cache.folder(environment)
    assert here is not None and here.is_relative_to(tmp_path / 'layercomb')
    assert compile_cache.folder(environment) == here
    monkeypatch.setattr('platform.machine', lambda: 'another')
    elsewhere = compile_cache.folder(environment)
    monkeypatch.setattr('importlib.metadata.version', lambda _: '9.9')
    assert len({here, elsewhere, compile_cache.folder(environment)}) == 3
    assert compile_cache.folder({'XDG_CACHE_HOME': 'relative'}) != Path('relative')


def test_settings_are_given_back(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('JAX_ENABLE_COMPILATION_CACHE')
    names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')

    def settings():
        return [getattr(jax.config, name) for name in (*names, 'jax_enable_compilation_cache')]

    before = settings()
    jax.config.update('jax_enable_compilation_cache', True)
    try:
        with compile_cache.kept():
            inside = settings()
        with compile_cache.kept(on=False):
            assert settings()[2] is False
        assert settings() == [*before[:2], True]
    finally:
        jax.config.update('jax_enable_compilation_cache', before[2])
    assert inside[0].startswith(str(tmp_path)) and inside[1:] == [0.0, True]


def test_under_pytest_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with compile_cache.kept():
        assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', ['train', 'eval', 'inspect', 'generate', 'serve', 'export'])
def test_help_says_where_it_is(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / '100%'))
    monkeypatch.setenv('COLUMNS', '500')
    with pytest.raises(SystemExit):
        cli.main([command, '--help'])
    out = capsys.readouterr().out
    assert '--no_compile_cache' in out and f'{tmp_path}/100%/layercomb/compiled/jaxlib-' in out
