"""The duplication task of the Reformer's paper: trained with some hashes, evaluated with others.

    python benchmarks/duplication.py [--length 128] [--train full 4 2 1]

Model and recipe are those of `gin_configs/reformer_duplication.gin`, at length 128. At 512 and 1024
(the paper's) chunks grow with the length, so that there are as many buckets, and so does the number
of steps: 1024 has the paper's sizes, at a fraction of its 150,000 steps.

Each row trains one model and then evaluates the same weights: with 'full', which is shared-QK
attention to every earlier position (one bucket, one chunk), and with 8, 4, 2 and 1 rounds of
hashing. Printed is the accuracy on the second half, in percent, on examples of a seed that neither
training nor the configuration's own validation has. For weights trained with 4 hashes it is asked
to be 100 within 0.2 with 8 and with 4, and to fall with 2 and with 1.
"""

from __future__ import annotations

import argparse
import time

import machine

from layercomb import cli, supervised, tl, transforms
from layercomb.launcher.experiment import Experiment

CONFIG = cli.find_config('reformer_duplication')
EVALUATED = ('full', '8', '4', '2', '1')
SEED = 2


def experiment(length: int, steps: int, n_examples: int) -> Experiment:
    """The configuration's, for another length, evaluated on `n_examples` fresh examples."""
    bindings = (
        f'LENGTH = {length}',
        f'STEPS = {steps}',
        f'models.ReformerLM.chunk_len = {length // 8}',
        f'valid/data.duplication.seed = {SEED}',
        f'valid/data.duplication.n_examples = {n_examples}',
        'supervised.EvalTask.n_batches = None',
    )
    with cli.configured(CONFIG.read_text('utf-8'), bindings, CONFIG.name) as config:
        return config.build()


def with_hashes(net: tl.Layer, hashes: str, length: int) -> tl.Layer:
    """The same model, for the same weights, with 'full' attention or some rounds of hashing."""
    if hashes == 'full':
        changes = {'n_hashes': 1, 'n_buckets': 1, 'chunk_len': length}
    else:
        changes = {'n_hashes': int(hashes)}

    def change(layer: tl.Layer) -> tl.Layer:
        return layer.replace(**changes) if isinstance(layer, tl.LSHSelfAttention) else layer

    return transforms.rewrite(net, change)


def row(made: Experiment, hashes: str, length: int) -> dict[str, float]:
    """Trains with some hashes; returns the accuracy in percent with each."""
    net = with_hashes(made.model, hashes, length)
    loop = supervised.Loop(net, made.train_task, seed=made.seed, eval_every=None)
    loop.run(made.steps)
    accuracy = {}
    for evaluated in EVALUATED:
        net = with_hashes(made.model, evaluated, length)
        measured = supervised.evaluate(net, loop.weights, loop.state, made.eval_tasks)
        accuracy[evaluated] = 100 * measured['valid/accuracy']
    return accuracy


def judge(accuracy: dict[str, float]) -> None:
    """Prints whether a model trained with 4 hashes does what is asked."""
    near = all(accuracy[hashes] >= 99.8 for hashes in ('8', '4'))
    falls = accuracy['4'] > accuracy['2'] > accuracy['1']
    print(f'trained with 4 hashes: 100 % within 0.2 with 8 and 4: {"met" if near else "not met"}')
    print(f'and falling with 2 and 1: {"met" if falls else "not met"}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=128, choices=(128, 512, 1024))
    parser.add_argument('--train', nargs='+', default=['4'], choices=EVALUATED)
    parser.add_argument('--steps', type=int, help='by default 500 at length 128, in proportion')
    parser.add_argument('--examples', type=int, default=512, help='in each evaluation')
    options = parser.parse_args()
    length = options.length
    steps = options.steps or 500 * length // 128
    made = experiment(length, steps, options.examples)
    print(machine.describe('jaxlib', 'optax'))
    print(f'length {length}, {steps} steps, accuracy in % on {options.examples} fresh examples')
    print(f'| trained with | {" | ".join(EVALUATED)} | CPU s | wall s |')
    print(f'|---|{"---:|" * (len(EVALUATED) + 2)}')
    table = {}
    for hashes in options.train:
        cpu, wall = time.process_time(), time.perf_counter()
        table[hashes] = row(made, hashes, length)
        cells = ' | '.join(f'{x:.2f}' for x in table[hashes].values())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(f'| {hashes} | {cells} | {cpu:.0f} | {wall:.0f} |', flush=True)
    if '4' in table:
        judge(table['4'])


if __name__ == '__main__':
    main()
