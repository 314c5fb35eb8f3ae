"""What reversible blocks and LSH attention cost in quality: four models of Python, two seeds.

The models have the same sizes, data in the same order, optimizer and budget:

* standard: `TransformerLM` with full attention, the baseline;
* reversible: `ReformerLM` with the same full attention, so that the blocks alone differ;
* lsh: `ReformerLM` with LSH attention of 8 hashes in every layer, so that against *reversible* the
  attention alone differs. That full attention has separate keys and sees everything, which asks
  more of LSH than shared-QK attention would;
* shared: the same with one bucket and one chunk, which is full attention with shared queries and
  keys: what of the difference is due to sharing, and what to hashing.

Parameters cannot be quite equal: the head reads both streams of a reversible model, and LSH
attention has no projection of keys. The numbers are printed.

So that untrained models do not tie, the baseline must predict better than a Witten-Bell byte model
of order 3 on the same batches, and its last quarter must improve it by less than 3 %. The learning
rate comes down along a cosine in three quarters of the budget and then stays at a floor, where
training goes on: what could be learnt by lowering it further is left out for all alike.

Each evaluation is appended to a file of JSON lines, and what stands there is not run again: a run
that was stopped starts anew, finished ones are kept.

    python benchmarks/reversible_parity.py --out parity.jsonl [--runs standard/0 lsh/1]

Prints bits per byte at the end and at three quarters, then each difference beside the spread of the
seeds and what is asked for: the mean over the seeds is to be worse by no more than 1 or 2 %. The
default budget, 4.9 million tokens a run, takes an hour and a half on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

import layercomb as lc
from layercomb import data, models, optimizers, supervised, tl

SEEDS = (0, 1)
SIZES = {'vocab_size': 256, 'd_model': 128, 'd_ff': 512, 'n_layers': 4, 'n_heads': 2}
BYTES = 'Witten-Bell, order 3'

Row = dict[str, Any]
Done = dict[str, dict[int, Row]]  # 'model/seed' -> step -> row


def standard(options: argparse.Namespace) -> tl.Layer:
    """The baseline."""
    length = options.length
    return models.TransformerLM(**SIZES, max_len=length, positions='rotary', norm=tl.RMSNorm())


def reversible(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with the baseline's attention."""
    return _reformer(options.length, tl.SelfAttention(SIZES['n_heads']))


