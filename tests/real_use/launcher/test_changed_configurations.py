"""A configuration or its data that changed between two runs of the launcher."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from layercomb import cli
from layercomb.supervised.fingerprint import PARTS

TINY = """
from __gin__ import dynamic_registration
from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import models
from layercomb import optimizers
from layercomb import supervised
cli.train.model = @models.TransformerLM()
cli.train.train_task = @supervised.TrainTask()
cli.train.steps = 2
cli.train.log_every = 1
models.TransformerLM.vocab_size = 256
models.TransformerLM.d_model = 8
models.TransformerLM.d_ff = 8
models.TransformerLM.n_layers = 1
models.TransformerLM.n_heads = 2
models.TransformerLM.max_len = 24
supervised.TrainTask.data = @data.packed()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
optimizers.adamw.learning_rate = 0.01
data.packed.source = @data.text_files()
data.packed.length = 8
data.packed.batch_size = 2
data.packed.shuffle = False
data.text_files.pattern = '{text}'
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('changed')
    (folder / 'text.txt').write_text('the cat sat on the mat. ' * 20)
    (folder / 'tiny.gin').write_text(TINY.replace('{text}', str(folder / 'text.txt')))
    assert cli.main(['train', str(folder / 'tiny.gin'), '--output_dir', str(folder / 'run')]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run, and of what it was made of."""
    shutil.copytree(trained / 'run', tmp_path / 'run')
    shutil.copy(trained / 'text.txt', tmp_path / 'text.txt')
    config = (trained / 'tiny.gin').read_text()
    (tmp_path / 'tiny.gin').write_text(config)
    return tmp_path


def again(folder, *words):
    command = ['train', str(folder / 'tiny.gin'), '--output_dir', str(folder / 'run'), *words]
    return cli.main([*command, '--gin_param', 'train.steps=4'])


def rows(folder):
    lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
    return {row['step']: row for row in map(json.loads, lines)}


RATE = '--gin_param', 'adamw.learning_rate=0.25'


def test_another_rate_is_refused_and_the_run_keeps_its_configuration(folder, capsys):
    before = (folder / 'run' / 'config.gin').read_text()
    assert again(folder, *RATE) == 2
    said = capsys.readouterr().err
    assert re.search(r'adamw.learning_rate is 0.01 there, 0.25 here.*by --allow_changes', said)
    assert (folder / 'run' / 'config.gin').read_text() == before
    assert max(rows(folder)) == 2


def test_another_rate_that_is_allowed_is_used_and_kept(folder, capsys):
    assert again(folder, *RATE, '--allow_changes', 'optimizer') == 0
    assert rows(folder)[4]['train/learning_rate'] == 0.25
    assert 'learning_rate = 0.25' in (folder / 'run' / 'config.gin').read_text()


def test_what_is_allowed_is_no_more_than_was_named(folder, capsys):
    before = (folder / 'run' / 'config.gin').read_text()
    assert again(folder, *RATE, '--allow_changes', 'data,seed') == 2
    said = capsys.readouterr().err
    assert re.search(r'learning_rate is 0.01 there, 0.25 here: .*--allow_changes optimizer', said)
    assert (folder / 'run' / 'config.gin').read_text() == before


def test_a_part_that_there_is_not(folder, capsys):
    assert again(folder, '--allow_changes', 'rate') == 2
    assert "'rate' is none of model, loss, optimizer" in capsys.readouterr().err


def test_the_help_names_all_that_may_change(capsys):
    with pytest.raises(SystemExit):
        cli.main(['train', '--help'])
    words = capsys.readouterr().out.replace(',', ' ').split()
    assert {*PARTS, 'all'} <= set(words)


def test_nothing_is_allowed_by_a_comma(folder, capsys):
    assert again(folder, *RATE, '--allow_changes', ',') == 2
    assert 'adamw.learning_rate is 0.01 there' in capsys.readouterr().err


def test_a_text_that_was_edited_between_two_runs(trained, tmp_path, capsys):
    (tmp_path / 'text.txt').write_text('a dog lay on the rug. ' * 20)
    shutil.copytree(trained / 'run', tmp_path / 'run')
    config = (trained / 'tiny.gin').read_text()
    kept = (trained / 'text.txt').read_text()
    (tmp_path / 'tiny.gin').write_text(config)
    try:
        (trained / 'text.txt').write_text('a dog lay on the rug. ' * 20)
        assert again(tmp_path) == 2
        assert 'the data has ' in capsys.readouterr().err
        assert again(tmp_path, '--allow_changes', 'data') == 0
    finally:
        (trained / 'text.txt').write_text(kept)


def test_a_batch_size_that_is_allowed_goes_on_with_the_next_windows(folder, capsys):
    size = '--gin_param', 'packed.batch_size=4'
    assert again(folder, *size) == 2
    assert again(folder, *size, '--allow_changes', 'batch_size', '--gin_param', 'train.keep=1') == 0
    assert max(rows(folder)) == 4


def test_how_it_is_computed_may_change_unasked(folder):
    how = '--gin_param', 'TrainTask.accumulate=2', '--gin_param', "TrainTask.loss_chunk_len='auto'"
    assert again(folder, *how) == 0
    assert np.isfinite(rows(folder)[4]['train/loss'])
