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
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time

LAYERS, D_MODEL, HEADS, D_FF, VOCAB = 6, 256, 4, 1024, 256
KEEP_PAGES = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '100000000000'}
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
CONTESTANTS = {
    'ours': ('layercomb', {}),
    'ours, huge pages': ('layercomb', HUGE_PAGES),
    'torch': ('torch', {'OMP_WAIT_POLICY': 'PASSIVE'}),
    'torch, pages kept': ('torch', {'OMP_WAIT_POLICY': 'PASSIVE', **KEEP_PAGES}),
    'torch, huge pages': ('torch', {'OMP_WAIT_POLICY': 'PASSIVE', **HUGE_PAGES}),
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
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
            self.qkv, self.merge = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)
            self.up, self.down = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)

        def forward(self, x):
            qkv = self.qkv(self.norm_1(x)).view(1, length, 3, HEADS, D_MODEL // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, K) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.merge(y.transpose(1, 2).reshape(1, length, D_MODEL))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate='tanh'))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(length, D_MODEL)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm, self.head = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB)

        def forward(self, tokens):
            return self.head(self.norm(self.blocks(self.embed(tokens) + self.place.weight)))

    torch.manual_seed(0)
    model = Model()
    tokens = torch.randint(0, VOCAB, (1, length))
    targets = torch.roll(tokens, -1, 1).view(-1)

    def step():
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(tokens).view(-1, VOCAB), targets)
        loss.backward()
        return loss.item()

    return step, None


def serve(contestant, length):
    """The worker: a step for every line that comes in, and a line of figures for every step."""
    step, temporaries = {'layercomb': layercomb_step, 'torch': torch_step}[contestant](length)
    step()
    print(json.dumps({'temporaries': temporaries}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({'cpu': cpu, 'wall': wall, 'loss': loss}), flush=True)


class Worker:
    """A warm process that runs a step when asked."""

    def __init__(self, contestant, environment, length):
        command = [sys.executable, __file__, '--worker', contestant, '--lengths', str(length)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.temporaries = self.read()['temporaries']
        self.steps = []

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit('a worker stopped: what it wrote stands above')
        return json.loads(line)

    def run(self):
        self.process.stdin.write('step\n')
        self.process.stdin.flush()
        self.steps.append(self.read())

    def best(self, what):
        return min(step[what] for step in self.steps)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(length, repeats):
    """One length: the contestants in turns. Returns a row of the table."""
    workers = {name: Worker(*spec, length) for name, spec in CONTESTANTS.items()}
    for _ in range(repeats):
        for worker in workers.values():
            worker.run()
    for worker in workers.values():
        worker.close()
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
        serve(args.worker, args.lengths[0])
        return
    versions = ' '.join(f'{p} {importlib.metadata.version(p)}' for p in ('jax', 'jaxlib', 'torch'))
    print(f'{versions} · Python {platform.python_version()} · {machine()}')
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


def machine():
    """The processor's name and how many of them this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open('/proc/cpuinfo') as f:
            name = next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return f'{len(os.sched_getaffinity(0))} × {name}'


if __name__ == '__main__':
    main()
