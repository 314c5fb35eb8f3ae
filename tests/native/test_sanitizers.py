"""Every kernel under sanitizers: no address out of bounds, nothing undefined, no race of threads.

`drive.cc` calls them without Python, whose threads and memory sanitizers do not know. The tests of
the kernels run under sanitizers, too, in `.ci/nightly`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layercomb_kernels import build, packaged

DRIVER = Path(__file__).parent / 'drive.cc'
PROCESSORS = {'this': build.tuned(), 'v3': ('-march=x86-64-v3',), 'oldest': ()}
if platform.machine() == 'x86_64':
    PROCESSORS['AVX alone'] = ('-march=sandybridge',)
SANITIZERS = {
    'no sanitizer': (),
    'addresses': ('-fsanitize=address,undefined', '-fno-sanitize-recover=all'),
    'threads': ('-fsanitize=thread',),
}
PLANTED = {
    'addresses': 'int main(int n, char**) { int* x = new int[n]; return x[n]; }',
    'threads': """#include <thread>
        int x;
        int main() { std::thread other([] { ++x; }); ++x; other.join(); }""",
}
# Leaks are not looked for: a process may end while a task that came too late is in the queue.
SETTINGS = {'ASAN_OPTIONS': 'detect_leaks=0', 'UBSAN_OPTIONS': 'print_stacktrace=1'}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler'),
]


def run(command):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **SETTINGS}
    )
    assert done.returncode == 0, f'{done.stdout[-2000:]}\n{done.stderr[-8000:]}'
    return done.stdout


def started(folder, program, flags):
    """A program, compiled with flags and run; None if it cannot be linked here."""
    (folder / 'program.cc').write_text(program + '\n')
    command = ['c++', '-pthread', *flags, folder / 'program.cc', '-o', folder / 'program']
    if subprocess.run(list(map(str, command)), capture_output=True).returncode:
        return None
    environment = {**os.environ, **SETTINGS}
    return subprocess.run([folder / 'program'], capture_output=True, text=True, env=environment)


def skip_without(folder, flags):
    done = started(folder, 'int main() {}', flags)
    if done is None or done.returncode:
        pytest.skip(f'{" ".join(flags)} is not to be had here')


@pytest.mark.parametrize('sanitizer', PLANTED)
def test_sanitizers_see_what_is_wrong(tmp_path, sanitizer):
    skip_without(tmp_path, SANITIZERS[sanitizer])
    done = started(tmp_path, PLANTED[sanitizer], SANITIZERS[sanitizer])
    assert done.returncode and 'Sanitizer: ' in done.stderr


@pytest.mark.parametrize('processor', PROCESSORS)
@pytest.mark.parametrize('sanitizer', SANITIZERS)
def test_kernels_do_no_harm(tmp_path, sanitizer, processor):
    flags = SANITIZERS[sanitizer]
    skip_without(tmp_path, flags)
    runs = {level.flags: level.needs <= packaged.features() for level in packaged.LEVELS}
    if not runs.get(PROCESSORS[processor], True):
        pytest.skip(f'this processor is no {processor}')
    sources = [DRIVER, *(path for path in build.SOURCES if path.stem != 'handlers')]
    compiler = ['c++', '-O1', '-g', '-std=c++17', '-pthread', *PROCESSORS[processor], *flags]
    objects = [tmp_path / f'{source.stem}.o' for source in sources]
    include = f'-I{build.SOURCES[0].parent}'
    commands = [
        [*compiler, include, '-c', source, '-o', object_]
        for source, object_ in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    run([*compiler, *objects, '-o', tmp_path / 'drive'])
    assert run([tmp_path / 'drive']) == 'all kernels ran\n'
