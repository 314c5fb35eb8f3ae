"""What training on n devices holds, computes and sends: on 1, 2, 4 and 8 simulated CPU devices.

    python benchmarks/scaling.py [--models transformer llama reformer terraformer]
        [--axes fsdp sequence] [--steps 3] [--sensitivity]

For each model, axis and n, with `parallel.make_mesh(fsdp=n)`, which splits rows, or
`parallel.make_mesh(fsdp=1, sequence=n)`, which splits positions, and the same batch:

* bytes a device of weights and optimizer state (what the compiled step takes, by
  `memory_analysis()`), and of temporaries, which are gradients and activations, beside 1 / n;
* the losses of some steps, beside those of one device: asked for is 1e-5;
* what the program sends, counted in the compiled step's text: kinds, and the largest gather, which
  must be of one block's weight, and not of weights stacked over depth.

With --sensitivity: how far losses move on one device when weights change by their last bit, the
measure of what a difference between meshes means.

Then a model of cost, on paper: a step of a Llama of 8B parameters on 8, 64 and 512 H100s. Products
take 6 x parameters x tokens; each weight is gathered twice a step in bfloat16 and its gradient
scattered once in float32, as counted above. A GPU is given 989 TFLOP/s of bfloat16, of which
products reach 60 %, 450 GB/s to the others of its machine and 50 GB/s to other machines. What is
sent hides behind products, except for the first block's weights.
"""

from __future__ import annotations

import argparse
import os
import re

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')

from typing import Any

import jax
import machine
import numpy as np

import layercomb as lc
from layercomb import models, optimizers, parallel, supervised, tl

VOCAB, D_MODEL, D_FF, N_LAYERS, N_HEADS, LENGTH, ROWS = 512, 256, 1024, 4, 8, 128, 8
SIZES = (VOCAB, D_MODEL, D_FF, N_LAYERS, N_HEADS, LENGTH)
MODELS = {
    'transformer': lambda: models.TransformerLM(*SIZES),
    'llama': lambda: models.Llama(
        VOCAB, D_MODEL, D_FF, n_layers=N_LAYERS, n_heads=N_HEADS, max_len=LENGTH
    ),
    'reformer': lambda: models.ReformerLM(*SIZES),
    'terraformer': lambda: models.TerraformerLM(*SIZES, ff=tl.MixtureFF(D_FF, 32, 3, 1)),
}
COUNTS = (1, 2, 4, 8)
AXES = ['fsdp', 'sequence']
KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'

# Of MaxText's documentation (reference/models/tiering), utilisation of bfloat16 training on TPUs.
PUBLISHED = (
    ('Llama 3.1 8B, 256 v6e', 0.4546),
    ('Llama 3.1 70B, 256 v6e', 0.5033),
    ('Llama 2 70B, 512 v5p', 0.654),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='*', choices=[*MODELS], default=[*MODELS])
    parser.add_argument('--axes', nargs='*', choices=AXES, default=AXES)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--sensitivity', action='store_true', help='how losses answer to last bits')
    options = parser.parse_args()
    print(machine.describe('jaxlib'), f'· {jax.device_count()} simulated devices')
    if options.sensitivity:
        for name in options.models:
            sensitivity(name, options.steps)
        return
    for name in options.models:
        for axis in options.axes:
            study(name, axis, options.steps)
    on_paper()


def study(name: str, axis: str, steps: int) -> None:
    """The table of one model and axis."""
    print(f'\n{name}, {axis}: d {D_MODEL}, {N_LAYERS} blocks, a batch of {ROWS} x {LENGTH}')
    print(
        f'{"devices":>7}{"weights+state":>15}{"x 1/n":>7}{"temporaries":>13}{"x 1/n":>7}'
        f'{"largest gather":>20}{"loss error":>12}   sent'
    )
    first: Any = None
    for n in COUNTS:
        held, temporary, sent, losses = measured(name, axis, n, steps)
        first = first or (held, temporary, losses)
        error = max(abs(a / b - 1) for a, b in zip(losses, first[2], strict=True))
        gathers = [shape for kind, shape in sent if kind == 'all-gather']
        stacked = [s for s in gathers if s[:1] == (N_LAYERS,) and len(s) > 2]
        largest = max(gathers, key=np.prod, default=())
        kinds = {k: sum(kind == k for kind, _ in sent) for k in KINDS.split('|')}
        told = ', '.join(f'{k} {m}' for k, m in kinds.items() if m)
        print(
            f'{n:>7}{held:>15,}{held * n / first[0]:>7.2f}{temporary:>13,}'
            f'{temporary * n / first[1]:>7.2f}{"x".join(map(str, largest)):>20}{error:>12.1e}'
            f'   {told}{" STACKED WEIGHTS GATHERED" * bool(stacked)}',
            flush=True,
        )


