"""What training in bfloat16 loses: each model beside itself in float32, from the same weights.

python benchmarks/bfloat16_training.py --out bfloat16.jsonl

Byte models are trained on Python's standard library, with the same batches in the same order. In
bfloat16 (`transforms.cast`) layers compute in bfloat16; weights, norms, softmaxes, losses and the
streams of residuals stay float32. At each of several steps both are measured on the same held-out
batches in their own precision, so the rows are two curves. On a CPU bfloat16 is slower: times say
nothing of a GPU, and are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import quality

from layercomb import data, models, optimizers, supervised, tl, transforms

POINTS = 5  # of a curve
ASKED = 0.005  # how much worse bfloat16 may be at the end
DTYPES = ('float32', 'bfloat16')


def _sizes(options: argparse.Namespace) -> tuple[int, ...]:
    d = options.d_model
    return 256, d, 4 * d, options.layers, d // 32, options.length


MODELS: dict[str, Callable[[argparse.Namespace], tl.Layer]] = {
    'Transformer': lambda o: models.TransformerLM(*_sizes(o)),
    'Llama': lambda o: models.Llama(
        256, o.d_model, 3 * o.d_model, n_layers=o.layers, n_heads=o.d_model // 32, max_len=o.length
    ),
    'Reformer': lambda o: models.ReformerLM(*_sizes(o)),
    'Terraformer': lambda o: models.TerraformerLM(*_sizes(o)),
    'Mixture': lambda o: models.TransformerLM(*_sizes(o), ff=tl.MixtureFF(4 * o.d_model, 16, 3, 1)),
}


def train(name: str, dtype: str, options: argparse.Namespace, log: quality.Log) -> None:
    """Trains one model in one precision, and writes its curve."""
    net = MODELS[name](options)
    if dtype != 'float32':
        net = transforms.cast(net, dtype)
    rate = optimizers.warmup_cosine(0.002, options.steps, options.steps // 10, final_fraction=0.05)
    batches = data.packed(data.python_stdlib('train'), options.length, options.batch, seed=0)
    task = supervised.TrainTask(
        batches, tl.CrossEntropyLoss(), optimizers.adamw(rate), clip_norm=1.0
    )
    loop = supervised.Loop(
        net, task, quality.valid(options), seed=0, eval_every=None, log_every=options.steps,
        progress=False,
    )  # fmt: skip
    for i in range(1, POINTS + 1):
        row = loop.run(options.steps * i // POINTS)
        found = {'step': row['step'], 'bits': row['valid/bits_per_byte']}
        log.write({'run': f'{name}/{dtype}', **found})
        print(name, dtype, found, flush=True)


def report(done: quality.Done, names: list[str], steps: int) -> None:
    """Prints the curves, and how far they are apart at the end."""
    at = [steps * i // POINTS for i in range(1, POINTS + 1)]
    print(f'\n| bits per byte after steps | {" | ".join(map(str, at))} |')
    print('|---|' + '---:|' * POINTS)
    for name in names:
        for dtype in DTYPES:
            bits = [done[f'{name}/{dtype}'][step]['bits'] for step in at]
            print(f'| {name}, {dtype} | ' + ' | '.join(f'{x:.4f}' for x in bits) + ' |')
    print()
    for name in names:
        wide, narrow = (done[f'{name}/{dtype}'][steps]['bits'] for dtype in DTYPES)
        worse: Any = narrow / wide - 1
        met = 'met' if worse <= ASKED else 'missed'
        print(f'{name}: bfloat16 beside float32 {worse:+.2%} (at most {ASKED:+.1%}: {met})')


def main() -> None:
    """Runs what has not been run with these settings, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='the file of results')
    parser.add_argument('--only', nargs='*', default=list(MODELS), choices=MODELS)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--d-model', type=int, default=128)
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--length', type=int, default=256)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--eval-batches', type=int, default=8, help='of 16 rows each')
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k not in ('out', 'only')}
    log = quality.Log(options.out, settings)
    print(machine.describe('jaxlib'))
    for name in options.only:
        for dtype in DTYPES:
            if options.steps not in log.read().get(f'{name}/{dtype}', {}):
                train(name, dtype, options, log)
    report(log.read(), options.only, options.steps)


if __name__ == '__main__':
    main()
