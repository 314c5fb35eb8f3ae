"""What the comparisons of quality share: models of Python, trained alike, measured on one text.

The models have the same sizes, data in the same order, optimizer and budget. So that untrained
models do not tie, the baseline must predict better than a Witten-Bell byte model of order 3 on the
same batches, and its last quarter must improve it by less than 3 %. The learning rate comes down
along a cosine in three quarters of the budget and then stays at a floor, where training goes on:
what could be learnt by lowering it further is left out for all alike.

Each evaluation is appended to a file of JSON lines, and what stands there is not run again: a run
that was stopped starts anew, finished ones are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np

import layercomb as lc
from layercomb import data, optimizers, supervised, tl
from layercomb.layers.core.walk import walk

SEEDS = (0, 1)
BYTES = 'Witten-Bell, order 3'

Row = dict[str, Any]
Done = dict[str, dict[int, Row]]  # 'model/seed' -> step -> row
Models = dict[str, Callable[[argparse.Namespace], tl.Layer]]  # the first one is the baseline
Denser = dict[str, tuple[tuple[float, int], ...]]  # until which part of the steps, by what factor
Pairs = Sequence[tuple[str, str, float | None]]  # a model, its peer, how much worse it may be


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


def train(models: Models, run: str, options: argparse.Namespace, log: Log, denser: Denser) -> None:
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
        denser=tuple((round(part * steps), factor) for part, factor in denser.get(name, ())),
    )
    net = models[name](options)
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
    tokens = next(iter(valid(options).batches()))[0]
    for path, share in loads(net, loop.weights, loop.state, tokens).items():
        print(f'{run} {path}: choices of an expert, beside the mean: {share}', flush=True)


def loads(net: tl.Layer, weights: Any, state: Any, tokens: Any) -> dict[str, str]:
    """The least, median and most choices of the experts of each mixture, over the mean.

    Args:
      net, weights, state: a language model.
      tokens: a batch of its inputs.
    """
    found = {}
    for path, layer in walk(net):
        if not isinstance(layer, tl.MixtureFF):
            continue
        before = path.rpartition('/')[0] + '/rms_norm'
        _, seen = lc.capture(net, weights, state, (tokens,), before)
        routers = lc.trees.get(weights, path)['router']  # stacked over depth, as `seen` is
        for i, x in enumerate(seen[before]):
            router = jax.tree.map(lambda w, i=i: w[i], routers)
            s = layer.scores(router, x.reshape(-1, x.shape[-1]))
            n = np.bincount(np.asarray(layer.choices(router, s)).reshape(-1), minlength=s.shape[1])
            least, middle, most = np.quantile(n / n.mean(), (0, 0.5, 1))
            found[f'{path}, {i}'] = f'{least:.2f}, {middle:.2f}, {most:.2f}'
    return found


def count_bytes(options: argparse.Namespace, log: Log) -> None:
    """Measures the byte model."""
    batches = valid(options).batches()
    bits = data.witten_bell_bits_on_batches(data.python_stdlib('train'), batches, orders=[3])[3]
    log.write({'run': BYTES, 'step': 0, 'bits': bits})


def report(models: Models, pairs: Pairs, done: Done, options: argparse.Namespace) -> None:
    """Prints the table of runs, and what is asked for if all are there."""
    end, before = options.steps, 3 * options.steps // 4
    bits_of_bytes = done[BYTES][0]['bits']
    print(f'\n{BYTES}: {bits_of_bytes:.4f} bits per byte on the same batches\n')
    print('| model | seed | parameters | bits per byte | at 3/4 | last quarter | CPU s | wall s |')
    print('|---|---:|---:|---:|---:|---:|---:|---:|')
    runs = {(name, seed): done.get(f'{name}/{seed}', {}) for name in models for seed in SEEDS}
    for (name, seed), rows in runs.items():
        if end in rows:
            row, bits = rows[end], rows[before]['bits']
            print(
                f'| {name} | {seed} | {row["parameters"]:,} | {row["bits"]:.4f} | {bits:.4f} | '
                f'{1 - row["bits"] / bits:.2%} better | {row["cpu_s"]} | {row["wall_s"]} |'
            )
    last = {key: rows[end]['bits'] for key, rows in runs.items() if end in rows}
    compare(last, pairs)
    baseline = next(iter(models))
    known = [s for s in SEEDS if (baseline, s) in last]
    gains = [1 - last[baseline, s] / runs[baseline, s][before]['bits'] for s in known]
    if gains:
        worst = max(last[baseline, s] for s in known)
        print(f'\nthe baseline beats the byte model: {_met(worst < bits_of_bytes)}')
        print(
            f'its last quarter improves it by less than 3 %: {_met(max(gains) < 0.03)} '
            f'({", ".join(f"{gain:.2%}" for gain in gains)})'
        )


def compare(last: dict[tuple[str, int], float], pairs: Pairs) -> None:
    """Prints each difference on the seeds that both models have, beside the seeds' spread."""
    print('\n| against | ' + ' | '.join(f'seed {s}' for s in SEEDS) + ' | mean | asked | |')
    print('|---|' + '---:|' * (len(SEEDS) + 2) + '---|')
    for model, peer, limit in pairs:
        known = [s for s in SEEDS if (model, s) in last and (peer, s) in last]
        if not known:
            continue
        worse = {s: last[model, s] / last[peer, s] - 1 for s in known}
        mean = sum(worse.values()) / len(worse)
        cells = [f'{worse[s]:+.2%}' if s in worse else '' for s in SEEDS] + [f'{mean:+.2%}']
        asked = '|' if limit is None else f'at most {limit:+.0%} | {_met(mean <= limit)}'
        print(f'| {model} / {peer} | {" | ".join(cells)} | {asked} |')
    for model in dict.fromkeys(model for model, _ in last):
        bits = [last[model, s] for s in SEEDS if (model, s) in last]
        if len(bits) == len(SEEDS):
            print(f'\nspread of the seeds, {model}: {max(bits) / min(bits) - 1:.2%}', end='')
    print()


def _met(condition: bool) -> str:
    return 'met' if condition else 'not met'


def parser(description: str, models: Models, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all comparisons have; `defaults` are theirs."""
    made = argparse.ArgumentParser(description=description)
    every = [f'{name}/{seed}' for seed in SEEDS for name in models]
    made.add_argument('--out', type=Path, required=True, help='the file of results')
    made.add_argument('--runs', nargs='*', default=every, choices=every, metavar='MODEL/SEED')
    made.add_argument('--steps', type=int)
    made.add_argument('--length', type=int, default=512)
    made.add_argument('--batch', type=int, default=4)
    made.add_argument('--learning-rate', type=float, default=0.02)
    made.add_argument('--eval-batches', type=int, default=16, help='of 16 rows each')
    made.set_defaults(**defaults)
    return made


def study(
    models: Models,
    pairs: Pairs,
    sizes: Row,
    options: argparse.Namespace,
    denser: Denser | None = None,
) -> Done:
    """Runs what has not been run, prints the tables, and returns all that is known."""
    settings = {k: v for k, v in vars(options).items() if k not in ('out', 'runs')}
    log = Log(options.out, settings)
    print(machine.describe('jaxlib', 'optax'))
    tokens = options.steps * options.batch * options.length
    print(f'{sizes}; {settings}; {tokens:,} tokens a run')
    if BYTES not in log.read():
        count_bytes(options, log)
    for run in options.runs:
        if options.steps not in log.read().get(run, {}):
            train(models, run, options, log, denser or {})
    report(models, pairs, log.read(), options)
    return log.read()
