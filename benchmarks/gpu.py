"""Attention, training steps and decoding on a GPU, beside cuDNN's attention.

    pip install -e '.[bench,gpu]' 'jax[cuda12]'
    python benchmarks/gpu.py [attention pieces step decode] [--minutes 7]

* attention: forward and backward in bfloat16, 65,536 tokens of 8 heads of 64, hashing and choice of
  blocks included; from 131,072 on one sequence.
* pieces: where a call of hashed attention spends its time, at 2 × 32,768.
* step: 6 layers, d_model 512, 8 heads, d_ff 2048, bfloat16, 65,536 tokens a step: a Transformer
  beside Reformers; milliseconds, and gigabytes of arguments and temporaries.
* decode: GPT-2's shape, batch 1 and 32: seconds to compile, milliseconds a token.

Each figure is the best of three turns of several calls. What does not fit into `--minutes` is left
out, and said. Without a GPU it prints what the kernels would have to compute and to move, beside
what a H100 can, and nothing else; `--small` runs everything once at sizes of a test, anywhere.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine

import layercomb as lc
from layercomb import losses, models, tl
from layercomb.layers.attention.lsh.hashing import automatic_buckets
from layercomb.layers.attention.selected.backends import gpu
from layercomb.supervised import decoding

HEADS, DEPTH, TOKENS = 8, 64, 65_536
LENGTHS = (2_048, 8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
H100 = {'FLOP/s': 800e12, 'bytes/s': 3.0e12}  # what dense bfloat16 products and copies reach
# rounds or chosen blocks, keys of each, keys near by
HASHED = {'hashed 8 x 8 + 32': (8, 8, 32), 'hashed 4 x 64 + 64': (4, 64, 64)}
BLOCKS = {'blocks 4 x 16 + 32': (4, 16, 32)}


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes

    def left(self) -> float:
        return self._end - time.perf_counter()

    def measure(self, f: Callable[..., Any], *args: Any, calls: int = 10) -> float | None:
        """Milliseconds of a call, the best of three turns; None if no time is left."""
        if self.left() < 20:
            return None
        jax.block_until_ready(f(*args))
        turns = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(calls):
                made = f(*args)
            jax.block_until_ready(made)
            turns.append(1e3 * (time.perf_counter() - start) / calls)
        return min(turns)


def said(ms: float | None, beside: float | None = None) -> str:
    """A cell of a table, with its ratio to another."""
    if ms is None:
        return 'no time'
    return f'{ms:.2f}' if beside is None else f'{ms:.2f} ({ms / beside:.2f})'


def full(q: Any, k: Any, v: Any) -> Any:
    return tl.dot_product_attention(q, k, v, causal=True)


def shared(q: Any, k: Any, v: Any) -> Any:
    """Queries that are their keys, 4 rounds of 64."""
    n = automatic_buckets(q.shape[2], 64)
    buckets = tl.lsh_buckets(q, jax.random.key(0), n_buckets=n, n_hashes=4)
    return tl.lsh_attention(q, v, buckets, n_buckets=functools.reduce(int.__mul__, n), chunk_len=64)


def hashed(n_hashes: int, chunk_len: int, local_len: int) -> Callable[..., Any]:
    core = tl.HashedAttention(n_hashes=n_hashes, chunk_len=chunk_len, local_len=local_len)
    return lambda *x: core.apply({}, {}, x)[0][0]


def blocks(n_chosen: int, block_len: int, local_len: int) -> Callable[..., Any]:
    core = tl.BlockAttention(n_chosen=n_chosen, block_len=block_len, local_len=local_len)
    return lambda *x: core.apply({}, {}, x)[0][0]


KINDS: dict[str, Callable[..., Any]] = {
    'full': full,
    'shared LSH 4 x 64': shared,
    **{name: hashed(*sizes) for name, sizes in HASHED.items()},
    **{name: blocks(*sizes) for name, sizes in BLOCKS.items()},
}


def drawn(length: int, tokens: int) -> list[jax.Array]:
    shape = max(1, tokens // length), HEADS, length, DEPTH
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]


def both_ways(f: Callable[..., Any]) -> Callable[..., Any]:
    """Output and gradients of f, compiled."""

    def run(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(d_out)

    return jax.jit(run)


def attention(clock: Clock, small: bool) -> None:
    """Every kind at every length; ratios beside full attention."""
    lengths, tokens = ((128,), 128) if small else (LENGTHS, TOKENS)
    print('\nAttention, forward and backward, ms (beside full)\n')
    print('| length | ' + ' | '.join(KINDS) + ' |\n|---:|' + '---:|' * len(KINDS))
    for length in lengths:
        arrays = drawn(length, tokens)
        row: list[str] = []
        beside = None
        for name, f in KINDS.items():
            ms = clock.measure(both_ways(f), *arrays, calls=1 if small else 10)
            beside = ms if name == 'full' else beside
            row.append(said(ms, None if name == 'full' else beside))
        print(f'| {length:,} | ' + ' | '.join(row) + ' |', flush=True)


def pieces(clock: Clock, small: bool) -> None:
    """Hashing, the forward pass and both passes of hashed attention."""
    q, k, v, d_out = drawn(128 if small else 32_768, 256 if small else TOKENS)
    print(
        '\nPieces of hashed attention, ms\n\n| | hashing | forward | both |\n|---|---:|---:|---:|'
    )
    for name, sizes in HASHED.items():
        core = tl.HashedAttention(n_hashes=sizes[0], chunk_len=sizes[1], local_len=sizes[2])
        choose = jax.jit(lambda q, k, core=core: core.choose(q, k, None, None, None))
        times = [
            clock.measure(choose, q, k),
            clock.measure(jax.jit(KINDS[name]), q, k, v),
            clock.measure(both_ways(KINDS[name]), q, k, v, d_out),
        ]
        print(f'| {name} | ' + ' | '.join(map(said, times)) + ' |', flush=True)


def training(attention: tl.Layer | None, length: int, small: bool) -> tuple[Any, ...]:
    """A compiled step of SGD, its arguments, and its gigabytes."""
    sizes = {'d_model': 64, 'd_ff': 128} if small else {'d_model': 512, 'd_ff': 2048}
    given: dict[str, Any] = {**sizes, 'n_layers': 2 if small else 6, 'n_heads': HEADS}
    rows = max(1, (256 if small else TOKENS) // length)
    if attention is None:
        net = models.TransformerLM(256, max_len=length, positions='rotary', **given)
    else:
        net = models.ReformerLM(
            256, max_len=length, positions='rotary', attention=attention, **given
        )
    net = losses.attach(lc.cast(net), tl.CrossEntropyLoss(), chunk_len='auto')
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 256)
    batch = tokens, jnp.roll(tokens, -1, 1), jnp.ones((rows, length))
    signature = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    weights, state = jax.jit(net.init)(signature, jax.random.key(0))

    def loss(weights: Any, key: Any) -> Any:
        (values, _), _ = net.apply(weights, state, batch, rng=key, mode=tl.Mode.TRAIN)
        return values.astype(jnp.float32).mean()

    @jax.jit
    def step(weights: Any, key: Any) -> Any:
        grads = jax.grad(loss)(weights, key)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, grads)

    compiled = step.lower(weights, jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return compiled, (weights, jax.random.key(0)), size / 1e9


def step(clock: Clock, small: bool) -> None:
    """A training step of each model at each length."""
    kinds = {
        'Transformer': None,
        'Reformer, shared 4 x 64': tl.LSHSelfAttention(HEADS, n_hashes=4, chunk_len=64),
        'Reformer, hashed 8 x 8 + 32': tl.HashedSelfAttention(HEADS),
        'Reformer, blocks 4 x 16 + 32': tl.BlockSelfAttention(HEADS),
    }
    print('\nA training step, ms, and GB\n\n| length | ' + ' | '.join(kinds))
    print('|---:|' + '---:|' * len(kinds))
    for length in (128,) if small else (4_096, 16_384, 65_536):
        row = []
        for kind in kinds.values():
            if clock.left() < 40:
                row.append('no time')
                continue
            compiled, args, size = training(kind, length, small)
            row.append(f'{said(clock.measure(compiled, *args, calls=3))}, {size:.1f} GB')
        print(f'| {length:,} | ' + ' | '.join(row) + ' |', flush=True)


def decode(clock: Clock, small: bool) -> None:
    """Greedy decoding of GPT-2's shape: the time to the second token, then each."""
    sizes = (64, 128, 2, 4) if small else (768, 3072, 12, 12)
    net = models.TransformerLM(50257, *sizes, max_len=1024)
    weights, _ = jax.jit(net.init)((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))
    net, weights = lc.unstack(net, weights)
    print("\nDecoding GPT-2's shape\n\n| batch | compiling, s | ms a token |\n|---:|---:|---:|")
    for batch in (1, 32):
        if clock.left() < 60:
            print(f'| {batch} | no time | no time |')
            continue
        prompt = jax.random.randint(jax.random.key(1), (batch, 64), 0, 50257)
        n = 8 if small else 128
        start = time.perf_counter()
        stream = decoding.stream(lc.Model(net, weights, {}), prompt, n + 2, temperature=0)
        next(stream), next(stream)
        compiling, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(n):
            next(stream)
        print(f'| {batch} | {compiling:.1f} | {1e3 * (time.perf_counter() - start) / n:.2f} |')


