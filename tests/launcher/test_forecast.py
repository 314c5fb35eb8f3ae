"""What `inspect` tells of a step whose blocks are in host memory is what the traced step holds."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from layercomb import models, optimizers, tl
from layercomb.launcher.experiment import Experiment
from layercomb.supervised import TrainTask

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
SIZES = argparse.Namespace(d_model=64, length=64, batch=4)
FACTOR = 1.25  # between what is told and what is counted


@pytest.fixture
def counting(monkeypatch):
    """The benchmark that counts arrays of a traced step."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module('host_offload')


def experiment(counting, name, depth, **task):
    vocab, n_heads, d = counting.VOCAB, counting.N_HEADS, SIZES.d_model
    sizes = vocab, d, 4 * d, depth, n_heads, SIZES.length
    if name == 'reformer':
        net = models.ReformerLM(*sizes, attention=tl.SelfAttention(n_heads), ff_chunk_len=None)
    else:
        net = models.TransformerLM(*sizes, remat=False)
    batches = counting.Batches(SIZES.batch, SIZES.length)
    task = TrainTask(batches, tl.CrossEntropyLoss(), optimizers.adamw(1e-3), **task)
    return Experiment(net, task)


@pytest.mark.parametrize(
    ('name', 'offload'),
    [('reformer', 'blocks'), ('transformer', 'blocks'), ('transformer', 'blocks+inputs')],
)
def test_what_is_told_is_what_is_counted(counting, name, offload, optimized):
    depth = 5
    told = experiment(counting, name, depth).training_bytes(offload=offload)
    held, peak, host, _ = counting.measured(name, depth, offload, SIZES)
    device = told['weights'] + told['optimizer'] + told['temporaries']
    assert peak / FACTOR < device < peak * FACTOR
    assert held < told['weights'] + told['optimizer'] < device
    kept = depth * SIZES.batch * SIZES.length * SIZES.d_model * 4
    assert told['host'] - host == (kept if offload == 'blocks+inputs' else 0)


def test_moments_of_few_bits_are_counted(counting):
    made = experiment(counting, 'reformer', 4)
    narrow = optimizers.narrow_state(optimizers.adamw(1e-3), 8)
    task = TrainTask(made.train_task.data, tl.CrossEntropyLoss(), narrow)
    wide, few = (
        each.training_bytes(offload='blocks') for each in (made, Experiment(made.net, task))
    )
    assert few['host'] < 0.7 * wide['host']  # heads are too narrow for it


def test_what_would_be_refused_is_not_told(counting):
    with pytest.raises(ValueError, match=r'leave out clip_norm=1\.0'):
        experiment(counting, 'reformer', 2, clip_norm=1.0).training_bytes(offload='blocks')
