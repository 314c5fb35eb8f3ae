"""What a dense model loses when its feed-forwards become mixtures, before training and after.

    python benchmarks/sparsify.py [--fractions 0.75 0.5 0.375 0.25] [--experts 32] [--windows 40]
                                  [--train 0.25] [--steps 160] [--cpu_seconds 1200] [--rate 5e-4]
                                  [--only quality | speed]

SmolLM2-135M in float32 by `transforms.sparsify`, with a fraction of the units of each feed-forward
read at a position; a quarter of the experts that are read are shared. Perplexity is that of 8,192
tokens of held-out text, Python's documentation, the same as in quantization.py; other text of it
gives the `--windows` of 256 tokens that mixtures are fitted to. Of the layers' errors, relative
mean squares of what the mixture makes wrong, there are the least, the median and the largest: with
the experts that hold most, with those that the router chooses, and with the matrix back fitted.

`--train` names fractions that are then trained on that text by a `Loop`, all weights but the table
and the biases of routers, for so many steps or seconds of all threads, and the dense model as long
beside them, if 1 is among them: what the text teaches any model is to be told from what is made up
for.

Speed: milliseconds a token, the dense model and each fraction in turns, the best turn of each; in
float32, and in 8 bits where the mixtures' matrices can be kept so.
"""

from __future__ import annotations

import argparse
import functools
import logging
import pydoc_data.topics
import time
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax

import layercomb as lc
from layercomb import interop, supervised, tl, transforms, trees
from layercomb.launcher import sources
from layercomb.layers.core.mode import Mode

WINDOW = 256
MAX_LEN = 256  # of the caches
TOKEN = (lc.shape_dtype((1, 1), 'int32'),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--fractions', type=float, nargs='*', default=[0.75, 0.5, 0.375, 0.25])
    parser.add_argument('--experts', type=int, default=32)
    parser.add_argument('--windows', type=int, default=40)
    parser.add_argument('--train', type=float, nargs='*', default=[], help='fractions; 1 is dense')
    parser.add_argument('--steps', type=int, default=160, help='at most so many')
    parser.add_argument('--cpu_seconds', type=float, default=1200, help='of training, at most')
    parser.add_argument('--rate', type=float, default=5e-4)
    parser.add_argument('--tokens', type=int, default=32, help='of a turn of speed')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--only', choices=('quality', 'speed'))
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    text = '\n\n'.join(pydoc_data.topics.topics.values())
    ids = np.asarray(tokenizer.encode(text), np.int32)
    known, held = ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]
    if options.only in (None, 'quality'):
        quality(model, known, held, options)
    if options.only in (None, 'speed'):
        for bits in (32, 8):
            speed(model, options, bits)


def quality(model: Any, known: Any, held: Any, options: argparse.Namespace) -> None:
    """The table of perplexities."""
    rows = windows(held, 32)
    dense = perplexity(model.layer, model.weights, rows)
    print(
        f'\n{"units":<8}{"experts":>16}{"perplexity":>12}{"ratio":>8}{"CPU s":>8}   errors: ',
        end='',
    )
    print('best experts, routed, fitted (least / median / largest)')
    print(f'{"dense":<8}{"":>16}{dense:>12.3f}{1:>8.3f}', flush=True)
    if 1 in options.train:
        train(model.layer, model.weights, known, rows, dense, options)
    for fraction in options.fractions:
        start, errors = time.process_time(), Errors()
        net, weights = sparse(model, known, fraction, options)
        seconds = time.process_time() - start
        found = perplexity(net, weights, rows)
        n = sizes(fraction, options.experts)
        told = ', '.join(' / '.join(f'{x:.3f}' for x in each) for each in errors.told())
        print(
            f'{fraction:<8}{f"{n[0]} + {n[1]} of {options.experts}":>16}{found:>12.3f}'
            f'{found / dense:>8.3f}{seconds:>8.0f}   {told}',
            flush=True,
        )
        if fraction in options.train:
            train(net, weights, known, rows, dense, options)


