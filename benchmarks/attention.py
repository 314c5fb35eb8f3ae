"""CPU seconds of a training step of a causal Transformer, beside the same in torch with SDPA.

    pip install -e '.[bench]'
    python benchmarks/attention.py --lengths 1024 2048 4096 8192 --repeats 3

Six layers, d_model 256, 4 heads, d_ff 1024, 256 tokens, batch 1, float32, forward and backward.
Each contestant is a process of its own, warm, and they take turns. Both run with the default
allocator and with huge pages, which ``layercomb train`` asks for by itself; torch also with an
allocator that keeps its pages. The better time of each counts; the ratio with the default
allocator on both sides stands beside it. CPU seconds are
those of all threads; the best of the repeats counts for each. XLA's figure for the temporaries of
our step follows, with its growth from length to length: 2 is linear, 4 quadratic.
"""

from __future__ import annotations

import argparse

from machine import describe
from torch_steps import transformer_step
from turns import HUGE_PAGES, KEEP_PAGES, TORCH, serve, take_turns

LAYERS, D_MODEL, HEADS, D_FF, VOCAB = 6, 256, 4, 1024, 256
CONTESTANTS = {
    'ours': ('layercomb', {}),
    'ours, huge pages': ('layercomb', HUGE_PAGES),
    'torch': ('torch', TORCH),
    'torch, pages kept': ('torch', {**TORCH, **KEEP_PAGES}),
    'torch, huge pages': ('torch', {**TORCH, **HUGE_PAGES}),
}


def layercomb_step(length):
    """A function that runs one step of ours, and the bytes of its temporaries."""
    import jax

    from layercomb import losses, models, tl

    net = models.TransformerLM(VOCAB, D_MODEL, D_FF, LAYERS, HEADS, max_len=length)
    net = losses.attach(net, tl.CrossEntropyLoss())
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, VOCAB)
    ones = jax.numpy.ones((1, length))
    batch = (tokens, jax.numpy.roll(tokens, -1, 1), ones)
    signature = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    weights, state = jax.jit(lambda key: net.init(signature, key))(jax.random.key(0))

    def loss(weights, state, batch):
        (values, _), _ = net.apply(weights, state, batch, rng=jax.random.key(0), mode=tl.Mode.TRAIN)
        return values.mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(weights, state, batch).compile()
    temporaries = step.memory_analysis().temp_size_in_bytes
    return lambda: float(jax.block_until_ready(step(weights, state, batch))[0]), temporaries


def torch_step(length):
    """A function that runs one step of torch's."""
    return transformer_step(length, LAYERS, D_MODEL, HEADS, D_FF, VOCAB, 'gelu')


def compare(length, repeats):
    """One length: the contestants in turns. Returns a row of the table."""
    workers = take_turns(CONTESTANTS, repeats, '--lengths', length)
    ours = [worker for name, worker in workers.items() if name.startswith('ours')]
    theirs = [worker for name, worker in workers.items() if name.startswith('torch')]
    cpu, wall = (min(worker.best(what) for worker in ours) for what in ('cpu', 'wall'))
    torch_cpu, torch_wall = (
        min(worker.best(what) for worker in theirs) for what in ('cpu', 'wall')
    )
    plain = workers['ours'].best('cpu') / workers['torch'].best('cpu')
    return {
        'ours cpu s': cpu,
        'torch cpu s': torch_cpu,
        'ratio': cpu / torch_cpu,
        'wall ratio': wall / torch_wall,
        'plain ratio': plain,
        'MiB': ours[0].temporaries / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--lengths', type=int, nargs='+', default=[1024, 2048, 4096, 8192])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--worker', choices=['layercomb', 'torch'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve({'layercomb': layercomb_step, 'torch': torch_step}[args.worker], args.lengths[0])
        return
    print(describe('jaxlib', 'torch'))
    print('| length | ours, CPU s | torch | ratio | wall | default malloc | temporaries | growth |')
    print('|---:|---:|---:|---:|---:|---:|---:|---:|')
    before = None
    for length in sorted(args.lengths):
        row = compare(length, args.repeats)
        growth = f'{row["MiB"] / before["MiB"]:.2f}' if before else ''
        print(
            f'| {length} | {row["ours cpu s"]:.2f} | {row["torch cpu s"]:.2f} '
            f'| {row["ratio"]:.2f} | {row["wall ratio"]:.2f} | {row["plain ratio"]:.2f} '
            f'| {row["MiB"]:.0f} MiB | {growth} |',
            flush=True,
        )
        before = row


if __name__ == '__main__':
    main()
