"""Programs that were compiled are kept in the user's cache folder, so that a command compiles once.

JAX keeps them (its persistent compilation cache); this says where. A program runs only where it was
compiled for, so a folder belongs to one version of jaxlib and one set of a CPU's features.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# JAX's variables. What a person has set in the environment stays.
_ENABLED = 'jax_enable_compilation_cache'
_DIRECTORY = 'jax_compilation_cache_dir'
_SMALL_PROGRAMS_TOO = {
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}

_FEATURES = ('flags', 'Features', 'model name', 'CPU implementer', 'CPU part')  # of /proc/cpuinfo


@contextlib.contextmanager
def kept(on: bool = True) -> Iterator[None]:
    """Compiled programs are looked for in the cache folder, and kept there.

    An entry that cannot be read is compiled anew, and a folder that cannot be written to is not
    used; neither is an error. Afterwards JAX is set as it was before.

    Args:
      on: False leaves JAX as it is set, except that it keeps nothing.
    """
    if not on:
        with _set({_ENABLED: False}):
            yield
        return
    directory = None
    if getattr(jax.config, _ENABLED):
        directory = _explicit(os.environ) or _usable(folder(os.environ))
    if directory is None:
        yield
        return
    small = {name: x for name, x in _SMALL_PROGRAMS_TOO.items() if name.upper() not in os.environ}
    with _set({_DIRECTORY: directory, **small}), warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Error (reading|writing) persistent compilation cache')
        yield


def folder(environment: Mapping[str, str]) -> Path | None:
    """Where programs of this machine are kept by default; None if the person has no home.

    Args:
      environment: as `os.environ`.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if environment.get('XDG_CACHE_HOME'):
        base = Path(environment['XDG_CACHE_HOME'])
    elif sys.platform == 'darwin':
        base = home / 'Library' / 'Caches'
    elif sys.platform == 'win32':
        base = Path(environment.get('LOCALAPPDATA') or home / 'AppData' / 'Local')
    else:
        base = home / '.cache'
    name = f'jaxlib-{metadata.version("jaxlib")}-{_cpu()}'
    return base / 'layercomb' / 'compiled' / name if base.is_absolute() else None


def _cpu() -> str:
    """A hash of what the CPU can do."""
    try:
        lines = Path('/proc/cpuinfo').read_text('utf-8', 'replace').splitlines()
        known = {line for line in lines if line.startswith(_FEATURES)}
    except OSError:
        known = {platform.processor()}
    features = ' '.join((platform.machine(), *sorted(known)))
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _explicit(environment: Mapping[str, str]) -> str | None:
    """The folder that a person has told JAX to use."""
    return environment.get(_DIRECTORY.upper()) or getattr(jax.config, _DIRECTORY)


def _usable(directory: Path | None) -> str | None:
    """A folder's name, once it is made and a file was written in it; else None.

    Programs of others would be run as one's own, so no one else may read or write there.
    """
    if directory is None:
        return None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, 'getuid') and directory.stat().st_uid != os.getuid():
            return None
        with tempfile.TemporaryFile(dir=directory):
            return str(directory)
    except OSError:
        return None


@contextlib.contextmanager
def _set(values: Mapping[str, object]) -> Iterator[None]:
    """Sets variables of JAX, which looks at those of its cache but once, and sets them back."""
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
