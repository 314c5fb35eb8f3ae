"""A training step on a CPU whose blocks are in mapped files: does it need the memory of one block?

    python benchmarks/mapped_blocks.py [--depth 24] [--d_model 1024] [--length 64] [--batch 1]

Weights of a transformer's blocks, and Adam's moments, are in files that are mapped, and JAX takes a
block's slice without a copy. A step runs block by block: a compiled function forwards, and one
backwards, which computes a block's gradient and applies it; what it gives is written to the files.
To see that it trains, the same is done with a small model beside a `Loop`. Printed are

* files: what weights and moments of blocks take;
* own: the memory of the process's own (RssAnon) after a step, which the system cannot drop; pages
  of mapped files it can. A limit around the command, such as of a cgroup, shows that it does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import machine
import numpy as np

from layercomb import Model, models, optimizers, supervised, tl, trees
from layercomb.supervised.updates import update

VOCAB, N_HEADS, STEPS = 256, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--depth', type=int, default=24)
    parser.add_argument('--d_model', type=int, default=1024)
    parser.add_argument('--length', type=int, default=64)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--directory', help='where the files are')
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        check(Path(directory) / 'small')
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        net = model(options.depth, options.d_model, options.length)
        mapped = Mapped(net, Path(directory), (options.batch, options.length))
        files = trees.n_bytes(mapped.files)
        print(
            f'depth {options.depth}, d {options.d_model}, a batch of {options.batch} x '
            f'{options.length}\nfiles {files / 1e6:.0f} MB, own {own_bytes() / 1e6:.0f} MB'
        )
        data = batches(options.batch, options.length)
        for i in range(STEPS):
            start = time.perf_counter()
            loss = mapped.step(*next(data))
            seconds = time.perf_counter() - start
            print(f'step {i}: loss {loss:.4f}, {seconds:.1f} s, own {own_bytes() / 1e6:.0f} MB')


def check(directory: Path) -> None:
    """Losses of a small model are those of a `Loop`."""
    net = model(3, 64, 16)
    mapped = Mapped(net, directory, (2, 16))
    stacked = jax.tree.map(lambda x: jnp.array(np.array(x)), mapped.files[0])
    made = Model(net, {**mapped.rest, mapped.key: stacked}, {})
    found = []

    class Losses(supervised.Callback):
        def after_step(self, loop: Any, row: Any) -> None:
            found.append(row['train/loss'])

    class Data:
        def __iter__(self) -> Any:
            return batches(2, 16)

    task = supervised.TrainTask(Data(), tl.CrossEntropyLoss(), optimizers.adamw(1e-3))
    supervised.Loop(made, task, progress=False, callbacks=(Losses(),)).run(4)
    data = batches(2, 16)
    ours = [mapped.step(*next(data)) for _ in found]
    np.testing.assert_allclose(ours, found, rtol=1e-5)
    print('losses of a small model are those of a Loop, to 1e-5')


class Mapped:
    """A language model whose blocks, and their optimizer's state, are in mapped files."""

    def __init__(self, net: Any, directory: Path, shape: tuple[int, int]) -> None:
        directory.mkdir(exist_ok=True)
        self.children, self.optimizer = net.children, optimizers.adamw(1e-3)
        at = [isinstance(layer, tl.Repeat) for _, layer in net.children].index(True)
        self.at, (self.key, stack) = at, net.children[at]
        self.block, self.n, n = stack.layer, stack.n, stack.n
        small = [x.replace(n=1) if k == self.key else x for k, x in net.children]
        signature: Any = (jax.ShapeDtypeStruct(shape, jnp.int32),)
        weights, _ = net.with_sublayers(tuple(small)).init(signature, jax.random.key(0))
        one = jax.tree.map(lambda x: x[0], weights.pop(self.key))
        self.rest, self.rest_state = weights, self._first(weights)
        numbers = itertools.count()

        def file(x: Any) -> Any:
            name = directory / str(next(numbers))
            return np.memmap(name, x.dtype, 'w+', shape=(n, *x.shape))

        self.files = jax.tree.map(file, (one, self._first(one)))
        width = weights['embedding']['table'].shape[1]
        inside = (jax.ShapeDtypeStruct((*shape, width), jnp.float32),)
        init = jax.jit(lambda key: self.block.init(inside, key)[0])
        for i in range(n):
            its = init(jax.random.key(i))
            self._put(i, (its, self._first(its)))

    def _first(self, weights: Any) -> Any:
        with jax.numpy_dtype_promotion('standard'):
            return self.optimizer.init(weights)

    def _block(self, i: int) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x[i]), self.files)

    def _put(self, i: int, its: Any) -> None:
        for file, x in zip(jax.tree.leaves(self.files), jax.tree.leaves(its), strict=True):
            file[i] = x

    def step(self, tokens: Any, targets: Any, loss_weights: Any) -> float:
        """Takes a step, and returns its loss."""
        x, kept = self.before(self.rest, tokens), []
        for i in range(self.n):
            kept.append(x)
            x = self.forward(self._block(i)[0], x)
        loss, (grads, ct) = self.after(self.rest, x, targets, loss_weights)
        for i in reversed(range(self.n)):
            its, ct = self.backward(self._block(i), kept.pop(), ct)
            self._put(i, its)
        self.rest, self.rest_state = self.end(self.rest, self.rest_state, tokens, ct, grads)
        return float(loss)

    @functools.partial(jax.jit, static_argnums=0)
    def before(self, rest: Any, tokens: Any) -> Any:
        """What the first block reads."""
        return self._applied(self.children[: self.at], rest, tokens)

    @functools.partial(jax.jit, static_argnums=0)
    def forward(self, weights: Any, x: Any) -> Any:
        """A block."""
        return self.block.apply(weights, {}, (x,), mode=tl.Mode.TRAIN)[0][0]

    @functools.partial(jax.jit, static_argnums=0)
    def after(self, rest: Any, x: Any, targets: Any, loss_weights: Any) -> Any:
        """The loss, and its gradients with respect to weights and to what the last block gives."""

        def loss(rest: Any, x: Any) -> Any:
            logits = self._applied(self.children[self.at + 1 :], rest, x)
            found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            return -(found * loss_weights).sum() / loss_weights.sum()

        return jax.value_and_grad(loss, (0, 1))(rest, x)

    @functools.partial(jax.jit, static_argnums=0)
    def backward(self, its: Any, x: Any, ct: Any) -> Any:
        """A block's new weights and state, and the cotangent of what it read."""
        weights, state = its
        _, pull = jax.vjp(self.forward, weights, x)
        grads, ct = pull(ct)
        return update(self.optimizer, grads, state, weights, jnp.float32(0), lambda _: 0), ct

    @functools.partial(jax.jit, static_argnums=0)
    def end(self, rest: Any, state: Any, tokens: Any, ct: Any, grads: Any) -> Any:
        """New weights and state of what is outside of blocks."""
        _, pull = jax.vjp(lambda rest: self.before(rest, tokens), rest)
        grads = jax.tree.map(jnp.add, grads, pull(ct)[0])
        return update(self.optimizer, grads, state, rest, jnp.float32(0), lambda _: 0)

    def _applied(self, children: Any, rest: Any, x: Any) -> Any:
        for key, layer in children:
            (x,), _ = layer.apply(rest.get(key, {}), {}, (x,), mode=tl.Mode.TRAIN)
        return x


def model(depth: int, d: int, length: int) -> Any:
    return models.TransformerLM(VOCAB, d, 4 * d, depth, N_HEADS, length)


def batches(n_rows: int, length: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    while True:
        x = rng.integers(1, VOCAB, (n_rows, length + 1)).astype(np.int32)
        yield x[:, :-1], x[:, 1:], np.ones(x[:, 1:].shape, np.float32)


def own_bytes() -> int:
    """The memory of the process's own."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith('RssAnon'))


if __name__ == '__main__':
    main()
