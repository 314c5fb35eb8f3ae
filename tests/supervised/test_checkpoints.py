from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb.checkpoints import load_tree, save_tree
from layercomb.errors import UsageError
from layercomb.supervised.checkpoints import Checkpoints, saved_weights


def trees():
    weights = {
        'dense': {
            'kernel': jax.random.normal(jax.random.key(0), (60, 50)),
            'bias': jnp.arange(3, dtype=jnp.bfloat16),
        },
        'codes': jnp.arange(-4, 4, dtype=jnp.int8),
        'flags': jnp.array([True, False]),
        'scale': jnp.float32(0.1),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return {'weights': weights, 'state': {}, 'opt_state': optimizer.init(weights['dense'])}


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def saved(directory, steps=(5, 10), keep=3):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, trees(), {'step': step, 'data': [step, 0.1]})
    checkpoints.close()
    return trees()


def restored(directory, step, like):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore(step, abstract(like))
    finally:
        checkpoints.close()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_restores_every_bit_and_the_record(tmp_path):
    expected = saved(tmp_path)
    found, record = restored(tmp_path, 10, expected)
    assert_same(found, expected)
    assert record == {'step': 10, 'data': [10, 0.1]}


def test_a_save_in_the_background_outlives_donation(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=10)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1000, 300))
    for i in range(1, 6):
        x = step(x)
        checkpoints.save(i, {'weights': {'x': x}}, {})
    step(x)
    checkpoints.wait()
    for i in range(1, 6):
        found, _ = checkpoints.restore(
            i, {'weights': {'x': jax.ShapeDtypeStruct((1000, 300), 'f4')}}
        )
        np.testing.assert_array_equal(found['weights']['x'], np.full((1000, 300), i, np.float32))
    checkpoints.close()


def test_keeps_the_last(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 4), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['3', '4']


@pytest.mark.parametrize('how', ['flip', 'truncate', 'delete'])
@pytest.mark.parametrize('what', ['weights', 'opt_state'])
def test_a_damaged_file_is_found_and_named(tmp_path, how, what):
    expected = saved(tmp_path)
    file = max((tmp_path / '10' / what).rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == 'flip':
        file.write_bytes(content)
    elif how == 'truncate':
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    with pytest.raises(UsageError) as error:
        restored(tmp_path, 10, expected)
    said = 'is missing' if how == 'delete' else 'differs from what was written'
    name = file.relative_to(tmp_path / '10')
    assert str(error.value) == (
        f"checkpoint '{tmp_path}/10' is damaged ({name} {said}): "
        'delete that directory to continue from step 5'
    )
    assert_same(restored(tmp_path, 5, expected)[0], expected)


def test_a_damaged_record_is_found(tmp_path):
    expected = saved(tmp_path, steps=(5,))
    file = tmp_path / '5' / 'record' / 'metadata'
    file.write_text(file.read_text().replace('0.1', '0.2'))
    with pytest.raises(UsageError, match=r'its record cannot be read\): delete .* to start again$'):
        restored(tmp_path, 5, expected)


@pytest.mark.parametrize('what', ['weights', 'opt_state', 'record'])
def test_what_belongs_to_another_step_is_found(tmp_path, what):
    expected = saved(tmp_path)
    shutil.rmtree(tmp_path / '10' / what)
    shutil.copytree(tmp_path / '5' / what, tmp_path / '10' / what)
    with pytest.raises(UsageError) as error:
        restored(tmp_path, 10, expected)
    name = 'opt_state' if what == 'record' else what
    assert str(error.value) == (
        f"checkpoint '{tmp_path}/10' is damaged ({name} and its record were not written "
        'together): delete that directory to continue from step 5'
    )


def test_a_checkpoint_without_seals_is_read(tmp_path):
    """Before, trees did not have the checksum of their record."""
    expected = saved(tmp_path)
    for name in ('weights', 'opt_state'):
        (tmp_path / '10' / name / 'of_record').unlink()
        file = tmp_path / '10' / name / 'crc32.json'
        checksums = json.loads(file.read_text())
        del checksums['of_record']
        file.write_text(json.dumps(checksums))
    assert_same(restored(tmp_path, 10, expected)[0], expected)


def test_another_model_or_optimizer_is_refused(tmp_path):
    expected = saved(tmp_path)
    wider = {**expected, 'weights': {**expected['weights'], 'codes': jnp.zeros(9, jnp.int8)}}
    with pytest.raises(UsageError, match=r'weights/codes is int8\[8\] there, int8\[9\] here'):
        restored(tmp_path, 10, wider)
    narrower = {**expected, 'weights': {'dense': expected['weights']['dense']}}
    with pytest.raises(UsageError, match=r'weights/codes is int8\[8\] there, absent here'):
        restored(tmp_path, 10, narrower)
    sgd = {**expected, 'opt_state': optax.sgd(0.1).init(expected['weights']['dense'])}
    with pytest.raises(UsageError, match=r'opt_state/.* there, absent here\): use the model and'):
        restored(tmp_path, 10, sgd)


def test_saved_weights_reads_a_run_and_writes_nothing(tmp_path):
    expected = saved(tmp_path / 'checkpoints')
    before = sorted(tmp_path.rglob('*'))
    weights, state, step = saved_weights(tmp_path, abstract(expected['weights']))
    assert_same(weights, expected['weights'])
    assert (state, step) == ({}, 10)
    assert sorted(tmp_path.rglob('*')) == before


def test_saved_weights_says_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint in '.*nowhere': give the output_dir"):
        saved_weights(tmp_path / 'nowhere', {})


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match=r'cannot write to .*: choose another output_dir'):
        Checkpoints(tmp_path / 'file' / 'run')


def test_a_tree_by_itself(tmp_path):
    weights = trees()['weights']
    for directory in (tmp_path, tmp_path / 'new' / 'dir'):
        save_tree(directory, weights)
        assert_same(load_tree(directory, abstract(weights)), weights)
        with pytest.raises(UsageError, match='is not empty: save to a new directory'):
            save_tree(directory, weights)
    with pytest.raises(UsageError, match='holds no saved weights: check the path'):
        load_tree(tmp_path / 'nowhere', weights)
    with pytest.raises(UsageError, match=r'tree/more is absent there, float32\[\] here'):
        load_tree(tmp_path / 'new' / 'dir', {**weights, 'more': jnp.float32(1)})
