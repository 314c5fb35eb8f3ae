"""Frozen weights of a run: on the disk once, and read with every checkpoint."""

import json

import jax
import numpy as np
import pytest
from tiny_run import NET, loop

from layercomb import Model, trees
from layercomb.errors import UsageError
from layercomb.supervised.checkpoints import saved_weights
from layercomb.supervised.fingerprint import OF_THE_SEED

TASK = {'trainable': lambda path: path.startswith('dense')}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of four steps with a checkpoint at 2 and 4, and its weights."""
    directory = tmp_path_factory.mktemp('frozen') / 'run'
    made = loop(directory, task=TASK, checkpoint_every=2)
    made.run(4)
    return directory, jax.tree.map(np.asarray, made.weights)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_they_are_written_once_and_read_with_each_step(run):
    directory, weights = run
    assert [path.name for path in (directory / 'frozen').iterdir()] == ['2']
    for step in (2, 4):
        file = directory / 'checkpoints' / str(step) / 'record' / 'metadata'
        record = json.loads(json.loads(file.read_text())['text'])
        assert set(record['arrays']['weights']) == {'dense/bias', 'dense/kernel'}
    found, _, step = saved_weights(directory, weights)
    assert step == 4
    assert_same(found, weights)


def test_a_resumed_run_is_bitwise_equal_and_writes_them_no_more(run, tmp_path):
    whole = loop(tmp_path, task=TASK, checkpoint_every=2)
    whole.run(2)
    before = (tmp_path / 'frozen/2/record/metadata').stat().st_mtime_ns
    resumed = loop(tmp_path, task=TASK, checkpoint_every=2)
    resumed.run(4)
    assert_same(resumed.weights, run[1])
    assert [path.name for path in (tmp_path / 'frozen').iterdir()] == ['2']
    assert (tmp_path / 'frozen/2/record/metadata').stat().st_mtime_ns == before


@pytest.mark.filterwarnings('ignore::layercomb.errors.UsageWarning')
def test_what_freezes_later_is_written_anew(tmp_path):
    loop(tmp_path).run(2)
    assert not (tmp_path / 'frozen').exists()
    made = loop(tmp_path, task=TASK, allow_changes='trainable')
    made.run(3)
    assert [path.name for path in (tmp_path / 'frozen').iterdir()] == ['3']
    weights = jax.tree.map(np.asarray, made.weights)
    assert_same(saved_weights(tmp_path, weights)[0], weights)


def test_a_damaged_or_missing_part_is_named(run, tmp_path):
    directory, weights = run
    for file in sorted((directory / 'frozen/2/weights').rglob('*')):
        if file.is_file() and file.stat().st_size > 100 and 'd/' in str(file):
            before = file.read_bytes()
            file.write_bytes(b'x' * len(before))
            with pytest.raises(UsageError, match=r'frozen/2.* is damaged .*start again'):
                saved_weights(directory, weights)
            file.write_bytes(before)
            break
    (directory / 'frozen').rename(tmp_path / 'away')
    with pytest.raises(UsageError, match=r'frozen/2.* is damaged .*start again'):
        saved_weights(directory, weights)
    (tmp_path / 'away').rename(directory / 'frozen')


def test_a_layer_alone_takes_the_weights_of_a_run_that_a_model_began(run, tmp_path):
    begun = Model(NET, jax.tree.map(np.array, run[1]))
    loop(tmp_path, net=begun, task=TASK).run(1)
    loop(tmp_path, task=TASK).run(2)
    file = tmp_path / 'checkpoints/2/record/metadata'
    made_of = json.loads(json.loads(file.read_text())['text'])['values']['made_of']
    assert made_of['weights'] != OF_THE_SEED
    loop(tmp_path, net=begun, task=TASK)  # the same Model goes on
    other = Model(NET, trees.map_with_path(lambda path, x: x + 1, begun.weights))
    with pytest.raises(UsageError, match='the Model brings other weights'):
        loop(tmp_path, net=other, task=TASK)