def sizes(fraction: float, n_experts: int) -> tuple[int, int]:
    """How many experts are shared and how many are chosen."""
    on = round(fraction * n_experts)
    return max(on // 4, 1), on - max(on // 4, 1)


def sparse(model: Any, known: Any, fraction: float, options: argparse.Namespace) -> Any:
    """The model with mixtures that read a fraction of the units, and its weights."""
    n_shared, n_chosen = sizes(fraction, options.experts)
    return transforms.sparsify(
        model.layer,
        model.weights,
        [rows[:, :-1] for rows in windows(known, options.windows)],
        n_experts=options.experts,
        n_chosen=n_chosen,
        n_shared=n_shared,
    )


def windows(ids: Any, n: int) -> list[Any]:
    """So many pieces of a text, in batches of four."""
    starts = np.random.default_rng(1).permutation(len(ids) // WINDOW - 1)[:n] * WINDOW
    rows = np.stack([ids[i : i + WINDOW + 1] for i in starts])
    return list(jnp.asarray(rows.reshape(-1, 4, WINDOW + 1)))


def perplexity(net: Any, weights: Any, rows: list[Any]) -> float:
    return float(np.exp(np.mean([nats(net, weights, each) for each in rows])))


@functools.partial(jax.jit, static_argnums=0)
def nats(net: Any, weights: Any, rows: Any) -> Any:
    """Nats a token."""
    logs = jax.nn.log_softmax(net.apply(weights, {}, (rows[:, :-1],))[0][0])
    return -jnp.take_along_axis(logs, rows[:, 1:, None], -1).mean()


class Errors(logging.Handler):
    """The errors of layers that `sparsify` logs, from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []
        logger = logging.getLogger('layercomb.transforms.sparsifying')
        logger.handlers = [self]
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.found.append(record.args[1])

    def told(self) -> list[tuple[float, float, float]]:
        """The least, the median and the largest of each kind of error."""
        columns = zip(*self.found, strict=True)
        return [(min(each), float(np.median(each)), max(each)) for each in columns]


class Budget(supervised.Callback):
    """Ends a run when the process has worked so long, and shows where it is."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.process_time()

    def after_step(self, loop: Any, row: Any) -> None:
        spent = time.process_time() - self.start
        if row['step'] % 20 == 0:
            print(f'  step {row["step"]}: loss {row["train/loss"]:.3f}, {spent:.0f} s', flush=True)
        if spent > self.seconds:
            loop.stop()


class Pieces:
    """Batches of pieces of a text."""

    def __init__(self, ids: Any, n_rows: int = 4, length: int = 128) -> None:
        self.ids, self.shape = ids, (n_rows, length)

    def __iter__(self) -> Any:
        rng, (n, length) = np.random.default_rng(0), self.shape
        while True:
            starts = rng.integers(len(self.ids) - length, size=n)
            rows = np.stack([self.ids[i : i + length + 1] for i in starts])
            yield rows[:, :-1], rows[:, 1:], np.ones(self.shape, np.float32)


def train(
    net: Any, weights: Any, known: Any, rows: Any, dense: float, options: argparse.Namespace
) -> None:
    """Trains a model, and tells its perplexity at the end."""
    budget = Budget(options.cpu_seconds)
    rate = optax.warmup_cosine_decay_schedule(0, options.rate, 10, options.steps)
    task = supervised.TrainTask(
        Pieces(known),
        tl.CrossEntropyLoss(),
        optax.adamw(rate, b2=0.99, weight_decay=0.0),
        clip_norm=1.0,
        trainable=lambda path: path != 'embedding/table' and not path.endswith('router/bias'),
    )
    model = lc.Model(net, weights, lc.init_state(net, (rows[0][:, :-1],), Mode.TRAIN))
    loop = supervised.Loop(model, task, callbacks=[budget], progress=False, eval_every=None)
    loop.run(options.steps)
    found = perplexity(net, loop.weights, rows)
    spent = time.process_time() - budget.start
    print(
        f'  after {loop.step} steps of 512 tokens, {spent:.0f} CPU s: perplexity {found:.3f}, '
        f'ratio {found / dense:.3f}',
        flush=True,
    )


def mixed(fraction: float, n_experts: int, layer: Any) -> Any:
    """A feed-forward half of a block with a mixture; other layers are as they are."""
    if not isinstance(layer, tl.Residual) or not isinstance(layer.layers[1], tl.GatedDense):
        return layer
    n_shared, n_chosen = sizes(fraction, n_experts)
    mixture = tl.MixtureFF(layer.layers[1].n_units, n_experts, n_chosen, n_shared)
    return layer.replace(layers=(layer.layers[0], mixture))


class Decoder:
    """A model that makes a token at a time, and the times it took."""

    def __init__(self, net: Any, weights: Any) -> None:
        net, self.weights = lc.unstack(net, weights)
        self.net = transforms.fuse(net)  # as `generate` does
        self.seconds: list[float] = []

    @functools.cached_property
    def many(self) -> Any:
        """(weights, state, token (1, 1), n) → the token and the state after n more."""

        def step(weights: Any, carry: Any) -> Any:
            token, state = carry
            (logits,), state = self.net.apply(weights, state, (token,), mode=Mode.PREDICT)
            return jnp.argmax(logits, -1).astype(jnp.int32), state

        def many(weights: Any, state: Any, token: jax.Array, n: Any) -> Any:
            return jax.lax.fori_loop(0, n, lambda _, carry: step(weights, carry), (token, state))

        return jax.jit(many, donate_argnums=1)

    def run(self, n_tokens: int) -> None:
        """Decodes from the start of a sequence, in one program as `generate` does."""
        state = lc.init_state(self.net, lc.shape_dtype((1, MAX_LEN), 'int32'))
        token, state = self.many(self.weights, state, jnp.ones((1, 1), jnp.int32), 1)
        jax.block_until_ready(token)
        start = time.perf_counter()
        jax.block_until_ready(self.many(self.weights, state, token, n_tokens))
        self.seconds.append((time.perf_counter() - start) / n_tokens)


def speed(model: Any, options: argparse.Namespace, bits: int) -> None:
    """Milliseconds a token; which units an expert has does not matter, so weights are random."""
    if bits == 8 and not transforms.narrow_paths(tl.MixtureFF(64)):
        print('\n8 bits: the matrices of mixtures are not kept so')
        return
    made = {'dense': (model.layer, model.weights)}
    for fraction in options.fractions:
        net = transforms.rewrite(model.layer, functools.partial(mixed, fraction, options.experts))
        made[str(fraction)] = net, jax.jit(net.init)(TOKEN, jax.random.key(0))[0]
    if bits == 8:
        made = {name: transforms.quantize(*each) for name, each in made.items()}
    decoders = {name: Decoder(*each) for name, each in made.items()}
    for _ in range(options.repeats):
        for decoder in decoders.values():
            decoder.run(options.tokens)
    dense = min(decoders['dense'].seconds)
    print(f'\n{"units":<8}{"ms a token":>12}{"faster":>9}{"weights":>9}   {bits} bits')
    for name, decoder in decoders.items():
        best, n = min(decoder.seconds), trees.count(decoder.weights)
        print(f'{name:<8}{1e3 * best:>12.2f}{dense / best:>9.2f}{n / 1e6:>8.0f}M', flush=True)


if __name__ == '__main__':
    main()
