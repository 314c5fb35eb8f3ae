"""What is asked of one start of a run: --max_hours, --profile, and what an optimizer keeps."""

from __future__ import annotations

import os
import re
import threading
import time

import pytest
from test_stopping import CONFIG, DATA

from layercomb import cli
from layercomb.launcher.training.stopping import on_time
from layercomb.supervised.reports import read_metrics


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """A function that trains in this process; it returns exit code, output and errors."""
    (tmp_path / 'slow.gin').write_text(CONFIG)
    (tmp_path / 'slow_data.py').write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def train(*words, steps=100_000):
        command = [
            'train',
            'slow.gin',
            '--output_dir',
            'run',
            '--gin_param',
            f'train.steps={steps}',
        ]
        code = cli.main([*command, *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return train


OVER = (
    r'layercomb: the time of --max_hours is over: stopped after step (\d+), which is saved; '
    'the same command goes on'
)


def test_a_run_is_saved_when_its_time_is_over_and_goes_on(start, tmp_path):
    taken, hours = [0], 0.0015
    while len(taken) < 3:
        began = time.monotonic()
        code, out, err = start('--max_hours', str(hours))
        assert code == 0 and out == ''
        assert time.monotonic() - began > 3600 * hours
        step = int(re.fullmatch(OVER, err.splitlines()[-1])[1])
        assert step >= taken[-1]
        if step == taken[-1]:  # a slow machine had not compiled yet
            hours *= 2
            assert hours < 0.1
            continue
        taken.append(step)
        saved = {int(name) for name in os.listdir(tmp_path / 'run' / 'checkpoints')}
        assert saved == set(taken[1:])
    assert [row['step'] for row in read_metrics(tmp_path / 'run')] == list(range(1, step + 1))


def test_a_run_that_ends_in_time_ends_as_ever(start):
    code, out, err = start('--max_hours', '1e9', steps=3)
    assert code == 0 and 'step 3' in out + err and 'is over' not in err


def test_without_a_time_there_is_no_timer_and_one_that_is_past_calls_at_once():
    calls = []
    with on_time(None, lambda: calls.append('stop')) as came:
        assert came == [] and threading.active_count() == len(threading.enumerate())
    with on_time(time.monotonic() - 5, lambda: calls.append('stop')) as came:
        deadline = time.monotonic() + 10
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
    assert calls == ['stop'] and len(came) == 1


def test_steps_are_traced_into_the_run(start, tmp_path):
    code, out, _ = start('--profile', '3:4', steps=6)
    assert code == 0
    found = re.search(r'the trace of steps 3 to 4: (.*)', out)[1]
    assert found.startswith(str(tmp_path / 'run' / 'plugins' / 'profile'))
    names = os.listdir(found)
    assert 'perfetto_trace.json.gz' in names and any(n.endswith('.xplane.pb') for n in names)
    code, _, err = start('--profile', '6:8', steps=9)
    assert code == 2 and '--profile 6:8: the run goes on after step 6: give later steps' in err


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (('--profile', '20:10'), "'20:10' is no first and last step, from 1 on and in order"),
        (('--profile', '0:3'), "'0:3' is no first and last step"),
        (('--profile', 'early'), "argument --profile: 'early' is no first .* write e.g. 10:20"),
        (('--profile', '1:'), "'1:' is no first and last step"),
        (('--profile', '2:200000'), '--profile 2:200000: the run ends with step 100000: give earl'),
        (('--max_hours', '0'), "argument --max_hours: '0' are no hours above 0: write e.g. 1.5"),
        (('--max_hours', '-1'), "'-1' are no hours above 0"),
        (('--max_hours', 'nan'), "'nan' are no hours above 0"),
        (('--max_hours', 'inf'), "'inf' are no hours above 0"),
        (('--max_hours', 'soon'), "'soon' are no hours above 0"),
    ],
)
def test_mistakes(start, tmp_path, words, said):
    code, out, err = start(*words)
    assert code == 2 and out == '' and err.count('\n') == 1
    assert re.search(said, err), err
    assert not (tmp_path / 'run').exists()


def test_a_configuration_keeps_moments_narrow(start, tmp_path):
    config = CONFIG.replace(
        'TrainTask.optimizer = @optimizers.adamw()',
        'TrainTask.optimizer = @optimizers.narrow_state()\n'
        'optimizers.narrow_state.optimizer = @optimizers.adamw()\n'
        'optimizers.narrow_state.bits = 16\n'
        'optimizers.narrow_state.min_size = 1\n'
        'supervised.TrainTask.accumulate = 2\n'
        "supervised.TrainTask.accumulate_dtype = 'bfloat16'",
    )
    (tmp_path / 'slow.gin').write_text(config.replace('(4, 3)', '(64, 3)'))
    code, _, err = start(steps=3)
    assert code == 0, err
    code, _, err = start('--gin_param', 'narrow_state.bits=4', steps=4)
    assert code == 2 and 'narrow_state: bits must be 8 or 16, got 4' in err


def test_a_mesh_is_asked_for_or_included_and_may_change(start, tmp_path):
    code, out, err = start('--mesh', 'fsdp', steps=2)
    assert code == 0, err
    assert 'step 2: ' in out
    (tmp_path / 'slow.gin').write_text(CONFIG + "\ninclude 'mesh/data.gin'\n")
    code, out, err = start(steps=3)
    assert code == 0, err
    assert 'step 3: ' in out


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (
            ('--mesh', 'data=2'),
            'a mesh of data=2 does not fit 1 device: use fsdp=1, or set JAX_NUM_CPU_DEVICES to try '
            'it on a CPU',
        ),
        (
            ('--mesh', 'rows=2'),
            "argument --mesh: 'rows=2' is no mesh: write e.g. data=2,fsdp=4, of data, fsdp, "
            'sequence, tensor: see layercomb train --help',
        ),
        (
            ('--num_processes', '2'),
            '--num_processes is about several processes: give --distributed too',
        ),
    ],
)
def test_devices_that_cannot_be(start, words, said):
    code, _, err = start(*words)
    assert (code, err) == (2, f'layercomb: {said}\n')
