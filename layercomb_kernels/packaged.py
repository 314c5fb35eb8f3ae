"""Compiled kernels that a wheel brings, for people without a compiler.

``LAYERCOMB_WHEEL_KERNELS=1 pip wheel .`` compiles a library for each level of the processors of the
machine that makes the wheel. Which one is loaded depends on the processor that runs it. A library
works with a jaxlib whose interface for foreign functions has the same major version and no smaller
minor one: see xla/ffi/api/c_api.h. The C++ library is part of it; the C library is the system's and
must not be older than that of the machine that made it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import platform
import re
import sys
import tempfile
from pathlib import Path

from layercomb_kernels import build

FOLDER = Path(__file__).parent / 'built'
_ABOUT = 'about.json'
_KNOWN = {'AMD64': 'x86_64', 'arm64': 'aarch64'}  # other names of machines

# What /proc/cpuinfo calls what x86-64-v3 and x86-64-v4 stand for.
_V2 = frozenset(['cx16', 'lahf_lm', 'pni', 'popcnt', 'sse4_1', 'sse4_2', 'ssse3'])
_V3 = _V2 | {'abm', 'avx', 'avx2', 'bmi1', 'bmi2', 'f16c', 'fma', 'movbe', 'xsave'}
_V4 = _V3 | {'avx512f', 'avx512bw', 'avx512cd', 'avx512dq', 'avx512vl'}


@dataclasses.dataclass(frozen=True)
class Level:
    """Processors that one library is for.

    Attributes:
      name: of the level.
      machine: as `platform.machine` calls it on Linux.
      flags: of the compiler.
      needs: what a processor must have, by the names of /proc/cpuinfo.
    """

    name: str
    machine: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()

    def path(self, folder: Path) -> Path:
        """Where its library is in a folder."""
        return folder / f'kernels-{self.name}.so'


# The best ones first.
LEVELS = (
    Level(
        'x86-64-v4-vnni-bf16',
        'x86_64',
        ('-march=x86-64-v4', '-mavx512vnni', '-mavx512bf16'),
        _V4 | {'avx512_vnni', 'avx512_bf16'},
    ),
    Level('x86-64-v3', 'x86_64', ('-march=x86-64-v3',), _V3),
    Level('aarch64', 'aarch64'),
)


def make(folder: Path) -> None:
    """Compiles the libraries for this kind of machine, which a wheel then holds.

    Args:
      folder: where to put them; what is there is replaced.

    Raises:
      Unavailable: if there is no compiler, or it fails, or no level is known for this machine.
    """
    levels = [level for level in LEVELS if level.machine == _machine()]
    if not levels:
        raise build.Unavailable(
            f'no kernels can be packaged for {platform.machine()}: make a wheel without them'
        )
    folder.mkdir(parents=True, exist_ok=True)
    linking = ('-static-libstdc++', '-static-libgcc', '-s') if sys.platform == 'linux' else ()
    for level in levels:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            made = level.path(Path(directory))
            build.make(made, level.flags, linking)
            made.replace(level.path(folder))
    about = json.dumps({'interface': interface()})
    (folder / _ABOUT).write_text(f'{about}\n', encoding='utf-8')


def there() -> bool:
    """Whether there are any: a wheel without them, or a repository, has none."""
    return (FOLDER / _ABOUT).is_file()


def load() -> tuple[ctypes.CDLL, Level]:
    """The library that suits this processor best.

    Raises:
      Unavailable: if none suits it, or what else is on this machine does not suit the library.
    """
    made_for = json.loads((FOLDER / _ABOUT).read_text(encoding='utf-8'))['interface']
    here = interface()
    if made_for[0] != here[0] or made_for[1] > here[1]:
        a, b = ('.'.join(map(str, x)) for x in (made_for, here))
        raise build.Unavailable(
            f'the packaged kernels are for version {a} of the interface that jaxlib has in version '
            f'{b}: install a C++ compiler, or another wheel'
        )
    level = best(features())
    try:
        return ctypes.CDLL(str(level.path(FOLDER))), level
    except OSError as e:
        raise build.Unavailable(f'the packaged kernels cannot be loaded: {e}') from None


def best(has: frozenset[str]) -> Level:
    """The best level that is packaged and that a processor can run.

    Args:
      has: its features, by the names of /proc/cpuinfo.

    Raises:
      Unavailable: if there is none.
    """
    packaged = [level for level in LEVELS if level.path(FOLDER).is_file()]
    for level in packaged:
        if level.machine == _machine() and level.needs <= has:
            return level
    names = ', '.join(level.name for level in packaged)
    raise build.Unavailable(
        f'the packaged kernels are for {names}, and this processor is none: install a C++ compiler'
    )


def features() -> frozenset[str]:
    """What all cores of this processor have, as /proc/cpuinfo says; nothing where there is none."""
    found = []
    with contextlib.suppress(OSError):
        info = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
        for line in info.splitlines():
            name, _, words = line.partition(':')
            if name.strip() in ('flags', 'Features'):
                found.append(frozenset(words.split()))
    return frozenset.intersection(*found) if found else frozenset()


def interface() -> list[int]:
    """The version, major and minor, of the interface for foreign functions that jaxlib has.

    Raises:
      Unavailable: if its header does not say it.
    """
    import jax

    header = Path(jax.ffi.include_dir()) / 'xla' / 'ffi' / 'api' / 'c_api.h'
    numbers = []
    with contextlib.suppress(OSError):
        text = header.read_text(encoding='utf-8', errors='replace')
        numbers = re.findall(r'#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)', text)
    if len(numbers) != 2:
        raise build.Unavailable(f'{header} does not say which interface jaxlib has')
    return [int(number) for number in numbers]


def _machine() -> str:
    return _KNOWN.get(platform.machine(), platform.machine())