def counted() -> None:
    """Products and bytes of the kernels, forward and backward, and what a H100 needs for them."""
    print(
        '\nWhat 65,536 tokens of 8 heads of 64 in bfloat16 need, forward and backward, at least\n'
    )
    print('| | TFLOP of tiles | GB moved | ms of products | ms of copies |')
    print('|---|---:|---:|---:|---:|')
    rows, tile = TOKENS * HEADS, gpu.TILE_LENS['bfloat16']
    print(_needs('full, one sequence', 7 * 2 * rows * TOKENS / 2 * DEPTH, 12 * rows * DEPTH * 2))
    for name, (n, keys, near) in (HASHED | BLOCKS).items():
        # A tile of queries sees its own keys and those before: in pieces that begin anywhere.
        seen = sum(times * (2 * tile + width) for times, width in ((n, keys), (1, near)))
        flops = (2 + 3 + 4) * 2 * rows * seen * DEPTH
        # Rows of q, k and v are read by one kernel forward, and with the cotangent by two backward;
        # the output and three gradients, in float32, are read and written.
        size = (n + 1) * rows * DEPTH * ((3 + 2 * 4) * 2 + 4 * 2 * 4)
        print(_needs(name, flops, size))


def _needs(name: str, flops: float, size: float) -> str:
    times = 1e3 * flops / H100['FLOP/s'], 1e3 * size / H100['bytes/s']
    return f'| {name} | {flops / 1e12:.2f} | {size / 1e9:.1f} | {times[0]:.1f} | {times[1]:.1f} |'


PARTS = {'attention': attention, 'pieces': pieces, 'step': step, 'decode': decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', default=list(PARTS), help=', '.join(PARTS))
    parser.add_argument('--minutes', type=float, default=7)
    parser.add_argument('--small', action='store_true', help='sizes of a test, on any device')
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f'no such part: {", ".join(sorted(unknown))}; there are {", ".join(PARTS)}')
    print(machine.describe('jaxlib', 'jax-triton', 'triton'))
    device = jax.devices()[0]
    if device.platform != 'gpu' and not options.small:
        print(f'There is no GPU here (JAX has {device.device_kind}): nothing is measured.')
        counted()
        return
    print(device.device_kind)
    if device.platform == 'gpu':
        taken = gpu.available('bfloat16', DEPTH, DEPTH)
        print('The kernels for GPUs are', 'used.' if taken else 'NOT used, see the warning.')
        counted()
    clock = Clock(options.minutes)
    for part in options.parts:
        PARTS[part](clock, options.small)
    print(f'\n{60 * options.minutes - clock.left():.0f} s')


if __name__ == '__main__':
    main()
