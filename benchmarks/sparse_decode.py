"""What sparse layers save in decoding: seconds a token at batch 1, of random weights.

    python benchmarks/sparse_decode.py [--tokens 16] [--repeats 5] [--scale 1 2]

The paper's shape with 800 million weights in its encoder and decoder, as a decoder alone: 24
layers, d_model 1024, d_ff 4096, blocks of 64, 16 modules, convolutions of 3, and 4 modules in the
head. All are `TerraformerLM`, and dense is sparsity off. At scale 2 the model is twice as wide and
half as deep, which is twice the weights.

The models take turns, a few tokens each, and the fastest turn of each counts. A token must read
every weight that counts for it at least once, so the bytes it reads over the memory's bandwidth,
measured in the same run by products of a vector and a matrix of 1 GiB, are the least that it can
take; the dense baseline must come near it.

Then the feed-forwards alone, 24 of them with their norms, one after the other: dense and sparse, in
float32 and int8.
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
from layercomb import models, tl, transforms, trees
from layercomb.layers.core.mode import Mode

VOCAB, MAX_LEN = 32_000, 128
DENSE: dict[str, Any] = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}
FF, QKV, HEAD = {'ff_block_size': 64}, {'qkv_modules': 16}, {'head_modules': 4}
KINDS = {
    'dense': DENSE,
    '+ sparse FF': {**DENSE, **FF},
    '+ sparse QKV': {**DENSE, **QKV},
    '+ FF and QKV': {**DENSE, **FF, **QKV},
    '+ both and head': {**FF, **QKV, **HEAD},
}
LARGE = ('dense', '+ FF and QKV', '+ both and head')  # to fit small machines
PAPER = {'dense': 0.160, '+ sparse FF': 0.093, '+ sparse QKV': 0.152, '+ FF and QKV': 0.061}


def mixture(n_experts: int, n_chosen: int, n_shared: int) -> tl.Layer:
    """A mixture of as many units as the dense feed-forward."""
    return tl.MixtureFF(4096, n_experts, n_chosen, n_shared, activation='relu2', gated=False)


FEED_FORWARDS = {
    'dense': tl.Serial(tl.Dense(4096), tl.Relu2(), tl.Dense(1024)),
    'SparseFF, 1/64': tl.SparseFF(4096, 64),
    'mixture, 1/4': mixture(128, 30, 2),
    'mixture, 1/8': mixture(128, 15, 1),
    'mixture, 1/16': mixture(128, 7, 1),
    'mixture, 1/64': mixture(64, 1, 0),
}


class Decoder:
    """A model that makes a token at a time, and the times it took."""

    def __init__(self, scale: int, sparse: dict[str, Any]) -> None:
        net = models.TerraformerLM(
            VOCAB, 1024 * scale, 4096 * scale, 24 // scale, 16, MAX_LEN, activation='relu', **sparse
        )
        token = jnp.zeros((1, 1), jnp.int32)
        weights, _ = jax.jit(net.init)(lc.signature_of((token,)), jax.random.key(0))
        self.net, self.weights = lc.unstack(net, weights)
        self.signature = lc.shape_dtype((1, MAX_LEN), 'int32')
        self.bytes = bytes_read(weights, sparse)
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    @functools.cached_property
    def many(self) -> Callable[..., Any]:
        """(weights, state, token (1, 1), n) → the token and the state after n more."""

        def step(weights: Any, carry: Any) -> Any:
            token, state = carry
            (logits,), state = self.net.apply(weights, state, (token,), mode=Mode.PREDICT)
            return jnp.argmax(logits, -1).astype(jnp.int32), state

        def many(weights: Any, state: Any, token: jax.Array, n: jax.Array) -> Any:
            return jax.lax.fori_loop(0, n, lambda _, carry: step(weights, carry), (token, state))

        return jax.jit(many, donate_argnums=1)

    def run(self, n_tokens: int) -> None:
        """Decodes from the start of a sequence, in one program as `generate` does."""
        state = lc.init_state(self.net, self.signature)
        token, state = self.many(self.weights, state, jnp.ones((1, 1), jnp.int32), 1)
        jax.block_until_ready(token)
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(self.many(self.weights, state, token, n_tokens))
        self.seconds.append((time.perf_counter() - wall) / n_tokens)
        self.cpu.append((time.process_time() - cpu) / n_tokens)

    @property
    def best(self) -> float:
        """Seconds a token in the turn that was disturbed least."""
        return min(self.seconds)


def bytes_read(weights: Any, sparse: dict[str, Any]) -> int:
    """The weights that a token reads: all but the embeddings and the units that do not work."""
    total = 0
    for path, weight in trees.flatten(weights).items():
        if path.startswith('embedding'):
            continue
        is_unit = 'sparse_ff/in' in path or path.endswith('sparse_ff/out/kernel')
        total += weight.nbytes // (sparse['ff_block_size'] if is_unit else 1)
    return total


class FeedForwards:
    """24 feed-forwards, through which a vector goes again and again, and the times it took."""

    def __init__(self, layer: tl.Layer, bits: int) -> None:
        block = tl.Serial(tl.Residual(tl.RMSNorm(), layer), name='block')
        net: tl.Layer = tl.Serial(tl.Repeat(block, 24), tl.RMSNorm())
        signature = (lc.shape_dtype((1, 1, 1024)),)
        weights, _ = jax.jit(net.init)(signature, jax.random.key(0))
        if bits != 32:
            net, weights = transforms.quantize(net, weights, bits=bits)
        net, self.weights = lc.unstack(net, weights)
        self.net = transforms.fuse(net)  # as `generate` does
        self.state = lc.init_state(self.net, signature)
        self.seconds: list[float] = []

    @functools.cached_property
    def many(self) -> Callable[..., Any]:
        """(weights, state, x (1, 1, D), n) → x after n times through all."""

        def step(weights: Any, carry: Any) -> Any:
            (x,), state = self.net.apply(weights, carry[1], (carry[0],), mode=Mode.PREDICT)
            return x, state

        def many(weights: Any, state: Any, x: jax.Array, n: jax.Array) -> Any:
            return jax.lax.fori_loop(0, n, lambda _, carry: step(weights, carry), (x, state))[0]

        return jax.jit(many)

    def run(self, n_tokens: int) -> None:
        """Another turn."""
        x = jax.random.normal(jax.random.key(len(self.seconds)), (1, 1, 1024))
        jax.block_until_ready(self.many(self.weights, self.state, x, 1))
        wall = time.perf_counter()
        jax.block_until_ready(self.many(self.weights, self.state, x, n_tokens))
        self.seconds.append((time.perf_counter() - wall) / n_tokens)


def compare_alone(n_tokens: int, repeats: int) -> float:
    """Prints the table of feed-forwards; returns the lesser ratio of the mixture of 1/8."""
    made = {
        (label, bits): FeedForwards(layer, bits)
        for label, layer in FEED_FORWARDS.items()
        for bits in (32, 8)
    }
    for _ in range(repeats):
        for one in made.values():
            one.run(n_tokens)
    dense = min(made['dense', 32].seconds)
    print('\nThe 24 feed-forwards alone:\n')
    print('| | float32, ms a token | faster | int8, ms a token | faster than dense float32 |')
    print('|---|---:|---:|---:|---:|')
    for label in FEED_FORWARDS:
        best = {bits: min(made[label, bits].seconds) for bits in (32, 8)}
        cells = ' | '.join(f'{1e3 * s:.2f} | {dense / s:.2f}×' for s in best.values())
        print(f'| {label} | {cells} |')
    return min(dense / min(made['mixture, 1/8', bits].seconds) for bits in (32, 8))


def bandwidth() -> float:
    """Bytes a second at which XLA reads a matrix of 1 GiB to multiply a vector by it, at best."""
    matrix, vector = jnp.ones((16384, 16384)), jnp.ones((1, 16384))
    multiply = jax.jit(jnp.dot)
    jax.block_until_ready(multiply(vector, matrix))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(multiply(vector, matrix))
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times)


def compare(scale: int, n_tokens: int, repeats: int) -> tuple[float, float]:
    """Prints the table of a scale; returns how much faster than dense are FF and QKV, and all."""
    rate = bandwidth()
    print(f'\nd_model {1024 * scale}, d_ff {4096 * scale}; memory gives {rate / 1e9:.1f} GB/s\n')
    labels = KINDS if scale == 1 else LARGE
    decoders = {label: Decoder(scale, KINDS[label]) for label in labels}
    for _ in range(repeats):
        for decoder in decoders.values():
            decoder.run(n_tokens)
    rate = max(rate, bandwidth())
    dense = decoders['dense'].best
    print('| | weights | read a token | s a token | CPU s | of the floor | faster | paper | |')
    print('|---|---:|---:|---:|---:|---:|---:|---:|---:|')
    for label, decoder in decoders.items():
        seconds, floor = decoder.best, decoder.bytes / rate
        paper = PAPER.get(label) if scale == 1 else None
        theirs = f'{paper:.3f} | {PAPER["dense"] / paper:.2f}×' if paper else ' |'
        cpu = decoder.cpu[decoder.seconds.index(seconds)]
        print(
            f'| {label} | {trees.count(decoder.weights) / 1e6:.0f}M | {decoder.bytes / 1e6:.0f} MB '
            f'| {seconds:.4f} | {cpu:.4f} | {seconds / floor:.2f}× '
            f'| {dense / seconds:.2f}× | {theirs} |'
        )
    return dense / decoders['+ FF and QKV'].best, dense / decoders['+ both and head'].best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=16, help='a turn')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--scale', type=int, nargs='*', default=[1, 2], help='none: only the parts')
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    alone = compare_alone(4 * options.tokens, options.repeats)
    print(f'\na mixture of 1/8: {alone:.2f}× faster than dense float32 (asked: 5×)')
    faster = [compare(scale, options.tokens, options.repeats) for scale in options.scale]
    for label, ratios in zip(LARGE[1:], zip(*faster, strict=True), strict=False):
        told = ', '.join(f'{x:.2f}×' for x in ratios)
        print(f'\n{label}: {told} faster than dense (asked: 5×, and growing)', end='')
    print()


if __name__ == '__main__':
    main()
