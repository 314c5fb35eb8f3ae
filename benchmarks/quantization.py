"""What narrow weights cost in quality, and how near their products come to the memory's speed.

    python benchmarks/quantization.py [--run_dir DIR] [--only quality | smollm2 | minilm | speed]
                                      [--rows 1] [--case TEXT] [--windows 64]

Quality: the model of a run (by default `reformer_python`, trained here for three minutes) with
weights of 16, 8 and 4 bits in groups of several sizes: bytes of all weights, the error of the
logits relative to their spread, and the loss on held-out data in bits per byte, with the ratio of
perplexities of a byte. 8 and 4 bits are rounded to the nearest, and for the inputs that matrices
get from 8 batches of training data; with 4 bits, the table is in 8.

SmolLM2: the same of SmolLM2-135M, whose weights come in 4 bits and are first trained for 200 steps
of 64 tokens: perplexity of 8,192 tokens of held-out text of the kind that it was trained on and
calibrated with (`--windows` of 256 tokens), Python's documentation; its ratio to that of the wide
model; and the nats by which tokens are foretold otherwise (KL). `--case` runs rows whose name has a
text, of the quality too.

MiniLM: the sentence encoder all-MiniLM-L6-v2; the cosine between embeddings by the wide weights and
by narrow ones, the mean and the least of 256 sentences of that documentation. Other sentences of it
calibrate.

Speed: GPT-2's matrices, in microseconds a product, as many copies in turn as are larger than the
caches, by XLA in float32 and by `layercomb_kernels`; on one thread and on two, each beside the read
bandwidth of so many threads, measured between the products. Scales count among the bytes read.
"""

from __future__ import annotations

import argparse
import functools
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
    parser.add_argument('--only', choices=('quality', 'smollm2', 'minilm', 'speed'))
    parser.add_argument('--rows', type=int, default=1, help='how many rows to multiply')
    parser.add_argument('--case', default='', help='the rows whose name has this text')
    parser.add_argument('--windows', type=int, default=64, help='that smollm2 is calibrated with')
    parser.add_argument('--threads', type=int, help='measure speed on so many alone')
    options = parser.parse_args()
    if options.threads:
        speed(options.threads, options.rows)
        return
    print(machine.describe())
    if options.only in (None, 'quality'):
        with tempfile.TemporaryDirectory() as directory:
            quality(options.run_dir or trained(directory), options.case)
    if options.only in (None, 'smollm2'):
        smollm2(options.case, options.windows)
    if options.only in (None, 'minilm'):
        minilm(options.case)
    if options.only in (None, 'speed'):
        for threads in (1, 2):  # XLA counts its threads at the start
            command = [sys.executable, __file__, '--threads', str(threads)]
            subprocess.run([*command, '--rows', str(options.rows)], check=True)


def trained(directory: str) -> str:
    command = [sys.executable, '-m', 'layercomb', 'train', 'reformer_python']
    subprocess.run([*command, '--output_dir', directory], check=True)
    return directory


def quality(run_dir: str, case: str) -> None:
    import jax
    import jax.numpy as jnp

    from layercomb import cli, transforms, trees
    from layercomb.launcher import runs
    from layercomb.supervised import evaluate

    with cli.configured(runs.config_of(run_dir), (), run_dir) as config:
        experiment = config.build()
        signature = experiment.batch_signature()[: experiment.net.n_in]
        model, step = runs.saved_model(run_dir, experiment.net, signature, 'last')
        tokens = jnp.asarray(next(iter(experiment.eval_tasks[0].data))[0])
        training = iter(experiment.train_task.data)
        read = [next(training)[0] for _ in range(8)]
        apply = jax.jit(lambda net, w: net.apply(w, model.state, (tokens,))[0][0], static_argnums=0)
        wide = apply(model.layer, model.weights)
        print(f'\n{run_dir}, step {step}')
        print(f'{"":<34}{"bytes":>12}{"logits":>9}{"bits per byte":>15}{"ratio":>9}')
        first = None
        for name, options in [(n, o) for n, o in cases(read) if case in n or not o]:
            net, weights = model.layer, model.weights
            if options:
                net, weights = transforms.quantize(net, weights, **options)
            error = float(jnp.linalg.norm(apply(net, weights) - wide) / jnp.linalg.norm(wide))
            measured = evaluate(net, weights, model.state, experiment.eval_tasks)
            loss = next(v for k, v in measured.items() if k.endswith('bits_per_byte'))
            first = loss if first is None else first
            size, ratio = trees.n_bytes(weights), 2 ** (loss - first)
            print(f'{name:<34}{size:>12,}{error:>9.4f}{loss:>15.4f}{ratio:>9.4f}', flush=True)


