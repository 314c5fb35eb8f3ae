"""The best checkpoint: which it is, that it stays, and that it outlives what stops a run."""

from __future__ import annotations

import os
import shutil

import jax
import optax
import pytest
from tiny_run import LOSS, NET, PlainData, eval_task, loop

from layercomb import UsageError, shape_dtype, tl
from layercomb.supervised import Callback, EvalTask, evaluate
from layercomb.supervised.checkpoints import Checkpoints, saved_weights
from layercomb.supervised.reports import read_metrics

ABSTRACT = jax.eval_shape(
    lambda key: NET.init((shape_dtype((4, 6), 'int32'),), key), jax.random.key(0)
)
# Training that overshoots: the loss falls at first, and rises and falls after that.
WILD = optax.inject_hyperparams(optax.adam)(learning_rate=0.3)


def run(directory, name='valid/loss', **kwargs):
    given = {'eval_every': 1, 'keep': 1, 'keep_best': name, 'optimizer': WILD, **kwargs}
    return loop(directory, eval_tasks=eval_task(), **given)


def steps(directory):
    return sorted(map(int, os.listdir(directory / 'checkpoints')))


def best_by_hand(directory, name, better):
    rows = [row for row in read_metrics(directory) if name in row]
    best = rows[0]
    for row in rows:
        if better(row[name], best[name]):
            best = row
    return best['step']


@pytest.mark.parametrize(
    ('name', 'better'),
    [('valid/loss', lambda a, b: a < b), ('valid/accuracy', lambda a, b: a > b)],
)
def test_the_best_and_the_last_are_kept(tmp_path, name, better):
    run(tmp_path, name).run(25)
    best = best_by_hand(tmp_path, name, better)
    assert steps(tmp_path) == sorted({best, 25})
    weights, state, step = saved_weights(tmp_path, *ABSTRACT, 'best')
    assert step == best
    again = run(tmp_path, name)
    assert again.step == 25 and again._checkpoints.best == (name, *again._checkpoints.best[1:])
    row = next(row for row in read_metrics(tmp_path) if row['step'] == best)
    assert evaluate(NET, weights, state, eval_task())[name] == row[name]


def test_resumed_runs_know_the_best_of_before(tmp_path):
    whole = run(tmp_path / 'whole')
    whole.run(25)
    for n in (4, 11, 12, 25):
        run(tmp_path / 'parts').run(n)
    assert steps(tmp_path / 'parts') == steps(tmp_path / 'whole')
    best = Checkpoints(tmp_path / 'whole' / 'checkpoints').record(25)[0]['best']
    assert Checkpoints(tmp_path / 'parts' / 'checkpoints').record(25)[0]['best'] == best
    assert best['step'] == best_by_hand(tmp_path / 'whole', 'valid/loss', lambda a, b: a < b)


class Interrupt(Callback):
    """A process that dies after an evaluation, with no time for anything more."""

    def __init__(self, step):
        self.step = step

    def after_evaluation(self, loop, row):
        if row['step'] == self.step:
            raise KeyboardInterrupt


def test_interrupted_after_each_evaluation_it_ends_as_one_that_never_was(tmp_path):
    whole = run(tmp_path / 'whole')
    whole.run(12)
    for n in (1, 2, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / 'parts', callbacks=(Interrupt(n),)).run(12)
    run(tmp_path / 'parts').run(12)
    assert steps(tmp_path / 'parts') == steps(tmp_path / 'whole')


def test_the_best_stays_when_a_run_goes_on_without_keep_best_or_by_another_metric(tmp_path):
    run(tmp_path).run(10)
    best = saved_weights(tmp_path, *ABSTRACT, 'best')[2]
    run(tmp_path, None, checkpoint_every=1).run(14)
    assert saved_weights(tmp_path, *ABSTRACT, 'best')[2] == best
    run(tmp_path, 'valid/accuracy').run(15)
    assert saved_weights(tmp_path, *ABSTRACT, 'best')[2] == 15


def test_a_best_that_was_deleted_is_known_no_more(tmp_path):
    run(tmp_path, 'valid/loss').run(25)
    best = saved_weights(tmp_path, *ABSTRACT, 'best')[2]
    assert best != 25
    shutil.rmtree(tmp_path / 'checkpoints' / str(best))
    with pytest.raises(UsageError, match=r'no best checkpoint in .*: there are last and 25$'):
        saved_weights(tmp_path, *ABSTRACT, 'best')
    assert run(tmp_path)._checkpoints.best is None


def test_which_checkpoint(tmp_path):
    loop(tmp_path, checkpoint_every=2).run(6)
    assert [saved_weights(tmp_path, *ABSTRACT, c)[2] for c in ('last', '4', 2)] == [6, 4, 2]
    there = r'there are last and 2, 4, 6$'
    with pytest.raises(UsageError, match=rf"no checkpoint '3' in .*: {there}"):
        saved_weights(tmp_path, *ABSTRACT, '3')
    with pytest.raises(UsageError, match=rf'trained without keep_best: {there}'):
        saved_weights(tmp_path, *ABSTRACT, 'best')


class Strange(tl.Metric):
    """A metric that does not say which way is better."""

    def values(self, outputs, targets):
        return outputs.max(-1)


def test_names_that_are_not_measured(tmp_path):
    there = r'there are valid/loss, valid/accuracy, valid/bits_per_byte$'
    with pytest.raises(ValueError, match=rf"keep_best='loss' is not measured: {there}"):
        run(tmp_path, 'loss')
    with pytest.raises(ValueError, match=r"'valid/loss' is not measured: there are no eval_tasks"):
        loop(tmp_path, keep_best='valid/loss')
    with pytest.raises(ValueError, match=r"'valid/strange': Strange does not say .*: set lower_is"):
        task = EvalTask(PlainData(1), (LOSS, Strange()))
        loop(tmp_path, eval_tasks=task, keep_best='valid/strange')
    with pytest.raises(ValueError, match=r"keep_best='valid/loss' needs an output_dir"):
        run(None)


def test_every_metric_of_the_library_says_which_way_is_better():
    made = [getattr(tl, name) for name in tl.__all__]
    metrics = [m for m in made if isinstance(m, type) and issubclass(m, tl.Metric)]
    unsaid = {m.__name__ for m in metrics if m.lower_is_better is None}
    assert unsaid == {'Metric', 'ConfusionMatrix'}
    lower = {tl.Perplexity, tl.BitsPerByte} | {m for m in metrics if 'Loss' in m.__name__}
    assert {m for m in metrics if m.lower_is_better} == lower
