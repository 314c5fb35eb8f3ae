"""A run on packed rows learns what a run on each document alone learns."""

import re

import jax
import numpy as np
import optax
import pytest

from layercomb import Model, tl
from layercomb.errors import UsageError
from layercomb.launcher.experiment import Experiment
from layercomb.supervised import EvalTask, Loop, TrainTask, evaluate

V, N = 8, 4  # tokens; positions of a document
NET = tl.Serial(
    tl.Embedding(V, 8),
    tl.LearnedPositions(16),
    tl.Residual(tl.SelfAttention(2)),
    tl.Dropout(0.0),
    tl.Dense(V),
)
LOSS = tl.CrossEntropyLoss()
QUIET = {'eval_every': None, 'checkpoint_every': None, 'log_every': 1, 'progress': False}


def batch(seed, is_packed):
    """Four documents: each in a row of its own, or two rows of two and padding."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, V, (2, 4, N)).astype(np.int32)
    weights = rng.random((4, N), np.float32)
    if not is_packed:
        return tokens, targets, weights
    packed = [np.pad(x.reshape(2, 2 * N), ((0, 0), (0, 3))) for x in (tokens, targets, weights)]
    segments = np.tile(np.repeat([0, 1, 2], [N, N, 3]), (2, 1))
    return packed[0], segments, *packed[1:]


def batches(is_packed, n=4):
    return [batch(seed, is_packed) for seed in range(n)]


def task(is_packed, **options):
    return TrainTask(batches(is_packed), LOSS, optax.sgd(0.1), packed=is_packed, **options)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_packed_rows_train_and_measure_as_their_documents_do():
    rows, loops = [], []
    for is_packed in (False, True):
        valid = EvalTask(batches(is_packed, 2), (LOSS, tl.Accuracy()), packed=is_packed)
        loop = Loop(NET, task(is_packed, loss_chunk_len=3), valid, **QUIET)
        rows.append(loop.run(3))
        loops.append(loop)
    for name in ('train/loss', 'train/grad_norm', 'valid/loss', 'valid/accuracy'):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5)
    assert_close(loops[1].weights, loops[0].weights)
    measured = evaluate(NET, loops[1].weights, {}, EvalTask(batches(True, 2), LOSS, packed=True))
    assert measured['valid/loss'] == pytest.approx(rows[0]['valid/loss'], rel=1e-5)
    assert Model(NET, loops[1].weights)(batch(0, False)[0]).shape == (4, N, V)  # the plain model


def test_a_packed_run_resumes_bitwise_and_is_no_run_of_rows(tmp_path):
    whole = Loop(NET, task(True), **QUIET)
    whole.run(4)
    Loop(NET, task(True), output_dir=tmp_path, **QUIET).run(2)
    resumed = Loop(NET, task(True), output_dir=tmp_path, **QUIET)
    resumed.run(4)
    jax.tree.map(np.testing.assert_array_equal, resumed.weights, whole.weights)
    with pytest.raises(UsageError, match='rows are packed there, not packed here'):
        Loop(NET, task(False), output_dir=tmp_path, **QUIET)


def test_an_experiment_checks_and_weighs_a_packed_step():
    experiment = Experiment(
        NET, task(True, accumulate=2), EvalTask(batches(True), LOSS, packed=True)
    )
    experiment.check()
    assert experiment.training_bytes()['temporaries'] > 0


def changed(**others):
    """A packed batch with another array, by its place."""
    made = list(batch(0, True))
    for place, value in others.items():
        made[int(place[1:])] = value
    return tuple(made)


SEGMENTS = batch(0, True)[1]
WRONG = {
    'the batch of step 1: segments fall from 2 to 1 at position 9 of row 1: number documents as '
    'they stand in a row, and padding at its end by one more': changed(
        _1=np.where(np.arange(22).reshape(2, 11) == 20, 1, SEGMENTS)
    ),
    'segments are float32[2, 11]: give integers [2, 11], the number of the document': changed(
        _1=SEGMENTS.astype(np.float32)
    ),
    'segments are int64[2, 10]: give integers [2, 11]': changed(_1=SEGMENTS[:, 1:]),
}


@pytest.mark.parametrize('said', WRONG)
def test_segments_that_cannot_be_right_are_refused_before_a_step(said):
    with pytest.raises(UsageError, match=re.escape(said)):
        Loop(NET, TrainTask([WRONG[said]], LOSS, optax.sgd(0.1), packed=True), **QUIET)
    with pytest.raises(UsageError, match=re.escape(said.removeprefix('the batch of step 1: '))):
        evaluate(NET, {}, {}, EvalTask([WRONG[said]], LOSS, packed=True))


def test_a_later_batch_is_checked_too():
    wrong = changed(_1=SEGMENTS[:, ::-1])
    loop = Loop(NET, TrainTask([batch(0, True), wrong], LOSS, optax.sgd(0.1), packed=True), **QUIET)
    with pytest.raises(UsageError, match='the batch of step 2: segments fall from 2 to 1 at'):
        loop.run(2)


def test_packed_data_in_a_task_that_does_not_say_so_and_the_other_way_round():
    with pytest.raises(TypeError, match=r'yields 4: if it packs documents, say TrainTask\(…, pack'):
        Loop(NET, TrainTask(batches(True), LOSS, optax.sgd(0.1)), **QUIET)
    said = r'a packed batch is 4 arrays \(inputs…, segments, targets, loss_weights\), .* yields 3'
    with pytest.raises(TypeError, match=said):
        Loop(NET, TrainTask(batches(False), LOSS, optax.sgd(0.1), packed=True), **QUIET)
    with pytest.raises(TypeError, match='TrainTask: packed must be'):
        task('yes')


def test_a_model_that_mixes_documents_is_refused_when_the_loop_is_made():
    net = tl.Serial(tl.Embedding(V, 8), tl.Conv1D(8), tl.Dense(V))
    with pytest.raises(TypeError, match='segmented: Conv1D mixes positions and does not know seg'):
        Loop(net, task(True), **QUIET)
