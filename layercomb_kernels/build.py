"""Compiles the kernels once per machine, into the user's cache, for its own processor.

The file name contains a hash of everything the result depends on: source, flags, compiler, jaxlib
and processor. The file is written under a temporary name and then moved, so that processes that
start together do not interfere.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob('*.cc'))
HEADERS = sorted(Path(__file__).parent.glob('*.h'))
SWITCH = 'LAYERCOMB_KERNELS'  # 0 turns the kernels off
FLAGS = 'LAYERCOMB_KERNELS_FLAGS'  # more flags for the compiler, such as -fsanitize=address

_COMPILERS = ('c++', 'g++', 'clang++')
_SECONDS = 300


class Unavailable(Exception):
    """The kernels cannot be used; the message is the reason, in one line."""


def load() -> ctypes.CDLL:
    """The compiled kernels, as a shared library; compiles them if needed.

    Raises:
      Unavailable: if they are switched off, there is no compiler, or it fails.
    """
    check_switch()
    path = library_path()
    if _is_intact(path):
        with contextlib.suppress(OSError):  # perhaps of another machine: compile again, once
            return ctypes.CDLL(str(path))
    _compile_once(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        raise Unavailable(f'the compiled kernels cannot be loaded: {e}') from None


def check_switch() -> None:
    """Raises `Unavailable` if the kernels are switched off."""
    if os.environ.get(SWITCH, '1') == '0':
        raise Unavailable(f'switched off by {SWITCH}=0')


def library_path() -> Path:
    """The path of this machine's compiled kernels, whether or not they exist yet.

    Raises:
      Unavailable: if there is no compiler, or no directory for a user's cache.
    """
    parts = [
        *(path.read_text(encoding='utf-8') for path in [*SOURCES, *HEADERS]),
        *_command(tuned()),
        importlib.metadata.version('jaxlib'),
        _processor(),
    ]
    digest = _digest('\0'.join(parts).encode())[:16]
    return _cache() / 'layercomb' / f'kernels-{digest}.so'


def _cache() -> Path:
    """The user's cache directory. A relative path is ignored, as the XDG specification says."""
    for path in (os.environ.get('XDG_CACHE_HOME', ''), os.path.expanduser('~/.cache')):
        if os.path.isabs(path):
            return Path(path)
    raise Unavailable('there is no home directory for the compiled kernels: set XDG_CACHE_HOME')


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _seal(path: Path) -> Path:
    """The file with a library's hash, which is written after the library is complete."""
    return path.with_suffix('.sha256')


def _is_intact(path: Path) -> bool:
    """Whether a library has its recorded hash: loading a truncated one would end the process."""
    try:
        return _seal(path).read_text(encoding='utf-8') == _digest(path.read_bytes())
    except (OSError, ValueError):
        return False


def tuned() -> tuple[str, ...]:
    """Flags of the compiler for the processor of this machine."""
    is_arm = platform.machine() in ('arm64', 'aarch64')
    return ('-mcpu=native' if is_arm else '-march=native',)


def _command(processor: Sequence[str]) -> list[str]:
    """The compiler and its flags.

    Args:
      processor: the flags that say for which one.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise Unavailable(f'no C++ compiler: none of {", ".join(_COMPILERS)} is on the PATH')
    try:
        more = shlex.split(os.environ.get(FLAGS, ''))
    except ValueError as e:
        raise Unavailable(f'{FLAGS} cannot be read: {e}') from None
    flags = ['-O2', *processor, '-std=c++17', '-ffp-contract=fast', '-fPIC', '-pthread', *more]
    return [compiler, *flags]


def _processor() -> str:
    """What -march=native depends on: the model and its flags, if the system reports them."""
    lines: set[str] = set()
    with contextlib.suppress(OSError):
        known = ('model name', 'flags', 'Features', 'CPU part')
        info = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
        lines = {line for line in info if line.startswith(known)}
    return '\n'.join([platform.machine(), platform.processor(), *sorted(lines)])


def _compile_once(path: Path) -> None:
    """Makes the library in the cache, where it appears when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            make(made, tuned())
            digest = _digest(made.read_bytes())
            os.replace(made, path)
            made.write_text(digest, encoding='utf-8')
            os.replace(made, _seal(path))
    except (OSError, subprocess.SubprocessError) as e:
        raise Unavailable(f'the kernels cannot be compiled: {e}') from None


def make(path: Path, processor: Sequence[str], linking: Sequence[str] = ()) -> None:
    """Compiles a library, with its parts beside it.

    Args:
      path: of the library.
      processor: the compiler's flags that say for which one.
      linking: more of its flags, to put the parts together.

    Raises:
      Unavailable: if there is no compiler, or it fails.
      OSError, subprocess.SubprocessError: if it cannot be run.
    """
    import jax

    compiler = _command(processor)
    objects = [path.parent / f'{source.stem}.o' for source in SOURCES]
    _run(
        [*compiler, f'-I{jax.ffi.include_dir()}', '-c', str(source), '-o', str(object_)]
        for source, object_ in zip(SOURCES, objects, strict=True)
    )
    _run([[*compiler, '-shared', *map(str, objects), *linking, '-o', str(path)]])


def _run(commands: Iterable[list[str]]) -> None:
    """Runs the compiler commands in parallel."""

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
        if done.returncode:
            lines = done.stderr.decode('utf-8', 'replace').strip().splitlines() or ['no message']
            said = next((x for x in lines if 'error' in x), lines[0])
            raise Unavailable(f'{command[0]} cannot compile the kernels: {said.strip()}')

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, commands))
