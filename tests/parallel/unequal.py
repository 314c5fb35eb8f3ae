"""Data of unequal length in several processes: what tests call in each process."""

from __future__ import annotations

import argparse
import itertools

import jax
import numpy as np
import runs

from layercomb import UsageError, optimizers, parallel, supervised, tl
from layercomb.launcher.training import devices

_OPTIONS = dict.fromkeys(('coordinator_address', 'num_processes', 'process_id'))
NET = tl.Serial(tl.Embedding(runs.VOCAB, 8), tl.Dense(runs.VOCAB))


def batch(seed, n_rows, length=runs.LENGTH):
    """A batch, of which some positions do not count."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, runs.VOCAB, (n_rows, length + 1)).astype(np.int32)
    return x[:, :-1], x[:, 1:], (rng.random((n_rows, length)) < 0.8).astype(np.float32)


def measured(sizes):
    """What is measured of batches of these sizes: those of each process, or of all for one."""
    alone = jax.process_count() == 1
    mine = itertools.chain(*sizes) if alone else sizes[jax.process_index()]
    data = [batch(*s) for s in mine]
    task = supervised.EvalTask(data, (tl.CrossEntropyLoss(), tl.Accuracy()))
    weights, state = NET.init((jax.ShapeDtypeStruct((1, 16), 'int32'),), jax.random.key(0))
    layout = parallel.Layout(parallel.make_mesh())
    try:
        return supervised.evaluate(NET, weights, state, task, layout)
    except UsageError as e:
        return str(e)


def begun(n_rows):
    """What a run says to first batches of so many rows in each process."""
    data = [batch(0, n_rows[jax.process_index()])]
    task = supervised.TrainTask(data, tl.CrossEntropyLoss(), optimizers.adamw(1e-3))
    try:
        return supervised.Loop(NET, task, progress=False, mesh=parallel.make_mesh()).step
    except UsageError as e:
        return str(e)


def train(n_batches):
    """Trains on so many batches of each process, as the command does."""
    data = [batch(i, 4) for i in range(n_batches[jax.process_index()])]
    with devices.together(argparse.Namespace(distributed=True, **_OPTIONS)):
        task = supervised.TrainTask(data, tl.CrossEntropyLoss(), optimizers.adamw(1e-3))
        supervised.Loop(NET, task, progress=False, mesh=parallel.make_mesh()).run(100)