def measured(name: str, axis: str, n: int, steps: int) -> tuple[int, int, list[Any], list[float]]:
    """Bytes held and temporary on a device, what is sent, and losses."""
    mesh = parallel.make_mesh(**{'fsdp': 1, axis: n}, devices=jax.devices()[:n])
    found = Losses()
    task = supervised.TrainTask(Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-3))
    loop = supervised.Loop(
        MODELS[name](), task, mesh=mesh, progress=False, eval_every=None, callbacks=(found,)
    )
    batch = loop._layout.rows(next(iter(Batches())))
    program = loop._compiled.lower(loop._carry, loop._frozen, loop._key, batch).compile()
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes - lc.trees.n_bytes(batch) // n
    sent = [
        (kind, tuple(map(int, shape.split(','))) if shape else ())
        for shape, kind in re.findall(
            rf'= \(?\w+\[([\d,]*)\].*? ({KINDS})(?:-start)?\(', program.as_text()
        )
    ]
    loop.run(steps)
    return held, memory.temp_size_in_bytes, sent, found.found


def sensitivity(name: str, steps: int) -> None:
    """How far losses move on one device when weights change by their last bit."""
    found = []
    for apart in (0.0, 6e-8):
        net, key = MODELS[name](), jax.random.key(0)
        weights, state = net.init(lc.signature_of(next(iter(Batches()))[0]), key)
        leaves, tree = jax.tree.flatten(weights)
        keys = jax.random.split(jax.random.key(9), len(leaves))
        moved = [
            x * (1 + apart * jax.random.normal(k, x.shape, x.dtype))
            for k, x in zip(keys, leaves, strict=True)
        ]
        losses, model = Losses(), lc.Model(net, tree.unflatten(moved), state)
        task = supervised.TrainTask(Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-3))
        loop = supervised.Loop(model, task, progress=False, eval_every=None, callbacks=(losses,))
        loop.run(steps)
        found.append(np.array(losses.found))
    moves = ' '.join(f'{x:.1e}' for x in np.abs(found[1] / found[0] - 1))
    print(f'{name}: weights changed by 6e-8 move the losses of {steps} steps by {moves}')


class Losses(supervised.Callback):
    """Keeps the losses of a run."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def after_step(self, loop: Any, row: Any) -> None:
        self.found.append(row['train/loss'])


class Batches:
    """Batches of random tokens, the same each time."""

    def __iter__(self) -> Any:
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(1, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
            yield x[:, :-1], x[:, 1:], np.ones((ROWS, LENGTH), np.float32)


def on_paper(parameters: float = 8e9, n_layers: int = 32, tokens_a_gpu: int = 16_384) -> None:
    """What a step would take on H100s."""
    peak, reached, inside, outside = 989e12, 0.6, 450e9, 50e9
    print(f'\non paper: {parameters / 1e9:.0f}B parameters, {tokens_a_gpu:,} tokens a GPU')
    print(f'{"GPUs":>5}{"GB a GPU":>10}{"products s":>12}{"sent s":>8}{"step s":>8}{"of peak":>9}')
    for n in (8, 64, 512):
        held = parameters * 16 / n / 1e9  # weights, gradient and Adam's two moments, float32
        products = 6 * parameters * tokens_a_gpu / (peak * reached)
        sent = parameters * (2 * 2 + 4) * (1 - 1 / n) / (inside if n <= 8 else outside)
        step = max(products, sent) + sent / (3 * n_layers)
        used = 6 * parameters * tokens_a_gpu / step / peak
        print(f'{n:>5}{held:>10.1f}{products:>12.2f}{sent:>8.2f}{step:>8.2f}{used:>9.0%}')
    told = '; '.join(f'{name} {used:.0%}' for name, used in PUBLISHED)
    print(f'MaxText publishes, on TPUs: {told}')


if __name__ == '__main__':
    main()
