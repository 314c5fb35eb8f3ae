"""From the start of a process to a loaded model and its first token, and what memory it takes.

python benchmarks/start.py MODEL [--bits 8] [--rounds 3] [--beside 3] [--programs DIR]

Each round has a process without a cache of weights, one that fills it, and one that maps what the
other has kept. Programs were compiled by an earlier process in each case. At the end as many
processes as `--beside` says are there at once, with and without the cache: what each has to itself,
and its share of what it has with others (`Pss`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import machine

PROMPT, NEW = 32, 33
KEPT = {
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}
COLUMNS = {
    'loaded': 's to a model', 'load': 'of it reading', 'first': 's to a token', 'peak_load': 'peak',
    'peak': 'peak, decoding', 'private': 'written to', 'pss': 'share',
}  # fmt: skip


def age() -> float:
    """Seconds since this process began."""
    ticks = int(Path('/proc/self/stat').read_text().rsplit(')', 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


def in_mb(name: str, file: str) -> float:
    """A number that the system tells of this process, in MB."""
    return int(re.search(rf'{name}:\s*(\d+) kB', Path(f'/proc/self/{file}').read_text())[1]) / 1e3


def fail(why: str) -> NoReturn:
    """Ends in one line."""
    print(f'start: {why}', file=sys.stderr)
    sys.exit(2)


def check(model: str) -> None:
    """Ends if there is no such model."""
    from layercomb.errors import UsageError
    from layercomb.launcher import sources

    try:
        found = sources.find(model)
    except UsageError as e:
        fail(str(e))
    if found.kind in (sources.RUN, sources.TRAX):
        fail(f'of {model!r} nothing is kept: give a .gguf file or a directory of Hugging Face')


def work(model: str, bits: int | None, cache: str) -> None:
    """What one process does; it then waits to be asked for its share of memory."""
    import jax
    import numpy as np

    from layercomb import cli
    from layercomb.supervised import decoding

    began = age()
    made, _ = cli.trained(model, bits=bits, text=False, cache=Path(cache) if cache else None)
    jax.block_until_ready(made.weights)
    loaded, peak_load, first = age(), in_mb('VmHWM', 'status'), 0.0
    for token in decoding.stream(made, [np.arange(PROMPT) + 5], NEW, temperature=0):
        int(token[0])
        first = first or age()
    told = {'loaded': loaded, 'load': loaded - began, 'first': first, 'peak_load': peak_load}
    print(json.dumps({**told, 'peak': in_mb('VmHWM', 'status')}), flush=True)
    sys.stdin.readline()
    told = {'private': in_mb('Anonymous', 'smaps_rollup'), 'pss': in_mb('Pss', 'smaps_rollup')}
    print(json.dumps(told), flush=True)
    sys.stdin.read()  # others have yet to tell


class Process:
    """A process that has made its tokens, and waits."""

    def __init__(self, options: argparse.Namespace, cache: str, programs: str) -> None:
        bits = ('--bits', str(options.bits)) if options.bits else ()
        self.process = subprocess.Popen(
            [sys.executable, __file__, options.model, *bits, '--worker', '--cache', cache],
            env={**os.environ, **KEPT, 'JAX_COMPILATION_CACHE_DIR': programs},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        if not line:
            sys.exit(2)  # it has said why
        self.told = json.loads(line)

    def asked(self) -> dict[str, float]:
        """What it tells, of its memory at last."""
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return {**self.told, **json.loads(self.process.stdout.readline())}

    def close(self) -> None:
        """Waits for its end."""
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('model')
    parser.add_argument('--bits', type=int)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--beside', type=int, default=3)
    parser.add_argument('--programs', help='a folder of compiled programs; else a new one')
    parser.add_argument('--worker', action='store_true')
    parser.add_argument('--cache', default='')
    options = parser.parse_args()
    if options.worker:
        from layercomb.errors import UsageError

        try:
            work(options.model, options.bits, options.cache)
        except UsageError as e:
            fail(str(e))
        return
    check(options.model)
    print(machine.describe('jaxlib', 'numpy'))
    with tempfile.TemporaryDirectory() as programs, tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder, 'weights'))
        measure(options, cache, options.programs or programs)


def measure(options: argparse.Namespace, cache: str, programs: str) -> None:
    """All rounds, and processes beside each other."""

    def one(folder: str) -> dict[str, float]:
        process = Process(options, folder, programs)
        told = process.asked()
        process.close()
        return told

    one('')  # compiles
    turns: dict[str, list[dict[str, float]]] = {'no cache': [], 'filled': [], 'mapped': []}
    for _ in range(options.rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name, folder in zip(turns, ('', cache, cache), strict=True):
            turns[name].append(one(folder))
            if folder and not Path(folder).is_dir():
                fail('nothing of this model is kept: give a .gguf file, or --bits 16, 8 or 4')
    print(f'\n{options.model}, bits {options.bits}; medians of {options.rounds}, memory in MB')
    print(f'| | {" | ".join(COLUMNS.values())} |\n|---|{"---:|" * len(COLUMNS)}')
    for name, told in turns.items():
        shown = (statistics.median(each[key] for each in told) for key in COLUMNS)
        print(f'| {name} | {" | ".join(f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in shown)} |')
    size = sum(file.stat().st_size for file in Path(cache).iterdir())
    print(f'the cache takes {size / 1e6:.0f} MB')
    for name, folder in (('no cache', ''), ('mapped', cache)):
        there = [Process(options, folder, programs) for _ in range(options.beside)]
        told = [process.asked() for process in there]
        for process in there:
            process.close()
        shares = ', '.join(f'{each["pss"]:.0f}' for each in told)
        print(f'{name}, {options.beside} processes at once: {shares} MB each')


if __name__ == '__main__':
    main()
