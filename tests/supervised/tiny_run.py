"""A model, data and a loop small enough for tests; also run as a program, to be killed."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import grain
import numpy as np
import optax

from layercomb import tl
from layercomb.supervised import EvalTask, Loop, TrainTask

V, L, B = 16, 6, 4

NET = tl.Serial(tl.Embedding(V, 8), tl.Dropout(0.3), tl.Dense(V))
ADAM = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
SGD = optax.sgd(0.1)
LOSS = tl.CrossEntropyLoss()


def example(i):
    """The next token is the one after; some positions are padding."""
    rng = np.random.default_rng(int(i))
    x = rng.integers(0, V, L).astype(np.int32)
    return x, (x + 1) % V, (rng.random(L) < 0.8).astype(np.float32)


def grain_data(batch_size=B):
    dataset = grain.MapDataset.range(40).shuffle(seed=1).map(example).repeat()
    return dataset.batch(batch_size).to_iter_dataset(grain.ReadOptions(1, 2))


class PlainData:
    """Batches from a generator, which cannot say where it stands."""

    def __init__(self, n=None):
        self.n = n

    def __iter__(self):
        for i in itertools.count() if self.n is None else range(self.n):
            rows = [example(B * i + j) for j in range(B)]
            yield tuple(np.stack(column) for column in zip(*rows, strict=True))


def loop(output_dir=None, *, net=NET, data=None, optimizer=ADAM, task: Any = None, **kwargs):
    data = grain_data() if data is None else data
    given = {'eval_every': None, 'checkpoint_every': None, 'log_every': 1, 'progress': False}
    train_task = TrainTask(data, LOSS, optimizer, **(task or {}))
    return Loop(net, train_task, output_dir=output_dir, **{**given, **kwargs})


def eval_task(**kwargs):
    metrics = (tl.CrossEntropyLoss(), tl.Accuracy(), tl.BitsPerByte())
    return EvalTask(PlainData(3), metrics, **kwargs)


if __name__ == '__main__':
    loop(sys.argv[1], checkpoint_every=1).run(100_000)