def cases(read: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names, and the arguments of `quantize`: none for the wide model."""
    made: list[tuple[str, dict[str, Any]]] = [('float32', {}), ('bfloat16', {'bits': 16})]
    for bits in (8, 4):
        for group in GROUPS:
            options = {'bits': bits, 'group_size': group}
            name = f'int{bits}, groups of {group}'
            made += [(name, options), (f'{name}, for inputs', {**options, 'calibrate': read})]
    made.append(('int8, inputs of 8 bits', {'bits': 8, 'activation_bits': 8}))
    return made


def cases_of_smollm2(read: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """The same for groups of 64, and more choices of which matrices have 8 bits."""

    more = 'embedding', 'head', 'key', 'value', 'feed_forward/dense'

    def mixed(path: str) -> int:
        return 8 if path.endswith(more) else 4

    every = {'int8': 8, 'int4': 4, 'int4; k, v, downs int8': mixed, 'int4 everywhere': _four}
    made: list[tuple[str, dict[str, Any]]] = [('bfloat16', {'bits': 16})]
    for name, bits in every.items():
        made += [(name, {'bits': bits}), (f'{name}, for inputs', {'bits': bits, 'calibrate': read})]
    made.append(('int8, inputs of 8 bits', {'bits': 8, 'activation_bits': 8}))
    return made


def _four(path: str) -> int:
    """4 bits everywhere, the table too."""
    del path
    return 4


def smollm2(case: str, n_windows: int, window: int = 256) -> None:
    """What rounding costs SmolLM2-135M, trained a little so that its weights are wide."""
    import pydoc_data.topics

    import jax
    import jax.numpy as jnp

    from layercomb import interop, transforms, trees
    from layercomb.launcher import sources

    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    text = '\n\n'.join(pydoc_data.topics.topics.values())
    ids = np.asarray(tokenizer.encode(text), np.int32)
    known, held = ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    net, weights = model.layer, tuned(model.layer, model.weights, known)

    @functools.partial(jax.jit, static_argnums=0)
    def logs(net: Any, weights: Any, rows: Any) -> Any:
        return jax.nn.log_softmax(net.apply(weights, {}, (rows[:, :-1],))[0][0])

    @jax.jit
    def compared(wide: Any, made: Any, rows: Any) -> tuple[Any, ...]:
        """Nats a token of both, and KL."""
        at = (slice(None), slice(None), None)
        nats = (-jnp.take_along_axis(x, rows[:, 1:][at], -1).mean() for x in (wide, made))
        return *nats, (jnp.exp(wide) * (wide - made)).sum(-1).mean()

    def windows(ids: Any, n: int) -> list[Any]:
        """So many, in batches of four."""
        starts = np.random.default_rng(1).permutation(len(ids) // window - 1)[:n] * window
        rows = np.stack([ids[i : i + window + 1] for i in starts])
        return list(jnp.asarray(rows.reshape(-1, 4, window + 1)))

    read = [rows[:, :-1] for rows in windows(known, n_windows)]
    texts, n = windows(held, 32), trees.count(weights)
    print(f'\nSmolLM2-135M\n{"":<34}{"bits":>7}{"perplexity":>11}{"ratio":>9}{"KL":>9}{"s":>7}')
    for name, options in [(name, o) for name, o in cases_of_smollm2(read) if case in name]:
        start = time.perf_counter()
        made, narrow = transforms.quantize(net, weights, **options)
        jax.block_until_ready(narrow)
        seconds = time.perf_counter() - start
        found = [
            compared(logs(net, weights, rows), logs(made, narrow, rows), rows) for rows in texts
        ]
        before, after, apart = np.mean(found, axis=0)
        bits = 8 * trees.n_bytes(narrow) / n
        print(
            f'{name:<34}{bits:>7.3f}{np.exp(after):>11.3f}{np.exp(after - before):>9.4f}'
            f'{apart:>9.4f}{seconds:>7.0f}',
            flush=True,
        )


def minilm(case: str, n_sentences: int = 256) -> None:
    """What rounding changes of the embeddings of sentences."""
    import pydoc_data.topics

    import jax.numpy as jnp

    import layercomb as lc
    from layercomb import interop, transforms, trees
    from layercomb.launcher import sources
    from layercomb.supervised import decoding

    model, tokenizer = interop.load(sources.find('minilm').path, dtype='float32')
    text = ' '.join(' '.join(pydoc_data.topics.topics.values()).split())
    sentences = [each for each in text.split('. ') if 40 < len(each) < 300]
    judged, others = sentences[:n_sentences], sentences[n_sentences : 2 * n_sentences]
    wide = decoding.embed(model, tokenizer, judged)
    rows = [tokenizer.encode(each) for each in others]
    ids = np.zeros((n_sentences, max(map(len, rows))), np.int32)
    for row, its in zip(ids, rows, strict=True):
        row[: len(its)] = its
    mask = np.arange(ids.shape[1]) < np.array([[len(its)] for its in rows])
    read = [
        (jnp.asarray(ids[i : i + 32]), jnp.asarray(mask[i : i + 32])) for i in range(0, 256, 32)
    ]
    n = trees.count(model.weights)
    print(f'\nall-MiniLM-L6-v2\n{"":<34}{"bits":>7}{"mean":>9}{"least":>9}')
    plain = [each for each in cases_of_smollm2(read) if isinstance(each[1]['bits'], int)]
    for name, options in [(name, o) for name, o in plain if case in name]:
        net, weights = transforms.quantize(model.layer, model.weights, **options)
        made = lc.Model(net, weights, model.state)
        cosines = (decoding.embed(made, tokenizer, judged) * wide).sum(-1)
        bits = 8 * trees.n_bytes(weights) / n
        print(f'{name:<34}{bits:>7.3f}{cosines.mean():>9.5f}{cosines.min():>9.5f}', flush=True)


def tuned(net: Any, weights: Any, ids: Any, n_steps: int = 200, length: int = 64) -> Any:
    """The weights after some steps of training on pieces of a text."""
    import jax
    import jax.numpy as jnp
    import optax

    from layercomb import tl, trees
    from layercomb.supervised import steps

    rate = optax.warmup_cosine_decay_schedule(0, 5e-5, 10, n_steps)
    optimizer = optax.adamw(rate, weight_decay=0.01)
    step = steps.compiled(net, tl.CrossEntropyLoss(), optimizer, 1, length)
    trainable, frozen = trees.partition(weights, lambda path: True)
    carry = steps.Carry(trainable, {}, optimizer.init(trainable), jnp.int32(0))
    rng, key = np.random.default_rng(0), jax.random.key(0)
    for _ in range(n_steps):
        at = rng.integers(len(ids) - length)
        row = ids[None, at : at + length + 1]
        batch = row[:, :-1], row[:, 1:], np.ones((1, length), np.float32)
        carry, _ = step(carry, frozen, key, batch)
    return carry.trainable


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
    from layercomb.layers.quantized.matrix import Narrow
    from layercomb.layers.quantized.rounding import narrow

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
