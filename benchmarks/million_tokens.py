"""One whole training step at 1,048,576 tokens: the peak memory of the process, and the time.

    python benchmarks/million_tokens.py [--length 1048576] [--steps 1]

The model, the data and the optimizer are those of gin_configs/reformer_1m.gin, and the step is the
one that ``layercomb train reformer_1m`` takes: forward, backward, update. Peak memory is that of
the whole process, libraries and compiler included; XLA's plan for the temporaries stands beside it,
in bytes and in residual streams, L · d_model · 4 bytes, of which five are the least: two streams,
their gradients, and one to work in.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import machine

from layercomb import cli, supervised

MILLION, AT_MOST = 1 << 20, 12e9


def experiment(length):
    """The experiment of the configuration, at a length."""
    text = cli.find_config('reformer_1m').read_text()
    with cli.configured(text, (f'LENGTH = {length}',), 'reformer_1m') as config:
        return config.build()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=MILLION)
    parser.add_argument('--steps', type=int, default=1)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error('--steps must be 1 at least')
    print(machine.describe('jaxlib', 'optax'), flush=True)
    made = experiment(options.length)
    planned = made.training_bytes()['temporaries']
    stream = options.length * 256 * 4
    temporaries = f'{planned / 1e9:.2f} GB, {planned / stream:.1f} residual streams'
    print(f'{options.length:,} tokens; temporaries, as XLA plans them: {temporaries}', flush=True)
    loop = supervised.Loop(
        made.model, made.train_task, seed=made.seed, eval_every=None, progress=False
    )
    for number in range(1, options.steps + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        row = loop.run(number)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        unit = 1 if sys.platform == 'darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        seconds = f'{cpu:.0f} CPU s, {wall:.0f} s of wall time, compilation included'
        print(f'step {number}: loss {row["train/loss"]:.3f}; {seconds};', end=' ')
        print(f'peak resident memory {peak / 1e9:.2f} GB', flush=True)
    if options.length == MILLION:
        met = 'met' if peak <= AT_MOST else 'not met'
        print(f'asked: at most {AT_MOST / 1e9:.0f} GB: {met}')


if __name__ == '__main__':
    main()
