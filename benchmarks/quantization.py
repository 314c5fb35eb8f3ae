"""What narrow weights cost in quality, and how near their products come to the memory's speed.

    python benchmarks/quantization.py [--run_dir DIR] [--only quality | speed] [--rows 1]

Quality: the model of a run (by default `reformer_python`, trained here for three minutes) with
weights of 16, 8 and 4 bits in groups of several sizes: bytes of all weights, the error of the
logits relative to their spread, and the loss on held-out data in bits per byte.

Speed: GPT-2's matrices, in microseconds a product, as many copies in turn as are larger than the
caches, by XLA in float32 and by `layercomb_kernels`; on one thread and on two, each beside the read
bandwidth of so many threads, measured between the products. Scales count among the bytes read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import machine
import numpy as np

SHAPES = [(768, 2304), (768, 3072), (3072, 768), (768, 50257)]
KINDS = ('XLA float32', 'XLA int8', 'bfloat16', 'int8', 'int4')
PAST_CACHES = 100_000_000  # bytes
GROUPS = (32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--run_dir', help='a run, whose model to quantize')
    parser.add_argument('--only', choices=('quality', 'speed'))
    parser.add_argument('--rows', type=int, default=1, help='how many rows to multiply')
    parser.add_argument('--threads', type=int, help='measure speed on so many alone')
    options = parser.parse_args()
    if options.threads:
        speed(options.threads, options.rows)
        return
    print(machine.describe())
    if options.only != 'speed':
        with tempfile.TemporaryDirectory() as directory:
            quality(options.run_dir or trained(directory))
    if options.only != 'quality':
        for threads in (1, 2):  # XLA counts its threads at the start
            command = [sys.executable, __file__, '--threads', str(threads)]
            subprocess.run([*command, '--rows', str(options.rows)], check=True)


def trained(directory: str) -> str:
    command = [sys.executable, '-m', 'layercomb', 'train', 'reformer_python']
    subprocess.run([*command, '--output_dir', directory], check=True)
    return directory


def quality(run_dir: str) -> None:
    import jax
    import jax.numpy as jnp

    from layercomb import cli, transforms, trees
    from layercomb.launcher import runs
    from layercomb.supervised import evaluate

    with cli.configured(runs.config_of(run_dir), (), run_dir) as config:
        experiment = config.build()
        signature = experiment.batch_signature()[: experiment.model.n_in]
        model, step = runs.last_model(run_dir, experiment.model, signature)
        tokens = jnp.asarray(next(iter(experiment.eval_tasks[0].data))[0])
        apply = jax.jit(lambda net, w: net.apply(w, model.state, (tokens,))[0][0], static_argnums=0)
        wide = apply(model.layer, model.weights)
        print(f'\n{run_dir}, step {step}\n{"":<22}{"bytes":>12}{"logits":>9}{"bits per byte":>15}')
        cases = [('float32', None, 0), ('bfloat16', 16, 64)]
        cases += [(f'int{bits}, groups of {g}', bits, g) for bits in (8, 4) for g in GROUPS]
        for name, bits, group in cases:
            net, weights = model.layer, model.weights
            if bits:
                net, weights = transforms.quantize(net, weights, bits, group)
            error = float(jnp.linalg.norm(apply(net, weights) - wide) / jnp.linalg.norm(wide))
            measured = evaluate(net, weights, model.state, experiment.eval_tasks)
            loss = next(v for k, v in measured.items() if k.endswith('bits_per_byte'))
            print(f'{name:<22}{trees.n_bytes(weights):>12,}{error:>9.4f}{loss:>15.4f}')


def speed(threads: int, rows: int) -> None:
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import layercomb_kernels

    print(f'\n{rows} rows, {threads} threads: µs, and GB/s of {read_bandwidth(threads):.1f} read')
    if not layercomb_kernels.available():
        print(f'no kernels: {layercomb_kernels.why_not()}')
    print(f'{"":<12}' + ''.join(f'{kind:>19}' for kind in KINDS))
    for shape in SHAPES:
        cells = [product(kind, shape, rows) for kind in KINDS]
        text = ''.join(f'{1e6 * s:>11,.0f} {n / s / 1e9:>7.1f}' for s, n in cells)
        print(f'{shape[0]}×{shape[1]:<8}{text}', flush=True)
    print(f'read {read_bandwidth(threads):.1f} GB/s at the end')


def product(kind: str, shape: tuple[int, int], rows: int) -> tuple[float, int]:
    """Seconds for a product, and the bytes of its weights."""
    import jax
    import jax.numpy as jnp

    import layercomb_kernels
    from layercomb.layers.quantized.matrix import Narrow, narrow

    wide = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    bits = {'bfloat16': 16, 'int4': 4}.get(kind, 8)
    made: Any = wide if kind == 'XLA float32' else Narrow(*narrow(wide, 'io', bits, 64), 'io', bits)
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(made))
    copies = max(1, min(48, PAST_CACHES // n_bytes)) if kind != 'XLA int8' else 2
    matrices = [jax.tree.map(jnp.copy, made) for _ in range(copies)]
    x = jnp.ones((rows, shape[0]))

    def run(x: Any, matrices: Any) -> Any:
        for w in matrices:
            y = x @ w if kind == 'XLA float32' else w.product(x)
            x = x + 1e-30 * y[:, :1]  # one after the other
        return x

    if kind == 'XLA int8':
        with layercomb_kernels.off():
            return best(jax.jit(run), x, matrices) / copies, n_bytes
    return best(jax.jit(run), x, matrices) / copies, n_bytes


def read_bandwidth(threads: int) -> float:
    """GB/s at which so many threads find the largest of floats, each of its own."""
    parts = [np.ones(PAST_CACHES // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = best(lambda: list(pool.map(np.max, parts)))
    return sum(x.nbytes for x in parts) / seconds / 1e9


def best(run: Callable[..., Any], *args: Any, seconds: float = 0.7) -> float:
    """The quickest of the calls that so many seconds hold."""
    import jax

    jax.block_until_ready(run(*args))
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - before)
    return min(times)


if __name__ == '__main__':
    main()
