"""How the memory of a training step grows with depth: standard, remat and reversible blocks.

    python benchmarks/memory_depth.py [--length 1024] [--batch 4]

The temporaries that XLA plans for the gradient of a language model's loss, and for the full step
with its optimizer, at 4, 8, 16 and 32 blocks, with dropout. For the reversible model the recorded
decisions (one byte or two for each position, head and hash round) are printed and taken off, and
what is left is compared between 4 and 32 blocks. For that the programs are only compiled.

Then how far streams that the backward pass restores, of one row of normal numbers through up to 48
blocks, are from what they were.
"""

from __future__ import annotations

import argparse
import functools

import jax
import machine
import optax

import layercomb as lc
from layercomb import losses, models, tl

DEPTHS = (4, 8, 16, 32)
DRIFT_DEPTHS = (12, 24, 48)
SIZES = {'vocab_size': 256, 'd_model': 128, 'd_ff': 512, 'n_heads': 4, 'dropout': 0.1}


def standard(n_layers: int, length: int, remat: bool = False) -> tl.Layer:
    """A Transformer with LSH attention."""
    attention = tl.LSHSelfAttention(SIZES['n_heads'], chunk_len=32, max_len=length)
    return models.TransformerLM(
        n_layers=n_layers, max_len=length, attention=attention, remat=remat, **SIZES
    )


def reversible(n_layers: int, length: int) -> tl.Layer:
    """A Reformer with the same attention."""
    return models.ReformerLM(
        n_layers=n_layers, max_len=length, positions='learned', chunk_len=32, ff_chunk_len=None,
        **SIZES,
    )  # fmt: skip


KINDS = {
    'standard': standard,
    'remat': functools.partial(standard, remat=True),
    'reversible': reversible,
}


def measure(net: tl.Layer, batch: int, length: int) -> dict[str, int]:
    """Bytes of temporaries of the gradient and of the step, of weights, gradients, state."""
    net = losses.attach(net, tl.CrossEntropyLoss())
    tokens = lc.shape_dtype((batch, length), 'int32')
    signature = (tokens, tokens, lc.shape_dtype((batch, length)))
    key = jax.eval_shape(jax.random.key, 0)
    weights, state = jax.eval_shape(lambda key: net.init(signature, key), key)
    optimizer = optax.adam(1e-3)
    moments = jax.eval_shape(optimizer.init, weights)

    def loss(weights, state, inputs, key):
        (values, _), state = net.apply(weights, state, inputs, rng=key, mode=lc.Mode.TRAIN)
        return values.mean()

    def step(weights, moments, state, inputs, key):
        gradient = jax.grad(loss)(weights, state, inputs, key)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments

    gradient = jax.jit(jax.grad(loss)).lower(weights, state, signature, key).compile()
    full = jax.jit(step, donate_argnums=(0, 1))
    full = full.lower(weights, moments, state, signature, key).compile()
    return {
        'gradient': gradient.memory_analysis().temp_size_in_bytes,
        'step': full.memory_analysis().temp_size_in_bytes,
        'weights': lc.trees.n_bytes(weights),
        'moments': lc.trees.n_bytes(moments),
    }


def decisions(batch: int, length: int) -> int:
    """Bytes of the recorded buckets of one layer."""
    layer = tl.LSHSelfAttention(SIZES['n_heads'], chunk_len=32, max_len=length)
    signature = (lc.shape_dtype((batch, length, SIZES['d_model'])),)

    def record(key):
        weights, state = layer.init(signature, key)
        x = jax.numpy.zeros(signature[0].shape)
        return layer.apply(weights, state, (x,), rng=key, mode=lc.Mode.RECORD)[1]

    return lc.trees.n_bytes(jax.eval_shape(record, jax.eval_shape(jax.random.key, 0)))


def drift(n_layers: int, length: int) -> tuple[float, float]:
    """The largest error of restored streams, and the largest value of those they are made from."""
    blocks = reversible(n_layers, length).sublayers
    (stack,) = (layer for layer in blocks if isinstance(layer, tl.ReversibleRepeat))
    key = jax.random.key(0)
    x = jax.random.normal(key, (1, length, SIZES['d_model']))
    weights, state = stack.init(lc.signature_of((x, x)), key)

    def run(weights, x):
        outputs, recorded = stack.apply(weights, state, (x, x), rng=key, mode=lc.Mode.RECORD)
        restored = stack.reverse_and_grad(weights, recorded, outputs, outputs, rng=key)[0]
        error = jax.numpy.stack([jax.numpy.abs(x - y).max() for y in restored]).max()
        return error, jax.numpy.stack([jax.numpy.abs(y).max() for y in outputs]).max()

    return jax.jit(run)(weights, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--batch', type=int, default=4)
    options = parser.parse_args()
    batch, length = options.batch, options.length
    recorded = decisions(batch, length)
    print(f'{machine.describe("jaxlib")}; batch {batch}, length {length}; MiB')
    print(f'recorded decisions: {recorded / 2**20:.3f} a layer')
    print('| blocks | kind | gradient | less decisions | full step | weights | optimizer |')
    print('|---:|---|---:|---:|---:|---:|---:|')
    left: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for depth in DEPTHS:
        for kind, make in KINDS.items():
            row = measure(make(depth, length), batch, length)
            rest = row['gradient'] - (recorded * depth if kind == 'reversible' else 0)
            left[kind].append(rest)
            sizes = (row['gradient'], rest, row['step'], row['weights'], row['moments'])
            cells = ' | '.join(f'{size / 2**20:.2f}' for size in sizes)
            print(f'| {depth} | {kind} | {cells} |', flush=True)
    for kind, sizes in left.items():
        print(f'{kind}: {DEPTHS[-1]} blocks / {DEPTHS[0]} blocks = {sizes[-1] / sizes[0]:.3f}')
    for depth in DRIFT_DEPTHS:
        error, largest = drift(depth, length)
        print(
            f'drift after {depth} blocks: {error:.1e}, of streams up to {largest:.1f}', flush=True
        )


if __name__ == '__main__':
    main()
