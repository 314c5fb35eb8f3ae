"""Callbacks: when they are called, with what, how they end a run, and what their errors leave."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from tiny_run import PlainData, eval_task, loop

from layercomb import UsageError
from layercomb.supervised import Callback, inflight
from layercomb.supervised.reports import read_metrics


class Notes(Callback):
    """Writes down each call as (what, step of the row, step of the loop)."""

    def __init__(self):
        self.calls, self.rows = [], {}

    def after_step(self, loop, row):
        self.calls.append(('step', row['step'], loop.step))
        self.rows[row['step']] = row

    def after_evaluation(self, loop, row):
        self.calls.append(('evaluation', row['step'], loop.step))
        assert 'valid/loss' in row

    def at_end(self, loop, row):
        self.calls.append(('end', row['step'], loop.step))

    def steps(self, what):
        return [(row, taken) for name, row, taken in self.calls if name == what]


class StopAt(Callback):
    def __init__(self, step, when='after_step'):
        self.step = step
        setattr(self, when, self.stop)

    def stop(self, loop, row):
        if row['step'] == self.step:
            loop.stop()


def test_each_step_is_seen_in_order_with_its_numbers(tmp_path):
    notes = Notes()
    trained = loop(tmp_path, eval_tasks=eval_task(), eval_every=5, callbacks=[notes])
    last = trained.run(12)
    assert [step for step, _ in notes.steps('step')] == list(range(1, 13))
    assert all(0 <= taken - step <= inflight.AHEAD for step, taken in notes.steps('step'))
    assert notes.steps('evaluation') == [(5, 5), (10, 10), (12, 12)]
    assert notes.steps('end') == [(12, 12)] and notes.calls[-1][0] == 'end'
    for row in read_metrics(tmp_path):
        assert notes.rows[row['step']]['train/loss'] == row['train/loss']
    assert last == read_metrics(tmp_path)[-1]


def test_rows_of_steps_that_are_not_logged():
    notes = Notes()
    loop(callbacks=(notes,), log_every=100).run(3)
    assert notes.rows[2].keys() == {'step', *map('train/{}'.format, (
        'loss', 'grad_norm', 'learning_rate'))}  # fmt: skip


def test_callbacks_change_no_bit():
    runs = [loop(callbacks=callbacks) for callbacks in ((), (Notes(),))]
    rows = [run.run(12) for run in runs]
    assert rows[0]['train/loss'] == rows[1]['train/loss']
    for a, b in zip(*(jax.tree.leaves(run.weights) for run in runs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('when', ['after_step', 'after_evaluation'])
def test_a_callback_ends_the_run_which_is_saved_and_goes_on(tmp_path, when):
    arguments = {'eval_tasks': eval_task(), 'eval_every': 5, 'log_every': 100}
    notes = Notes()
    stopped = loop(tmp_path / 'a', callbacks=(StopAt(5, when), notes), **arguments)
    row = stopped.run(100)
    assert 5 <= stopped.step <= 5 + inflight.AHEAD and row['step'] == stopped.step
    assert notes.steps('end') == [(stopped.step, stopped.step)]
    assert os.listdir(tmp_path / 'a' / 'checkpoints') == [str(stopped.step)]
    assert read_metrics(tmp_path / 'a')[-1] == row
    if when == 'after_evaluation':
        assert stopped.step == 5 and 'valid/loss' in row
    resumed, whole = loop(tmp_path / 'a', **arguments), loop(tmp_path / 'b', **arguments)
    assert resumed.run(15)['train/loss'] == whole.run(15)['train/loss']


def test_stop_ends_the_next_run_if_none_is_running(tmp_path):
    trained = loop(tmp_path)
    trained.stop()
    assert trained.run(3) == {'step': 0}
    assert trained.run(3)['step'] == 3
    trained.stop()
    assert trained.run(9) == read_metrics(tmp_path)[-1]


class Fails(Callback):
    def __init__(self, step, when):
        self.step = step
        setattr(self, when, self.fail)

    def fail(self, loop, row):
        if row['step'] == self.step:
            raise RuntimeError('mine')


@pytest.mark.parametrize('when', ['after_step', 'after_evaluation', 'at_end'])
def test_an_error_of_a_callback_is_raised_and_the_run_goes_on_from_there(tmp_path, when):
    arguments = {'eval_tasks': eval_task(), 'eval_every': 4, 'checkpoint_every': 3}
    failing = loop(tmp_path / 'a', callbacks=(Fails(4, when),), **arguments)
    with pytest.raises(RuntimeError, match=r'^mine$'):
        failing.run(4 if when == 'at_end' else 20)
    saved = sorted(map(int, os.listdir(tmp_path / 'a' / 'checkpoints')))
    assert saved[0] == 3
    whole = loop(tmp_path / 'b', **arguments)
    wanted = whole.run(20)['train/loss']
    assert failing.run(20)['train/loss'] == wanted  # in the same object
    assert loop(tmp_path / 'a', **arguments).step == 20
    steps = [row['step'] for row in read_metrics(tmp_path / 'a')]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_the_last_step_is_saved_by_the_next_run_if_an_interrupt_prevented_it(tmp_path):
    class Interrupting(Callback):
        rows = []

        def after_step(self, loop, row):
            if row['step'] == 5:
                raise KeyboardInterrupt

        def at_end(self, loop, row):
            self.rows.append(row)

    trained = loop(tmp_path, callbacks=(Interrupting(),))
    with pytest.raises(KeyboardInterrupt):
        trained.run(5)
    assert not (tmp_path / 'checkpoints').exists()
    row = trained.run(5)
    assert os.listdir(tmp_path / 'checkpoints') == ['5']
    assert row['step'] == 5 and 'train/loss' in row and Interrupting.rows == [row]
    assert trained.run(5) == row and Interrupting.rows == [row]


def test_an_error_of_the_system_in_a_callback_is_the_cause_of_a_usage_error():
    class Unreachable(Callback):
        def after_step(self, loop, row):
            raise ConnectionError('no network')

    with pytest.raises(UsageError, match='no network') as e:
        loop(callbacks=(Unreachable(),)).run(1)
    assert isinstance(e.value.__cause__, ConnectionError)


def test_what_is_no_callback():
    with pytest.raises(TypeError, match=r'callbacks holds <class .*Notes.*: give objects of class'):
        loop(callbacks=(Notes,))
    with pytest.raises(TypeError, match=r'callbacks=<.*: give a tuple of supervised.Callback'):
        loop(callbacks=Notes(), data=PlainData())
