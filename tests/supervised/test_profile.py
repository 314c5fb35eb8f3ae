"""Traces of steps: which steps, where, and what goes wrong."""

from __future__ import annotations

import gzip
import json

import jax
import pytest
from tiny_run import loop

from layercomb import UsageError
from layercomb.supervised import Callback, Profile


def traced_steps(folder):
    """The numbers of the steps in a trace."""
    with gzip.open(folder / 'perfetto_trace.json.gz') as f:
        events = json.load(f)['traceEvents']
    return {
        int(e['args']['step_num'])
        for e in events
        if e.get('name') == 'train' and 'step_num' in e.get('args', {})
    }


def test_these_steps_alone_are_traced(tmp_path):
    profile = Profile(3, 5, tmp_path)
    trained = loop(callbacks=[profile])
    trained.run(2)
    assert profile.written is None and not list(tmp_path.iterdir())
    trained.run(12)
    assert traced_steps(profile.written) == {3, 4, 5}
    assert profile.written.parent == tmp_path / 'plugins' / 'profile'


def test_a_run_that_ends_before_is_traced_to_its_end(tmp_path):
    profile = Profile(2, 9, tmp_path / 'new')
    trained = loop(callbacks=[profile])
    trained.run(3)
    assert traced_steps(profile.written) == {2, 3}


class Wrong(Callback):
    def __init__(self):
        self.left = 1

    def after_step(self, loop, row):
        if row['step'] == 3 and self.left:
            self.left -= 1
            raise RuntimeError('an error of one step')


def test_an_error_ends_the_trace(tmp_path):
    profile = Profile(2, 6, tmp_path)
    trained = loop(callbacks=[profile, Wrong()])
    with pytest.raises(RuntimeError, match='an error of one step'):
        trained.run(12)
    before = traced_steps(profile.written)
    assert {2, 3} <= before
    with jax.profiler.trace(tmp_path / 'other'):  # no other is open
        pass
    trained.run(14)  # it goes on behind the steps that were dispatched
    assert profile.written is not None and 7 not in traced_steps(profile.written)
    assert before | traced_steps(profile.written) >= {2, 3, 4, 5, 6}


class Broken(Callback):
    def before_step(self, loop):
        if loop.step == 3:
            raise KeyboardInterrupt


def test_an_interrupt_ends_the_trace(tmp_path):
    profile = Profile(2, 6, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop(callbacks=[profile, Broken()]).run(12)
    assert traced_steps(profile.written) == {2, 3}


def test_two_traces_at_once_are_refused(tmp_path):
    jax.profiler.start_trace(tmp_path / 'other')
    try:
        with pytest.raises(
            UsageError, match=r'Profile: no trace can be taken .*: end the other one'
        ):
            loop(callbacks=[Profile(1, 2, tmp_path)]).run(2)
    finally:
        jax.profiler.stop_trace()


def test_stopped_before_a_step_it_is_not_taken():
    class Before(Callback):
        def before_step(self, loop):
            if loop.step == 4:
                loop.stop()

    trained = loop(callbacks=[Before()])
    assert trained.run(9)['step'] == 4 and trained.step == 4


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match='Profile: first=20 comes after last=10: swap them'):
        Profile(20, 10, tmp_path)
    with pytest.raises(ValueError, match='Profile: first must be at least 1, got 0'):
        Profile(0, 10, tmp_path)
    with pytest.raises(TypeError, match="Profile: last must be an int, got 'ten'"):
        Profile(1, 'ten', tmp_path)
    with pytest.raises(UsageError, match='directory'):
        Profile(1, 2, 'https://example.com/runs')