def lsh(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with LSH attention."""
    attention = tl.LSHSelfAttention(
        SIZES['n_heads'], n_hashes=8, chunk_len=options.chunk_len, n_buckets=options.n_buckets
    )
    return _reformer(options.length, attention)


def shared(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with full attention whose queries are its keys."""
    attention = tl.LSHSelfAttention(
        SIZES['n_heads'], n_hashes=1, chunk_len=options.length, n_buckets=1
    )
    return _reformer(options.length, attention)


def _reformer(length: int, attention: tl.Layer) -> tl.Layer:
    return models.ReformerLM(
        **SIZES, max_len=length, positions='rotary', norm=tl.RMSNorm(), attention=attention,
        ff_chunk_len=None,
    )  # fmt: skip


MODELS: dict[str, Callable[[argparse.Namespace], tl.Layer]] = {
    'standard': standard,
    'reversible': reversible,
    'lsh': lsh,
    'shared': shared,
}


class Log:
    """The file of results, of which only those with the same settings count."""

    def __init__(self, path: Path, settings: Row) -> None:
        self._path, self._settings = path, settings

    def write(self, row: Row) -> None:
        with self._path.open('a', encoding='utf-8') as f:
            f.write(json.dumps({**row, 'settings': self._settings}) + '\n')

    def read(self) -> Done:
        done: Done = {}
        lines = self._path.read_text('utf-8').splitlines() if self._path.exists() else []
        for row in map(json.loads, lines):
            if row['settings'] == self._settings:
                done.setdefault(row['run'], {})[row['step']] = row
        return done


def valid(options: argparse.Namespace) -> supervised.EvalTask:
    """The batches that all models are measured on."""
    batches = data.packed(data.python_stdlib('valid'), options.length, 16, num_epochs=1)
    return supervised.EvalTask(batches, tl.BitsPerByte(), n_batches=options.eval_batches)


def train(run: str, options: argparse.Namespace, log: Log) -> None:
    """Trains one model with one seed, measuring it after each quarter."""
    name, seed = run.split('/')
    steps = options.steps
    rate = optimizers.warmup_cosine(
        options.learning_rate, 3 * steps // 4, min(100, steps // 10), final_fraction=0.05
    )
    task = supervised.TrainTask(
        data.packed(data.python_stdlib('train'), options.length, options.batch, seed=int(seed)),
        tl.CrossEntropyLoss(),
        optimizers.muon(rate),
    )
    net = MODELS[name](options)
    loop = supervised.Loop(net, task, valid(options), seed=int(seed), eval_every=None)
    cpu, wall = time.process_time(), time.perf_counter()
    for quarter in range(1, 5):
        row = loop.run(steps * quarter // 4)
        result = {
            'run': run,
            'step': row['step'],
            'bits': row['valid/bits_per_byte'],
            'parameters': lc.trees.count(loop.weights),
            'cpu_s': round(time.process_time() - cpu),
            'wall_s': round(time.perf_counter() - wall),
        }
        log.write(result)
        print(result, flush=True)


def count_bytes(options: argparse.Namespace, log: Log) -> None:
    """Measures the byte model."""
    batches = valid(options).batches()
    bits = data.witten_bell_bits_on_batches(data.python_stdlib('train'), batches, orders=[3])[3]
    log.write({'run': BYTES, 'step': 0, 'bits': bits})


def report(done: Done, options: argparse.Namespace) -> None:
    """Prints the table of runs, and what is asked for if all are there."""
    end, before = options.steps, 3 * options.steps // 4
    bits_of_bytes = done[BYTES][0]['bits']
    print(f'\n{BYTES}: {bits_of_bytes:.4f} bits per byte on the same batches\n')
    print('| model | seed | parameters | bits per byte | at 3/4 | last quarter | CPU s | wall s |')
    print('|---|---:|---:|---:|---:|---:|---:|---:|')
    runs = {(name, seed): done.get(f'{name}/{seed}', {}) for name in MODELS for seed in SEEDS}
    for (name, seed), rows in runs.items():
        if end in rows:
            row, bits = rows[end], rows[before]['bits']
            print(
                f'| {name} | {seed} | {row["parameters"]:,} | {row["bits"]:.4f} | {bits:.4f} | '
                f'{1 - row["bits"] / bits:.2%} better | {row["cpu_s"]} | {row["wall_s"]} |'
            )
    if all(end in rows for rows in runs.values()):
        last = {key: rows[end]['bits'] for key, rows in runs.items()}
        gains = [1 - last['standard', s] / runs['standard', s][before]['bits'] for s in SEEDS]
        judge(last, gains, bits_of_bytes)


def judge(last: dict[tuple[str, int], float], gains: list[float], bits_of_bytes: float) -> None:
    """Prints each difference, and each condition as met or not met."""
    print('\n| against | seed 0 | seed 1 | mean | asked | |')
    print('|---|---:|---:|---:|---:|---|')
    pairs = (
        ('reversible', 'standard', 0.01),
        ('lsh', 'reversible', 0.02),
        ('lsh', 'standard', None),
        ('lsh', 'shared', None),
        ('shared', 'reversible', None),
    )
    for model, peer, limit in pairs:
        worse = [last[model, seed] / last[peer, seed] - 1 for seed in SEEDS]
        mean = sum(worse) / len(worse)
        cells = ' | '.join(f'{x:+.2%}' for x in (*worse, mean))
        asked = '|' if limit is None else f'at most {limit:+.0%} | {_met(mean <= limit)}'
        print(f'| {model} / {peer} | {cells} | {asked} |')
    for model in MODELS:
        bits = [last[model, seed] for seed in SEEDS]
        print(f'\nspread of the seeds, {model}: {max(bits) / min(bits) - 1:.2%}', end='')
    worst = max(last['standard', seed] for seed in SEEDS)
    print(f'\n\nthe baseline beats the byte model: {_met(worst < bits_of_bytes)}')
    print(
        f'its last quarter improves it by less than 3 %: {_met(max(gains) < 0.03)} '
        f'({", ".join(f"{gain:.2%}" for gain in gains)})'
    )


def _met(condition: bool) -> str:
    return 'met' if condition else 'not met'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [f'{name}/{seed}' for seed in SEEDS for name in MODELS]
    parser.add_argument('--out', type=Path, required=True, help='the file of results')
    parser.add_argument('--runs', nargs='*', default=every, choices=every, metavar='MODEL/SEED')
    parser.add_argument('--steps', type=int, default=2400)
    parser.add_argument('--length', type=int, default=512)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--chunk-len', type=int, default=64, help='of LSH attention')
    parser.add_argument('--n-buckets', type=int, default=8, help='of LSH attention')
    parser.add_argument('--learning-rate', type=float, default=0.02)
    parser.add_argument('--eval-batches', type=int, default=16, help='of 16 rows each')
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k not in ('out', 'runs')}
    log = Log(options.out, settings)
    print(machine.describe('jaxlib', 'optax'))
    tokens = options.steps * options.batch * options.length
    print(f'{SIZES}; {settings}; {tokens:,} tokens a run')
    if BYTES not in log.read():
        count_bytes(options, log)
    for run in options.runs:
        if options.steps not in log.read().get(run, {}):
            train(run, options, log)
    report(log.read(), options)


if __name__ == '__main__':
    main()
