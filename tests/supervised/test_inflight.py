"""Steps set off ahead of being looked at: bounded, in order, and none passed over."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PlainData, loop

from layercomb import UsageError, tl
from layercomb.supervised import inflight
from layercomb.supervised.inflight import InFlight
from layercomb.supervised.progress import Throughput
from layercomb.supervised.reports import read_metrics


class Value:
    """A number on a device, which is ready when it is said to be."""

    def __init__(self, value, ready=False):
        self.value, self.ready, self.copied = value, ready, False

    def is_ready(self):
        return self.ready

    def copy_to_host_async(self):
        self.copied = True

    def __array__(self, dtype=None, copy=None):
        assert self.copied
        return np.asarray(self.value, np.float32)


def filled(ready):
    queue = InFlight()
    for i, is_ready in enumerate(ready):
        queue.add(i, {'loss': Value(i, is_ready), 'grad_norm': Value(2 * i)}, (i,))
    return queue


def test_only_what_is_ready_is_looked_at_or_exceeds_the_bound():
    queue = filled([True, True, False, True])
    assert [f.step for f in queue.finished(wait=False)] == [0, 1]
    assert queue.finished(wait=False)[1] == (1, {'loss': 1.0, 'grad_norm': 2.0}, (1,))
    queue.drop()
    assert [f.step for f in queue.finished(wait=False)] == [1]
    assert [f.step for f in queue.finished(wait=True)] == [1, 2, 3]
    n = inflight.AHEAD
    assert [f.step for f in filled([False] * (n + 2)).finished(wait=False)] == [0, 1]


def test_no_step_waits_for_the_numbers_of_the_one_before(monkeypatch):
    """With a device that is never found ready, as many steps are in flight as may be."""
    monkeypatch.setattr(type(jnp.zeros(())), 'is_ready', lambda self: False)
    seen, add = [], InFlight.add

    def noting(self, *args):
        add(self, *args)
        seen.append(len(self._steps))

    monkeypatch.setattr(InFlight, 'add', noting)
    loop(log_every=1).run(2 * inflight.AHEAD)
    assert max(seen) == inflight.AHEAD + 1


class Spoiled:
    """The batch of a step has an infinite weight."""

    def __init__(self, step):
        self.step = step

    def __iter__(self):
        for i, (x, y, w) in enumerate(PlainData(), 1):
            yield x, y, np.where(w > 0, np.inf, 0) if i == self.step else w


@pytest.mark.parametrize('checkpoint_every', [1, 4, None])
@pytest.mark.parametrize('step', [1, 6])
def test_the_step_that_is_not_finite_is_named_and_nothing_is_saved_after_it(
    tmp_path, monkeypatch, step, checkpoint_every
):
    monkeypatch.setattr(type(jnp.zeros(())), 'is_ready', lambda self: False)
    trained = loop(tmp_path, data=Spoiled(step), checkpoint_every=checkpoint_every)
    said = rf'^step {step}: the loss is (nan|inf) .*: a loss weight is inf; check the data$'
    with pytest.raises(UsageError, match=said):
        trained.run(30)
    assert [row['step'] for row in read_metrics(tmp_path)] == list(range(1, step))
    folder = tmp_path / 'checkpoints'
    saved = sorted(map(int, os.listdir(folder))) if folder.exists() else []
    assert all(s < step for s in saved)
    with pytest.raises(UsageError, match=r'^step \d+: the loss is nan'):  # and goes no further
        trained.run(30)


def test_how_far_ahead_changes_no_bit(monkeypatch, tmp_path):
    runs = []
    for ahead in (0, inflight.AHEAD):
        monkeypatch.setattr(inflight, 'AHEAD', ahead)
        runs.append(loop(tmp_path / str(ahead), checkpoint_every=5))
        runs[-1].run(12)
    rows = [[row['train/loss'] for row in read_metrics(tmp_path / str(n))] for n in (0, 8)]
    assert rows[0] == rows[1]
    for a, b in zip(*(jax.tree.leaves(run.opt_state) for run in runs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_steps_seen_together_share_the_time(monkeypatch):
    times = iter([100.0, 104.0])
    monkeypatch.setattr('time.perf_counter', lambda: next(times))
    throughput = Throughput()
    throughput.step(10)
    throughput.together(4)
    speeds = []
    for tokens in (10, 20, 10, 40):
        throughput.step(tokens)
        speeds.append(throughput.tokens_per_second())
    assert speeds == [10, 20, 10, 40]
    assert throughput.seconds_left(3) == 3


class Slow:
    """Batches so large that steps are still in flight when they end after 10.

    Every batch lies in the same arrays; the `bad`th is infinite.
    """

    def __init__(self, bad=None, shared=True):
        self.bad, self.shared = bad, shared

    def __iter__(self):
        arrays = np.zeros((64, 512), np.float32), np.zeros(64, np.int32), np.ones(64, np.float32)
        for i in range(1, 11):
            x, y, w = arrays if self.shared else map(np.copy, arrays)
            x[:] = np.inf if i == self.bad else np.random.default_rng(i).normal(size=x.shape)
            y[:] = i % 4
            yield x, y, w


WIDE = tl.Serial(tl.Dense(512), tl.Relu(), tl.Dense(512), tl.Relu(), tl.Dense(4))


def test_steps_before_a_batch_that_cannot_be_made_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(type(jnp.zeros(())), 'is_ready', lambda self: False)
    with pytest.raises(UsageError, match='the data ended after 10 batches'):
        loop(tmp_path, net=WIDE, data=Slow()).run(50)
    assert [row['step'] for row in read_metrics(tmp_path)] == list(range(1, 11))
    with pytest.raises(UsageError, match='step 7: the loss is nan'):
        loop(net=WIDE, data=Slow(bad=7)).run(50)


def test_data_may_fill_the_same_arrays_again(monkeypatch):
    monkeypatch.setattr(type(jnp.zeros(())), 'is_ready', lambda self: False)
    rows = [loop(net=WIDE, data=Slow(shared=shared)).run(10) for shared in (False, True)]
    assert rows[0]['train/loss'] == rows[1]['train/loss']


def test_a_step_that_is_not_finite_stays_so(tmp_path):
    trained = loop(tmp_path, net=WIDE, data=Slow(bad=10))
    for _ in range(2):
        with pytest.raises(UsageError, match='step 10: the loss is nan'):
            trained.run(10)
    assert not (tmp_path / 'checkpoints').exists()
