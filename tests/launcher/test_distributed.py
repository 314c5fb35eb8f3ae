"""Runs of several processes on this machine: `layercomb train --distributed`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

SMALL = (
    'train.steps=6', 'train.checkpoint_every=2', 'train.eval_every=None', 'train.log_every=1',
    'models.TransformerLM.n_layers=1', 'models.TransformerLM.d_model=32',
    'models.TransformerLM.d_ff=64', 'train.baseline_text=None',
)  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(n, directory, *more):
    """Starts a run in n processes."""
    address = f'127.0.0.1:{free_port()}'
    bindings = [word for b in SMALL + more for word in ('--gin_param', b)]
    command = [sys.executable, '-m', 'layercomb', 'train', 'transformer_python']
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    processes = []
    for i in range(n):
        said = ['--output_dir', str(directory), *bindings]
        if n > 1:
            said += ['--distributed', '--coordinator_address', address]
            said += ['--num_processes', str(n), '--process_id', str(i)]
        processes.append(
            subprocess.Popen(
                [*command, *said],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def ended(processes, timeout=240):
    """What each process printed, and its exit code."""
    made = [p.communicate(timeout=timeout) for p in processes]
    return [(out, err, p.returncode) for (out, err), p in zip(made, processes, strict=True)]


def losses(directory):
    lines = (directory / 'metrics.jsonl').read_text().splitlines()
    return {row['step']: row['train/loss'] for row in map(json.loads, lines)}


def after_step(directory, step, processes):
    """Waits until a step is saved."""
    for _ in range(600):
        if (directory / 'checkpoints' / str(step)).is_dir():
            return
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.2)
    raise AssertionError('no checkpoint')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The losses of one process."""
    directory = tmp_path_factory.mktemp('runs') / 'one'
    ((_, err, code),) = ended(start(1, directory))
    assert code == 0, err
    return losses(directory)


@pytest.mark.parametrize('n', [2, 4])
def test_processes_train_as_one_does(n, tmp_path, whole):
    made = ended(start(n, tmp_path / 'run'))
    assert [code for *_, code in made] == [0] * n, made
    assert 'step 6: ' in made[0][0] and 'step 6: ' not in made[1][0]  # the first tells
    assert losses(tmp_path / 'run') == pytest.approx(whole, rel=1e-4)  # by other kernels


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path):
    directory = tmp_path / 'run'
    processes = start(2, directory, 'train.steps=100000')
    after_step(directory, 4, processes)
    processes[1].send_signal(signal.SIGKILL)
    (_, err, code), _ = ended(processes)
    assert code == 2, err
    assert (
        'layercomb: process 0: another process of the run has ended, or cannot be reached: '
        'start all of them again, and they go on from the last checkpoint'
    ) in err
    last = max(int(p.name) for p in (directory / 'checkpoints').iterdir() if p.name.isdigit())
    then = f'train.steps={last + 2}'
    made = ended(start(2, directory, then))
    assert [code for *_, code in made] == [0, 0], made
    made = ended(start(2, tmp_path / 'whole', then))
    assert losses(directory)[last + 2] == losses(tmp_path / 'whole')[last + 2]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole):
    directory = tmp_path / 'run'
    assert [code for *_, code in ended(start(2, directory, 'train.steps=2'))] == [0, 0]
    ((_, err, code),) = ended(start(1, directory))
    assert code == 0, err
    assert losses(directory)[6] == pytest.approx(whole[6], rel=1e-3)


def test_sigterm_to_one_process_stops_all_at_one_step(tmp_path):
    directory = tmp_path / 'run'
    processes = start(2, directory, 'train.steps=100000')
    after_step(directory, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    made = ended(processes)
    assert [code for *_, code in made] == [0, 0], made
    assert '; the same command goes on' in made[0][1]  # the first tells


def test_a_damaged_checkpoint_ends_all_processes(tmp_path):
    directory = tmp_path / 'run'
    assert [code for *_, code in ended(start(2, directory, 'train.steps=4'))] == [0, 0]
    parts = directory / 'checkpoints' / '4' / 'weights' / 'ocdbt.process_1' / 'd'
    file = max(parts.iterdir(), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    cure = 'differs from what was written): delete that directory to continue from step 2\n'
    for _, err, code in ended(start(2, directory)):
        assert code == 2 and 'Traceback' not in err
        assert f'{file.name} {cure}' in err
