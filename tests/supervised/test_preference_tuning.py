"""Preference tuning by the ordinary Loop: the reference, micro batches, resuming."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from layercomb import Model, data, models, shape_dtype, tl, trees
from layercomb.errors import UsageError
from layercomb.launcher.finetuning import pace
from layercomb.supervised import EvalTask, Loop, TrainTask, evaluate
from layercomb.supervised.preference import reference

NET = models.TransformerLM(256, 16, 32, n_layers=1, n_heads=2, max_len=32)
LENGTH = 20
METRICS = (tl.PreferenceLoss(), tl.PreferenceAccuracy(), tl.RewardMargin())
ADAM = optax.adam(5e-3)


@pytest.fixture(scope='module')
def model():
    return Model(NET).init(shape_dtype((1, 8), 'int32'))


def rows(n=16):
    draw = np.random.default_rng(0)
    good, bad = 'yes', 'nope'
    return [
        {'prompt': f'{draw.integers(1000)}?', 'chosen': good + f'{i % 5}', 'rejected': bad}
        for i in range(n)
    ]


def batches(n=16, size=4, **options):
    return data.preference_batches(
        data.preferences(rows(n), data.ByteTokenizer(), LENGTH), size, **options
    )


def measured():
    return EvalTask(batches(num_epochs=1, shuffle=False), METRICS, loss_chunk_len=7)


def loop(model, directory=None, *, source=None, tasks=(), **task):
    given = {'eval_every': None, 'checkpoint_every': 2, 'log_every': 1, 'progress': False}
    train = TrainTask(source or batches(), METRICS[0], ADAM, **task)
    return Loop(model, train, tasks, directory, **given)


def test_it_learns_what_is_preferred(model, tmp_path):
    tuned = loop(model, tmp_path, tasks=measured())
    before = evaluate(NET, model.weights, {}, reference.References(model).referred(measured()))
    assert before['valid/loss'] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(before['valid/reward_margin']) < 1e-4
    after = tuned.run(12)
    assert after['valid/preference_accuracy'] == 1 and after['valid/loss'] < 0.4
    assert after['valid/reward_margin'] > 0.5
    # The run keeps the reference, so its evaluation can be made again without the model's start.
    (task,) = reference.recalled((measured(),), tmp_path)
    again = evaluate(NET, tuned.weights, tuned.state, task)
    assert again['valid/loss'] == pytest.approx(after['valid/loss'], rel=1e-6)


def test_log_likelihoods_are_those_of_the_formula(model):
    source = data.preferences(rows(3), data.ByteTokenizer(), LENGTH)
    found = reference.log_likelihoods(model, source)
    for (inputs, targets, weights), pair in zip(source, found, strict=True):
        log_p = jax.nn.log_softmax(model(inputs))
        picked = np.take_along_axis(np.asarray(log_p), targets[..., :1], 2)[..., 0]
        np.testing.assert_allclose(pair, (picked * weights).sum(1), rtol=1e-5)


def test_micro_batches_keep_pairs_together(model):
    found = [loop(model, accumulate=n, loss_chunk_len=c) for n, c in ((1, None), (2, 6))]
    whole, pieces = (each.run(2) for each in found)
    for name in ('train/loss', 'train/grad_norm'):
        assert whole[name] == pytest.approx(pieces[name], rel=1e-4)
    with pytest.raises(ValueError, match='=8 does not divide a batch of 8 rows, 2 of which'):
        loop(model, accumulate=8)


def test_a_run_resumes_to_the_bit_and_asks_the_reference_once(model, tmp_path, monkeypatch):
    straight = loop(model)
    straight.run(4)
    loop(model, tmp_path).run(2)
    with monkeypatch.context() as patched:
        patched.setattr(reference, 'log_likelihoods', None)  # a call would fail
        resumed = loop(model, tmp_path)
        resumed.run(4)
        by_layer = loop(NET, tmp_path)  # the checkpoint has the weights
    for a, b, c in zip(
        *(jax.tree.leaves(x.weights) for x in (straight, resumed, by_layer)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    other = Model(NET, trees.map_with_path(lambda _, x: x + 1, model.weights))
    with pytest.raises(UsageError, match='those of another model: start from the same weights'):
        loop(other, tmp_path)
    with pytest.raises(UsageError, match='the data has 16 examples there, 12 here'):
        loop(model, tmp_path, source=batches(12))
    (kept,) = (tmp_path / 'reference').glob('*')
    kept.write_bytes(b'')
    with pytest.raises(UsageError, match=r'\.npz is damaged .*: remove it, to have it computed'):
        loop(model, tmp_path)


def test_frozen_weights_stay(model):
    tuned = loop(model, trainable=lambda path: path.startswith('head'))
    tuned.run(2)
    before, after = trees.flatten(model.weights), trees.flatten(tuned.weights)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {'head/kernel', 'head/bias'}


def test_without_a_reference_nothing_is_measured(model, tmp_path):
    with pytest.raises(ValueError, match=r'give the Loop an lc\.Model with its weights'):
        loop(NET)
    with pytest.raises(UsageError, match='has no log-likelihoods of these answers: measure on'):
        reference.recalled((measured(),), tmp_path)
    with pytest.raises(UsageError, match='valid/loss: the sum over the data is nan'):
        evaluate(NET, model.weights, {}, measured())
    with pytest.raises(ValueError, match='the data repeats for ever'):
        EvalTask(batches(), METRICS)
    with pytest.raises(TypeError, match=r'takes the pairs of data\.preferences'):
        data.preference_batches([(np.zeros(3), np.zeros(3), np.zeros(3))], 2)
    wide = Model(models.TransformerLM(64, 16, 32, n_layers=1, n_heads=2, max_len=32))
    with pytest.raises(UsageError, match=r'the preferences do not fit the model: .*vocabulary'):
        loop(wide.init(shape_dtype((1, 8), 'int32')))


def test_a_run_that_goes_on_without_its_start_needs_the_answers_it_began_with(model, tmp_path):
    loop(model, tmp_path).run(2)
    bare = Model(NET)
    with pytest.raises(UsageError, match='has no log-likelihoods of these answers: go on with'):
        loop(bare, tmp_path, source=batches(8))


def test_steps_are_timed_on_few_pairs(model, monkeypatch):
    asked, ask = [], reference.log_likelihoods
    monkeypatch.setattr(
        reference, 'log_likelihoods', lambda of, pairs: asked.append(len(pairs)) or ask(of, pairs)
    )
    task = TrainTask(batches(64, 2), METRICS[0], ADAM)
    experiment = SimpleNamespace(model=model, train_task=task, eval_tasks=(), seed=0)
    assert pace.steps_within(experiment, 0.0) == 1 and asked == [8]
