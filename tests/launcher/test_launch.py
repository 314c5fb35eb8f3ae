"""The launcher as a process: huge pages where training gains from them, and its exit code."""

import subprocess
import sys

import pytest

from layercomb import __main__ as launcher


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A machine with glibc whose kernel gives huge pages to those who ask."""
    kernel = tmp_path / 'enabled'
    kernel.write_text('always [madvise] never\n')
    monkeypatch.setattr(launcher, '_KERNEL', kernel)
    monkeypatch.setattr('platform.libc_ver', lambda: ('glibc', '2.36'))
    return kernel


def test_only_training_asks_for_huge_pages(linux):
    assert launcher.wants_huge_pages({}, ['train', 'x.gin'])
    assert not launcher.wants_huge_pages({}, ['eval', 'runs/x'])
    assert not launcher.wants_huge_pages({}, [])


def test_a_setting_of_the_user_is_left_alone(linux):
    assert not launcher.wants_huge_pages({'GLIBC_TUNABLES': ''}, ['train'])


def test_no_huge_pages_without_a_kernel_that_offers_them(linux, tmp_path, monkeypatch):
    linux.write_text('[always] madvise never\n')
    assert not launcher.wants_huge_pages({}, ['train'])
    monkeypatch.setattr(launcher, '_KERNEL', tmp_path / 'absent')
    assert not launcher.wants_huge_pages({}, ['train'])


def test_the_process_says_what_is_wrong_and_exits_with_2():
    command = [sys.executable, '-m', 'layercomb', 'train', 'no_such_experiment']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('layercomb: ')
    assert len(done.stderr.splitlines()) == 1
