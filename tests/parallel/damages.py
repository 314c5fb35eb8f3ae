"""Checkpoints of several processes, damaged in several ways: what tests call in each process."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import runs

from layercomb import UsageError, checkpoints, optimizers, parallel, supervised, tl
from layercomb.layers.facts import processes


def loop_on_all(directory, **given):
    """A small run on all devices of all processes."""
    net = tl.Serial(tl.Embedding(runs.VOCAB, 8), tl.Dense(runs.VOCAB))
    task = supervised.TrainTask(runs.Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2))
    return supervised.Loop(
        net, task, output_dir=directory, progress=False, eval_every=None, checkpoint_every=2,
        mesh=parallel.make_mesh(), **given,
    )  # fmt: skip


def train(directory, n_steps):
    """Trains; the steps that are saved."""
    loop_on_all(directory).run(n_steps)
    return sorted(p.name for p in (Path(directory) / 'checkpoints').iterdir())


def found(directory):
    """The step at which a run goes on, or why it does not."""
    try:
        return loop_on_all(directory).step
    except UsageError as e:
        return str(e)


def each(directory, damages):
    """What each damage of the last checkpoint leads to, and its deletion at the end."""
    last = Path(directory) / 'checkpoints' / '4'
    whole, said = last.parent.parent / 'whole', []
    _first(shutil.copytree, last, whole)
    for how, what, other in damages:
        _first(_damage, last, how, what, other)
        said.append(found(directory))
        processes.from_all(0)
        _first(_put_back, whole, last)
    said.append(found(directory))
    processes.from_all(0)
    _first(shutil.rmtree, last)
    said.append(found(directory))
    processes.from_all(0)
    _first(shutil.move, whole, last)
    return said


def _first(do, *args):
    """Something that the first process does before all go on."""
    if jax.process_index() == 0:
        do(*args)
    processes.from_all(0)


def _put_back(whole, last):
    shutil.rmtree(last)
    shutil.copytree(whole, last)


def _damage(step, how, what, other):
    place = step / what
    if place.name == 'd':  # its files have names made by chance
        place = max(place.iterdir(), key=lambda p: p.stat().st_size)
    if how == 'delete':
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    elif how == 'truncate':
        place.write_bytes(place.read_bytes()[:-1])
    elif place.is_dir():
        shutil.rmtree(place)
        shutil.copytree(step / other, place)
    else:
        source = step / other
        if source.name == 'd':
            source = max(source.iterdir(), key=lambda p: p.stat().st_size)
        place.write_bytes(source.read_bytes())


def apart(directories):
    """What a run says if each process sees another directory."""
    return found(directories[jax.process_index()])


def read_wrongly(directory):
    """What a run says if the last process reads something else than the others."""
    if jax.process_index() == jax.process_count() - 1:
        checkpoints._checksum = lambda file: 0
    return found(directory)
