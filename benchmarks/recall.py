"""Whether the reach of each kind of attention helps: pairs to be recalled, and codes in text.

    python benchmarks/recall.py pairs --length 256 --out recall.jsonl [--kinds 'full' 'local 96']
    python benchmarks/recall.py pairs --length 1024 --out recall.jsonl
    python benchmarks/recall.py needles --length 4096 --out recall.jsonl
    python benchmarks/recall.py table --out recall.jsonl

* pairs: `data.recall`, a quarter as many pairs as the length; a model of d_model 64 with 2 layers
  and one head, trained until it is right in 99.5 % of the questions, for `--steps` and `--minutes`
  at most. Asked at
  four times the length too, where hashing gets four times the buckets.
* needles: `data.needles` in the sources of Python's standard library; d_model 128, 2 heads.
* table: what stands in the file.

The kinds are those of attentions.py. Asked of the default: 95 % of the accuracy of full attention,
which must itself reach 98 %, while a local window alone is at chance. What stands in the file of
results is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import attentions
import machine

from layercomb import data, models, optimizers, supervised, tl

FIRST = (
    'full, normalized, convolved',
    'local 96',
    'shared LSH 4 x 64',
    'mixed 5 + 3 x 8 + local 32',
    'hashed 8 x 8 + local 32',
    'hashed 4 x 16 + local 32',
    'blocks 8 x 8 + local 32',
    'blocks 4 x 16 + local 32',
)
N_VALUES, RIGHT, EVERY = 64, 0.995, 100


def pairs(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy at the length that is trained, and at four times that."""
    n_keys = 2 * options.length

    def task(length: int, seed: int, n: int) -> Any:
        return data.recall(length // 4, n_keys, N_VALUES, n_examples=n, seed=seed)

    def net(length: int) -> tl.Layer:
        return _model(kind, 1 + n_keys + N_VALUES, 64, 1, length, 4 * options.length)

    return _learned(net, task, options)


def needles(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the digits of codes, at the length that is trained and at four times that."""

    def task(length: int, seed: int, n: int) -> Any:
        text = data.python_stdlib('valid' if seed else 'train')
        return data.needles(text, length, n_needles=8, n_asked=8, n_examples=n, seed=seed)

    def net(length: int) -> tl.Layer:
        return _model(kind, 256, 128, 2, length, 4 * options.length)

    return _learned(net, task, options)


def _model(
    kind: str, vocabulary: int, width: int, n_heads: int, length: int, max_len: int
) -> tl.Layer:
    attention = attentions.KINDS[kind].make(n_heads, length)
    return models.TransformerLM(
        vocabulary, width, 4 * width, 2, n_heads, max_len=max_len, attention=attention,
        positions='rotary', norm=tl.RMSNorm(),
    )  # fmt: skip


def _learned(net: Any, task: Any, options: argparse.Namespace) -> dict[str, Any]:
    length, batch = options.length, max(1, options.tokens // options.length)
    rate = optimizers.warmup_cosine(options.rate, options.steps, 50, final_fraction=0.1)
    train = supervised.TrainTask(
        data.batches(task(length, 0, 10**6), batch, seed=0), tl.CrossEntropyLoss(),
        optimizers.adamw(rate, weight_decay=0.1),
    )  # fmt: skip

    def measured(length: int) -> float:
        examples = task(length, 1, 64)
        batches = data.batches(examples, max(1, 8 * options.length // length), num_epochs=1)
        asked = supervised.EvalTask(batches, tl.Accuracy(), name='asked')
        found = supervised.evaluate(net(length), loop.weights, loop.state, asked)
        return float(found['asked/accuracy'])

    loop = supervised.Loop(net(length), train, eval_every=None, seed=options.seed)
    start, cpu, right = time.perf_counter(), time.process_time(), 0.0
    while loop.step < options.steps and right < RIGHT:
        loop.run(loop.step + EVERY)
        right = measured(length)
        print(loop.step, round(right, 4), round(time.process_time() - cpu), flush=True)
        if time.perf_counter() - start > 60 * options.minutes:
            break
    seconds = (time.process_time() - cpu) / max(1, loop.step)
    return {
        'taken': loop.step,
        'right': right,
        'four': measured(4 * length),
        'cpu_s_a_step': round(seconds, 4),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text('utf-8').splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def table(path: Path) -> None:
    """Prints what stands in the file."""
    print('| task | attention | keys seen | steps | right | at four times | CPU s a step |')
    print('|---|---|---:|---:|---:|---:|---:|')
    for row in _rows(path):
        keys = attentions.KINDS[row['kind']].keys
        print(
            f'| {row["task"]}, {row["length"]:,} | {row["kind"]} | {keys or "all"} | '
            f'{row["taken"]} | {row["right"]:.3f} | {row["four"]:.3f} | {row["cpu_s_a_step"]} |'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', choices=('pairs', 'needles', 'table'))
    parser.add_argument('--out', type=Path, required=True, help='the file of results')
    parser.add_argument('--length', type=int, default=256)
    parser.add_argument('--kinds', nargs='+', default=FIRST, choices=tuple(attentions.KINDS))
    parser.add_argument('--steps', type=int, default=1500, help='at most')
    parser.add_argument('--minutes', type=float, default=20, help='for each kind, at most')
    parser.add_argument('--tokens', type=int, default=8192, help='of a batch')
    parser.add_argument('--rate', type=float, default=3e-3)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    if options.task != 'table':
        print(machine.describe('jaxlib', 'optax'))
        names = ('task', 'length', 'tokens', 'rate', 'seed', 'steps', 'minutes')
        settings = {name: getattr(options, name) for name in names}
        for kind in options.kinds:
            known = {**settings, 'kind': kind}
            if any(known.items() <= row.items() for row in _rows(options.out)):
                continue
            print(f'{kind}:', flush=True)
            row = {**known, **{'pairs': pairs, 'needles': needles}[options.task](kind, options)}
            with options.out.open('a', encoding='utf-8') as f:
                f.write(json.dumps(row) + '\n')
    table(options.out)


if __name__ == '__main__':
    main()
