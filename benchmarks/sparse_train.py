"""What a training step with sparse layers costs: sparse against dense, in turns.

    python benchmarks/sparse_train.py [--length 512] [--batch 4] [--repeats 7]

A step, with its loss, gradient and optimizer, of `TerraformerLM` with d_model 512, d_ff 2048 and
six layers, the paper's smaller shape, dense and sparse. Of `SparseFF` every unit is computed in
training, and the controller, its noise and its softmax come on top. A mixture computes chosen
experts only. Projections of queries, keys and values become cheaper. CPU seconds over all threads,
the median of the repeats, and the temporaries that XLA plans.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import machine
import numpy as np
import optax

import layercomb as lc
from layercomb import models, tl
from layercomb.supervised import steps

D_FF = 2048
SIZES = {'vocab_size': 256, 'd_model': 512, 'd_ff': D_FF, 'n_layers': 6, 'n_heads': 8}
OFF: dict[str, Any] = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}


def mixture(n_experts: int, n_chosen: int, n_shared: int) -> dict[str, Any]:
    """A mixture of as many units as the dense feed-forward has."""
    layer = tl.MixtureFF(
        D_FF, n_experts, n_chosen, n_shared, activation='relu2', gated=False, use_bias=True
    )
    return {**OFF, 'ff': layer}


KINDS = {
    'dense': OFF,
    'FF, N = 64': {**OFF, 'ff_block_size': 64},
    'FF, N = 16': {**OFF, 'ff_block_size': 16},
    'QKV, S = 16': {**OFF, 'qkv_modules': 16},
    'FF 64 and QKV 16': {**OFF, 'ff_block_size': 64, 'qkv_modules': 16},
    'mixture, 1/4': mixture(64, 14, 2),
    'mixture, 1/8': mixture(64, 7, 1),
    'mixture, 1/16': mixture(64, 3, 1),
    'mixture, 1/64': mixture(64, 1, 0),
}


def make_step(sparse: dict[str, Any], batch: int, length: int) -> tuple[Callable[[], None], int]:
    """A function that takes a step, and the bytes of its temporaries."""
    net = models.TerraformerLM(**SIZES, max_len=length, **sparse)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (batch, length)).astype(np.int32)
    data = (tokens, np.roll(tokens, -1, 1), np.ones((batch, length), np.float32))
    weights, state = jax.jit(net.init)(lc.signature_of((tokens,)), jax.random.key(0))
    optimizer = optax.adam(1e-3)
    key = jax.random.key(1)
    carry = steps.Carry(weights, state, optimizer.init(weights), np.int32(0))
    frozen = jax.tree.map(lambda _: None, weights)
    step = steps.compiled(net, tl.CrossEntropyLoss(), optimizer, 1, None)
    program = step.lower(carry, frozen, key, data).compile()

    def run() -> None:
        nonlocal carry
        carry, metrics = program(carry, frozen, key, data)
        jax.block_until_ready(metrics)

    return run, program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=512)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--repeats', type=int, default=7)
    options = parser.parse_args()
    print(machine.describe('jaxlib', 'optax'))
    print(f'{SIZES}, {options.batch} × {options.length} tokens')
    made = {label: make_step(kind, options.batch, options.length) for label, kind in KINDS.items()}
    times: dict[str, list[float]] = {label: [] for label in made}
    for run, _ in made.values():
        run()
    for _ in range(options.repeats):
        for label, (run, _) in made.items():
            start = time.process_time()
            run()
            times[label].append(time.process_time() - start)
    median = {label: sorted(t)[len(t) // 2] for label, t in times.items()}
    print('\n| | CPU s a step | / dense | temporaries, MiB |\n|---|---:|---:|---:|')
    for label, (_, temporaries) in made.items():
        ratio = median[label] / median['dense']
        print(f'| {label} | {median[label]:.2f} | {ratio:.2f}× | {temporaries / 2**20:.0f} |')
    worst = max(median.values()) / median['dense']
    print(f'\nat most 1.3× is asked: {"met" if worst <= 1.3 else "not met"} ({worst:.2f}×)')
    few = max(median[f'mixture, 1/{n}'] for n in (8, 16, 64)) / median['dense']
    print(f'below dense from 1/8 on is asked: {"met" if few < 1 else "not met"} ({few:.2f}×)')


if __name__ == '__main__':
    main()
