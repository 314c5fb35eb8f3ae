"""Device bytes a token of a training step, with residual streams in host memory and without.

    python benchmarks/host_streams.py [--lengths 4096 8192 …] [--d_model 256]
        [--dtype float32] [--compiled]

For each kind of attention and length, the step of a `Loop` with Adam on one row is traced: a
ReformerLM of two blocks with heads of 64, in float32. `buffers` counts what it holds in each memory
at the peak. What grows with the length is the difference between the last two lengths. With
``--compiled`` the step is compiled for the CPU too, where there is one memory: what XLA takes grows
as both memories together. Nothing is run.

Asked for is that the device holds at most 2,048 bytes a token at width 256.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import buffers
import machine
import numpy as np

from layercomb import models, optimizers, supervised, tl, transforms

VOCAB, D_HEAD, DEPTH, ASKED = 256, 64, 2, 2048
LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS, help='two at least')
    parser.add_argument('--d_model', type=int, default=256)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--compiled', action='store_true')
    options = parser.parse_args()
    n_heads = options.d_model // D_HEAD
    kinds = {
        'local': tl.LocalSelfAttention(n_heads, 64),
        'lsh': tl.LSHSelfAttention(n_heads, max_len=max(options.lengths)),
        'all': tl.SelfAttention(n_heads),
    }
    print(machine.describe('jaxlib'))
    print(
        f'd {options.d_model}, {n_heads} heads, {DEPTH} blocks, one row, vocabulary {VOCAB}, '
        f'{options.dtype}, adamw\n'
    )
    told = ''.join(f'{n:>9}' for n in options.lengths)
    print(f'{"attention":<11}{"offload":<10}{"memory":<8}{told}{"B/token":>10}   (MB by length)')
    for name, attention in kinds.items():
        for offload in (None, 'streams'):
            study(name, attention, offload, options)


def study(name: str, attention: Any, offload: str | None, options: argparse.Namespace) -> None:
    """The rows of one model."""
    found = [measured(attention, n, offload, options) for n in options.lengths]
    for memory, sizes in zip(('device', 'host', 'XLA CPU'), zip(*found, strict=True), strict=False):
        if not any(sizes):
            continue
        slope = (sizes[-1] - sizes[-2]) / (options.lengths[-1] - options.lengths[-2])
        told = ''.join(f'{x / 1e6:>9.1f}' for x in sizes)
        asked = f'(asked: {ASKED}, {"met" if slope <= ASKED else "MISSED"})'
        verdict = asked if offload and memory == 'device' else ''
        print(
            f'{name:<11}{offload or "-":<10}{memory:<8}{told}{slope:>10.0f}   {verdict}', flush=True
        )


def measured(
    attention: Any, length: int, offload: str | None, options: argparse.Namespace
) -> tuple[int, int, int]:
    """Bytes at the peak on the device and in host memory, and of both as XLA's CPU has it."""
    d = options.d_model
    sizes = VOCAB, d, 4 * d, DEPTH, d // D_HEAD, max(options.lengths)
    net = models.ReformerLM(*sizes, attention=attention)
    net = net if options.dtype == 'float32' else transforms.cast(net, options.dtype)
    batches = Batches(length)
    task = supervised.TrainTask(
        batches, tl.CrossEntropyLoss(), optimizers.adamw(1e-3), loss_chunk_len='auto'
    )
    loop = supervised.Loop(net, task, progress=False, offload=offload)
    traced = loop._compiled.trace(loop._carry, loop._frozen, loop._key, next(iter(batches)))
    device, host, _ = buffers.peaks(traced.jaxpr.jaxpr)
    if not options.compiled:
        return device, host, 0
    of_xla = traced.lower().compile().memory_analysis()
    return device, host, of_xla.temp_size_in_bytes + of_xla.argument_size_in_bytes


class Batches:
    """One row of random tokens, the same each time."""

    def __init__(self, length: int) -> None:
        self.shape = 1, length + 1

    def __iter__(self) -> Any:
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(1, VOCAB, self.shape).astype(np.int32)
            yield x[:, :-1], x[:, 1:], np.ones(x[:, 1:].shape, np.float32)


if __name__ == '__main__':
    main()
