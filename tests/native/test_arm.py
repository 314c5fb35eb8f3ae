"""The kernels compile for 64-bit Arm, by the compiler that the package ziglang brings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import jax
import pytest

from layercomb_kernels import build, packaged

COMPILER = [sys.executable, '-m', 'ziglang', 'c++', '-target', 'aarch64-linux-gnu']
needs_zig = pytest.mark.skipif(
    importlib.util.find_spec('ziglang') is None, reason='the package ziglang is not installed'
)


@pytest.mark.slow
@needs_zig
def test_kernels_compile_for_arm(tmp_path, monkeypatch):
    """As `build.make` does it, but for the compiler."""
    (level,) = (x for x in packaged.LEVELS if x.machine == 'aarch64')
    flags = build._command(level.flags)[1:]
    objects = [tmp_path / f'{source.stem}.o' for source in build.SOURCES]
    include = f'-I{jax.ffi.include_dir()}'
    for source, object_ in zip(build.SOURCES, objects, strict=True):
        compile_(*flags, include, '-c', source, '-o', object_)
    made = tmp_path / 'kernels.so'
    compile_(*flags, '-shared', *objects, '-o', made)
    machine = int.from_bytes(made.read_bytes()[18:20], 'little')
    assert machine == 183  # EM_AARCH64


def compile_(*flags):
    done = subprocess.run([*COMPILER, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
