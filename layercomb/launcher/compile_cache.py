"""Keeps compiled programs, and weights, in the user's cache folder, so that each is made once.

JAX stores programs (its persistent compilation cache), and `interop.weight_cache` weights; this
module chooses the folders. A program runs only on the machine type it was compiled for, so each
folder of programs is for one version of jaxlib and one set of CPU features.
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

from layercomb import paths

# JAX's variables. Values that the user has set in the environment stay.
_ENABLED = 'jax_enable_compilation_cache'
_DIRECTORY = 'jax_compilation_cache_dir'
_NO = ('n', 'no', 'f', 'false', 'off', '0')  # as JAX reads its variables
_SMALL_PROGRAMS_TOO = {
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}

_FEATURES = ('flags', 'Features', 'model name', 'CPU implementer', 'CPU part')  # of /proc/cpuinfo


@contextlib.contextmanager
def kept(on: bool = True) -> Iterator[None]:
    """Inside the context, JAX uses the cache folder. Afterwards its settings are as before.

    An entry that cannot be read is compiled anew, and a folder that cannot be written to is not
    used; neither is an error.

    Args:
      on: False turns the cache off and leaves other settings alone.
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
    """The default cache folder of this machine; None if the user has no home folder.

    Args:
      environment: variables by name, as `os.environ`.
    """
    base = _base(environment)
    name = f'jaxlib-{metadata.version("jaxlib")}-{_cpu()}'
    return None if base is None else base / 'compiled' / name


def weights_folder(environment: Mapping[str, str]) -> Path | None:
    """The default folder for weights; None if the user has no home folder.

    Args:
      environment: as of `folder`.
    """
    base = _base(environment)
    return None if base is None else base / 'weights'


def usable_weights_folder(environment: Mapping[str, str], on: bool = True) -> Path | None:
    """The folder for weights; None if it is turned off or not usable. Nothing is made.

    Args:
      environment: as of `folder`. JAX's variable that turns its cache off turns off this one, too.
      on: False turns it off.
    """
    if not on or environment.get(_ENABLED.upper(), '').lower() in _NO:
        return None
    directory = weights_folder(environment)
    if directory is None or directory.is_dir():
        return None if _usable(directory) is None else directory
    try:
        paths.check_can_hold(directory)
    except OSError:
        return None
    return directory


def _base(environment: Mapping[str, str]) -> Path | None:
    """What is the library's in the user's cache folder; None if there is none."""
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
    return base / 'layercomb' if base.is_absolute() else None


def _cpu() -> str:
    """A hash of the CPU's features."""
    try:
        lines = Path('/proc/cpuinfo').read_text('utf-8', 'replace').splitlines()
        known = {line for line in lines if line.startswith(_FEATURES)}
    except OSError:
        known = {platform.processor()}
    features = ' '.join((platform.machine(), *sorted(known)))
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _explicit(environment: Mapping[str, str]) -> str | None:
    """The folder that the user has told JAX to use, if any."""
    return environment.get(_DIRECTORY.upper()) or getattr(jax.config, _DIRECTORY)


def _usable(directory: Path | None) -> str | None:
    """Makes the folder and checks that a file can be written in it; returns its name, else None.

    Programs found there are run, and weights are believed, so only the user may write there.
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
    """Sets variables of JAX inside the context. JAX reads them once, so its cache is reset."""
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
