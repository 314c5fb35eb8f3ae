"""The folder of kept weights: private, never too full, and no file of others is deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from layercomb.errors import UsageWarning
from layercomb.interop import weight_cache
from layercomb.interop.kept import entries


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'source'
    path.touch()
    return path


def load(file, cache, n=1000):
    seen = weight_cache.look(cache, file)
    return weight_cache.weights_of(cache, seen, {}, None, lambda: {'x': jnp.arange(n)})


def refuses(file, cache, why):
    with pytest.warns(UsageWarning, match=why) as told:
        found = load(file, cache)
    np.testing.assert_array_equal(found['x'], np.arange(1000))
    assert len(told) == 1 and '\n' not in str(told[0].message)


def test_a_folder_that_cannot_be_written_costs_a_warning(file, cache, monkeypatch):
    def refused(*given, **more):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patched:
        patched.setattr(entries.tempfile, 'mkstemp', refused)
        refuses(file, cache, r'not kept in .*cache.* \(Permission denied\), so each start makes')
    load(file, cache)
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in ('utime', 'replace'):
            patched.setattr(entries.os, name, refused)
        load(file, cache)  # what is there can be read


def test_a_file_in_the_place_of_the_folder_costs_a_warning(file, cache):
    cache.write_text('')
    refuses(file, cache, 'not kept')
    assert cache.read_text() == ''


def test_a_full_disk_costs_a_warning_and_leaves_nothing(file, cache, monkeypatch):
    usage = shutil.disk_usage('/')
    with monkeypatch.context() as patched:
        patched.setattr(entries.shutil, 'disk_usage', lambda path: usage._replace(free=1000))
        refuses(file, cache, r'\(No space left on device\), .* see that 0 MB are free there')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(entries.os, 'fsync', full)
    refuses(file, cache, 'No space left')
    assert not list(cache.iterdir())


def test_on_a_full_disk_what_is_old_is_deleted_before_room_is_looked_for(
    file, cache, tmp_path, monkeypatch
):
    old = kept(tmp_path / 'old', cache)
    os.utime(old, (1e9, 1e9))
    usage = shutil.disk_usage('/')

    def told(path):
        return usage._replace(free=1000 if old.exists() else 1 << 40)

    monkeypatch.setattr(entries.shutil, 'disk_usage', told)
    load(file, cache)
    assert not old.exists() and len(list(cache.iterdir())) == 1


def test_what_is_too_large_is_not_kept(file, cache, monkeypatch):
    monkeypatch.setattr(entries, 'LARGEST', 100)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(file, cache)
    assert not cache.exists()


@pytest.mark.skipif(os.name != 'posix', reason='modes tell nothing elsewhere')
@pytest.mark.parametrize('mode', [0o770, 0o707, 0o1777])
def test_a_folder_where_others_may_write_is_not_used(file, cache, mode):
    load(file, cache)
    (entry,) = cache.iterdir()
    assert entry.stat().st_mode & 0o077 == 0
    entry.unlink()
    cache.chmod(mode)
    refuses(file, cache, r'others may write, so .* \(chmod go-w\)')
    assert not list(cache.iterdir())
    cache.chmod(0o755)
    load(file, cache)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, 'getuid'), reason='files have no owners that are numbers')
def test_an_entry_of_another_user_is_not_believed(file, cache, monkeypatch):
    load(file, cache)
    (entry,) = cache.iterdir()
    monkeypatch.setattr(entries.os, 'getuid', lambda: entry.stat().st_uid)
    assert entries.is_own(entry) and not entries.is_own(cache / 'nothing')
    monkeypatch.setattr(entries.os, 'getuid', lambda: entry.stat().st_uid + 1)
    assert entries.is_own(entry) == (entry.stat().st_uid == 0)


def kept(source, cache):
    """The new entry of a new source."""
    source.touch()
    there = set(cache.glob('*'))
    load(source, cache)
    return (set(cache.glob('*')) - there).pop()


def test_entries_are_deleted_after_a_while_or_when_they_are_many(cache, tmp_path, monkeypatch):
    first = kept(tmp_path / 'a', cache)
    names = (
        'my.weights',
        'layercomb-notes.txt',
        'x.part',
        'layercomb-1.part',
        'layercomb-my.weights',
    )
    others = [cache / name for name in (*names, f'layercomb-{"0" * 32}.weights')]
    for path in others:  # the last has the name of an entry, and is none
        path.write_text('something else')
    for path in (first, *others):
        os.utime(path, (1e9, 1e9))
    second = kept(tmp_path / 'b', cache)
    assert {second, *others} == set(cache.iterdir())
    os.utime(second, (second.stat().st_mtime - 100,) * 2)
    third = kept(tmp_path / 'c', cache)
    assert second.exists()
    monkeypatch.setattr(entries, 'LARGEST', third.stat().st_size * 3 // 2)
    kept(tmp_path / 'd', cache)
    assert not second.exists() and not third.exists()
    assert all(path.exists() for path in others)


@pytest.mark.skipif(os.name != 'posix', reason='it is not known which processes are there')
def test_parts_of_dead_processes_are_deleted_and_others_count(file, cache, tmp_path, monkeypatch):
    first = kept(tmp_path / 'a', cache)
    with entries.part_of(first) as opened:
        (own,) = cache.glob('*.part')
        opened.write(first.read_bytes())
        dead = subprocess.Popen([sys.executable, '-c', ''])
        dead.wait()
        _, machine, process, random = own.name.split('-')
        assert int(process) == os.getpid()
        parts = {
            name: cache / f'layercomb-{where}-{who}-{random}'
            for name, where, who in (
                ('dead', machine, dead.pid), ('elsewhere', 'f' * 8, dead.pid),
                ('old', 'f' * 8, dead.pid + 1), ('root', machine, 1),
            )
        }  # fmt: skip
        for path in parts.values():
            path.write_bytes(bytes(100))
        os.utime(parts['old'], (1e9, 1e9))
        entries.tidy(cache, first)
        assert set(cache.iterdir()) == {first, own, parts['elsewhere'], parts['root']}
        second = kept(tmp_path / 'b', cache)
        monkeypatch.setattr(entries, 'LARGEST', 2 * first.stat().st_size + 50)
        os.utime(first, (time.time() - 50,) * 2)
        entries.tidy(cache, second)  # parts take room
        assert second.exists() and not first.exists() and own.exists()
