"""What optimizers keep, and what models they train: bytes a parameter beside bits per byte.

python benchmarks/optimizer_memory.py --out optimizers.jsonl

One byte model is trained on Python's standard library with each optimizer, on the same batches in
the same order, from the same weights. Learning rates warm up and then come down along a cosine,
from a peak that was chosen for each optimizer, among halves and doubles, on a third of the steps; a
narrow form takes the peak of its full one. Bytes are those of the arrays of the optimizer's state,
over the parameters.

--step compiles a training step of a larger model, and prints what it takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import quality

import layercomb as lc
from layercomb import data, models, optimizers, supervised, tl
from layercomb.supervised import steps

narrow = optimizers.narrow_state

# The peak of the learning rate, and the optimizer for a schedule.
OPTIMIZERS: dict[str, tuple[float, Callable[[Any], Any]]] = {
    'Adam': (0.002, optimizers.adamw),
    'Adam, bfloat16': (0.002, lambda rate: narrow(optimizers.adamw(rate), 16)),
    'Adam, 8 bits': (0.002, lambda rate: narrow(optimizers.adamw(rate))),
    'Adafactor': (0.04, optimizers.adafactor),
    'SM3': (0.0125, optimizers.sm3),
    'SM3, 8 bits': (0.0125, lambda rate: narrow(optimizers.sm3(rate))),
    'Muon': (0.02, optimizers.muon),
    'Muon, 8 bits': (0.02, lambda rate: narrow(optimizers.muon(rate))),
}
PAIRS = [(name, name.partition(',')[0]) for name in OPTIMIZERS if ',' in name]
ASKED = 0.005  # how much worse a narrow form may be


def train(name: str, seed: int, options: argparse.Namespace) -> quality.Row:
    """Trains the model with one optimizer, and measures it.

    Args:
      name: of the optimizer.
      seed: of weights and data.
      options: of the command line.
    """
    peak, make = OPTIMIZERS[name]
    peak = options.learning_rate or peak
    rate = optimizers.warmup_cosine(peak, options.steps, options.steps // 10, final_fraction=0.05)
    net = models.TransformerLM(
        256, options.d_model, n_layers=options.layers, d_ff=4 * options.d_model,
        n_heads=options.d_model // 64, max_len=options.length,
    )  # fmt: skip
    batches = data.packed(data.python_stdlib('train'), options.length, options.batch, seed=seed)
    task = supervised.TrainTask(batches, tl.CrossEntropyLoss(), make(rate), clip_norm=1.0)
    loop = supervised.Loop(
        net, task, quality.valid(options), seed=seed, eval_every=None, log_every=options.steps,
        progress=False,
    )  # fmt: skip
    loop.run(1)  # compiles
    cpu = time.process_time()
    row = loop.run(options.steps)
    n = lc.trees.count(loop.weights)
    return {
        'run': f'{name}/{seed}',
        'step': row['step'],
        'peak': peak,
        'parameters': n,
        'bytes': lc.trees.n_bytes(loop.opt_state) / n,
        'bits': row['valid/bits_per_byte'],
        'cpu_s': round(time.process_time() - cpu, 1),
    }


def report(rows: dict[str, quality.Row], seeds: list[int]) -> None:
    """Prints the table, and what is asked for.

    Args:
      rows: by run, 'optimizer/seed'.
      seeds: that were run.
    """
    some = next(iter(rows.values()))
    print(f'\n{some["parameters"]:,} parameters\n')
    shown = ' | '.join(f'bits per byte, seed {seed}' for seed in seeds)
    print(f'| optimizer | peak of the rate | bytes a parameter | {shown} | CPU s |')
    print('|---|' + '---:|' * (len(seeds) + 3))
    for name in OPTIMIZERS:
        found = [rows[f'{name}/{seed}'] for seed in seeds if f'{name}/{seed}' in rows]
        if found:
            bits = ' | '.join(f'{row["bits"]:.4f}' for row in found)
            cpu = sum(row['cpu_s'] for row in found) / len(found)
            first = found[0]
            print(f'| {name} | {first["peak"]:g} | {first["bytes"]:.3f} | {bits} | {cpu:.0f} |')
    print()
    for name, full in PAIRS:
        both = [(rows.get(f'{name}/{s}'), rows.get(f'{full}/{s}')) for s in seeds]
        worse = [a['bits'] / b['bits'] - 1 for a, b in both if a and b]
        if worse:
            mean = sum(worse) / len(worse)
            said = ', '.join(f'{x:+.2%}' for x in worse)
            met = 'met' if mean <= ASKED else 'missed'
            print(f'{name} beside {full}: {said}, mean {mean:+.2%} (at most {ASKED:+.1%}: {met})')


def print_steps() -> None:
    """Prints what a training step takes, in bytes a parameter: nothing is computed."""
    net = models.TransformerLM(256, 512, 2048, n_layers=8, n_heads=8, max_len=128)
    row = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    batch, key = (row, row, jax.ShapeDtypeStruct((1, 128), jnp.float32)), jax.random.key(0)
    weights, state = jax.eval_shape(lambda: net.init(lc.signature_of(row), key))
    n = lc.trees.count(weights)
    print(f'\n{n:,} parameters, a row of 128 tokens\n')
    print('| optimizer | weights | state | gradients and temporaries | in all |')
    print('|---|---:|---:|---:|---:|')
    for name in ('Adam', 'Adam, bfloat16', 'Adam, 8 bits', 'Muon', 'Muon, 8 bits'):
        optimizer = optimizers.bound(OPTIMIZERS[name][1](1e-3), net)
        with jax.numpy_dtype_promotion('standard'):
            kept = jax.eval_shape(optimizer.init, weights)
        step: Any = steps.compiled(net, tl.CrossEntropyLoss(), optimizer, 1, None)
        carry = steps.Carry(weights, state, kept, jax.ShapeDtypeStruct((), jnp.int32))
        frozen = jax.tree.map(lambda _: None, weights)
        memory = step.lower(carry, frozen, key, batch).compile().memory_analysis()
        found = [lc.trees.n_bytes(weights), lc.trees.n_bytes(kept), memory.temp_size_in_bytes]
        cells = ' | '.join(f'{x / n:.2f}' for x in (*found, sum(found)))
        print(f'| {name} | {cells} |', flush=True)


def main() -> None:
    """Runs what has not been run with these settings, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, help='the file of results')
    parser.add_argument('--step', action='store_true', help='print what a step takes, and end')
    parser.add_argument('--only', nargs='*', default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument('--seeds', nargs='*', type=int, default=[0])
    parser.add_argument('--learning-rate', type=float, help='another peak, to choose one')
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--d-model', type=int, default=128)
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--length', type=int, default=256)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--eval-batches', type=int, default=8, help='of 16 rows each')
    options = parser.parse_args()
    if options.step:
        print(machine.describe('jaxlib', 'optax'))
        print_steps()
        return
    if options.out is None:
        parser.error('give --out FILE, or --step')
    settings = {k: v for k, v in vars(options).items() if k not in ('out', 'only', 'seeds', 'step')}
    log = quality.Log(options.out, settings)
    print(machine.describe('jaxlib', 'optax'))
    tokens = options.steps * options.batch * options.length
    print(f'{settings}; {tokens:,} tokens a run', flush=True)
    for seed in options.seeds:
        for name in options.only:
            if not log.read().get(f'{name}/{seed}'):
                row = train(name, seed, options)
                log.write(row)
                print(row, flush=True)
    report({run: next(iter(rows.values())) for run, rows in log.read().items()}, options.seeds)


if __name__ == '__main__':
    main()
