"""SIGTERM while a real process trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from layercomb.launcher.training.stopping import on_sigterm

CONFIG = """
from __gin__ import dynamic_registration
from layercomb import cli
from layercomb import layers as tl
from layercomb import models
from layercomb import optimizers
from layercomb import supervised
import slow_data

cli.train.model = @models.MLP()
cli.train.train_task = @supervised.TrainTask()
cli.train.steps = 100000
cli.train.checkpoint_every = None
cli.train.log_every = 1
models.MLP.layer_widths = (4, 3)
supervised.TrainTask.data = @slow_data.Batches()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
optimizers.adamw.learning_rate = 0.01
"""

DATA = """
import time
import numpy as np

class Batches:
    def __init__(self, pause=0.01):
        self.pause = pause

    def __iter__(self):
        for i in range(10**6):
            time.sleep(self.pause if i else 0)
            x = np.random.default_rng(i).normal(size=(4, 5)).astype(np.float32)
            yield x, (x.sum(1) > 0).astype(np.int32), np.ones(4, np.float32)
"""


@pytest.fixture
def training(tmp_path):
    """A process that trains, once it has taken some steps."""
    (tmp_path / 'slow.gin').write_text(CONFIG)
    (tmp_path / 'slow_data.py').write_text(DATA)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    processes = []

    def start(*bindings):
        words = [x for b in bindings for x in ('--gin_param', b)]
        command = [sys.executable, '-m', 'layercomb', 'train', 'slow.gin', '--output_dir', 'run']
        process = subprocess.Popen(
            [*command, *words], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': path},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        log, deadline = tmp_path / 'run' / 'metrics.jsonl', time.monotonic() + 120
        while not log.exists() or log.read_text().count('\n') < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_last_finished_step_is_saved_and_the_run_goes_on(training, tmp_path):
    process = training()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ''
    last = err.splitlines()[-1]
    said = r'layercomb: stopped after step (\d+), which is saved; the same command goes on'
    step = int(re.fullmatch(said, last)[1])
    assert os.listdir(tmp_path / 'run' / 'checkpoints') == [str(step)]
    rows = [json.loads(x) for x in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(1, step + 1))
    assert (tmp_path / 'run' / 'report.png').exists()


def test_a_second_one_ends_it_at_once(training):
    process = training('slow_data.Batches.pause=2')
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_the_handler_is_given_back_and_threads_have_none():
    before = signal.getsignal(signal.SIGTERM)
    calls = []
    with on_sigterm(lambda: calls.append('stop')) as came:
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == ['stop'] and came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def elsewhere():
        with on_sigterm(calls.clear) as came:
            seen.append((came, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [([], before)]
