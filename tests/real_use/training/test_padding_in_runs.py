"""Padding of loss weight 0 in runs: training, accumulation, evaluation, throughput, reports."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import data, tl
from layercomb.errors import UsageError
from layercomb.supervised import EvalTask, Loop, TrainTask, evaluate
from layercomb.supervised.progress import Throughput
from layercomb.supervised.reports import read_metrics

B, L, D, V = 4, 8, 8, 16
LOSS = tl.CrossEntropyLoss()
FF = tl.SwitchFF(16, 4, balance=1.0)
NORM = tl.BatchNorm(momentum=0.5)
NET = tl.Serial(tl.Embedding(V, D), NORM, FF, tl.Dense(V))
SGD, STANDING = optax.sgd(0.1), optax.sgd(0.0)  # one each, so that equal steps compile once
STILL = tl.Serial(tl.Embedding(V, D), tl.Dense(V))


def batch(seed=0):
    r = np.random.default_rng(seed)
    x, y = r.integers(1, V, (2, B, L)).astype(np.int32)
    return x, y, np.ones((B, L), np.float32)


def padded(arrays, rows=0, columns=24):
    return tuple(np.pad(a, ((0, rows), (0, columns))) for a in arrays)


def loop(batches, net=NET, output_dir=None, optimizer=SGD, task=None, **kwargs):
    task = TrainTask(batches, LOSS, optimizer, **(task or {}))
    return Loop(net, task, output_dir=output_dir, progress=False, **kwargs)


def assert_close(ours, wanted, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, wanted
    )


@pytest.mark.parametrize('task', [{}, {'accumulate': 2, 'loss_chunk_len': 5}])
def test_a_step_of_a_padded_batch_is_that_of_the_batch(task):
    runs = [loop([b], task=task) for b in (batch(), padded(batch(), rows=2))]
    rows = [run.run(1) for run in runs]
    for name in ('train/loss', 'train/grad_norm'):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5)
    assert_close(runs[1].weights, runs[0].weights)
    assert_close(runs[1].state, runs[0].state)


def test_a_micro_batch_of_padding_alone_adds_nothing():
    """Every second row goes to the second micro batch: here, all that is padding."""
    x, y, w = batch()
    whole = loop([(x[::2], y[::2], w[::2])])
    w[1::2] = 0
    parts = loop([(x, y, w)], task={'accumulate': 2})
    assert parts.run(1)['train/loss'] == pytest.approx(whole.run(1)['train/loss'], rel=1e-5)
    assert_close(parts.weights, whole.weights)
    assert_close(parts.state['batch_norm'], whole.state['batch_norm'])


def test_what_is_kept_and_saved_does_not_know_of_what_counts(tmp_path):
    fresh = NET.init(lc.signature_of(batch()[:1]), jax.random.key(0))[1]
    trained = loop([padded(batch(i)) for i in range(4)], output_dir=tmp_path, checkpoint_every=2)
    trained.run(2)
    assert jax.tree.structure(trained.state) == jax.tree.structure(fresh)
    assert tl.take_counted(trained.state)[1] == {}
    whole = loop([padded(batch(i)) for i in range(4)])
    whole.run(4)
    resumed = loop([padded(batch(i)) for i in range(4)], output_dir=tmp_path)
    assert resumed.step == 2
    resumed.run(4)
    jax.tree.map(np.testing.assert_array_equal, resumed.weights, whole.weights)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


def test_the_end_of_an_epoch_does_not_move_running_statistics_towards_its_padding():
    examples = [tuple(a[i] for a in batch()) for i in range(3)]
    filled = data.batches(examples, 4, shuffle=False, num_epochs=1)
    trained = loop(filled, optimizer=STANDING)
    trained.run(1)
    table = np.asarray(trained.weights['embedding']['table'], np.float64)
    rows = table[batch()[0][:3]].reshape(-1, D)
    found = trained.state['batch_norm']
    np.testing.assert_allclose(found['mean'], 0.5 * rows.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found['var'], 0.5 + 0.5 * rows.var(0), rtol=1e-5)


def test_targets_that_say_ignore_me_need_weight_0_and_then_count_nowhere():
    """Other libraries mark padding by a target of −100."""
    x, y, w = padded(batch())
    marked = loop([(x, np.where(w == 0, -100, y), w)])
    plain = loop([batch()])
    assert marked.run(1)['train/loss'] == pytest.approx(plain.run(1)['train/loss'], rel=1e-5)
    assert_close(marked.weights, plain.weights)


def test_measurements_are_those_of_the_positions_that_count():
    metrics = (LOSS, tl.Perplexity(), tl.Accuracy(), tl.BitsPerByte())
    weights, state = STILL.init(lc.signature_of(batch()[:1]), jax.random.key(0))
    given = [batch(0), batch(1)]
    plain, wide = (
        evaluate(STILL, weights, state, EvalTask(batches, metrics, loss_chunk_len=n))
        for batches, n in ((given, None), ([padded(b, 2) for b in given], 5))
    )
    assert wide == pytest.approx(plain, rel=1e-5)
    table, head = np.asarray(weights['embedding']['table']), weights['dense']
    total = 0.0
    for x, y, _ in given:
        logits = (table[x] @ np.asarray(head['kernel']) + np.asarray(head['bias'])).astype(float)
        picked = np.take_along_axis(logits, y[..., None], -1)[..., 0]
        total += (np.log(np.exp(logits).sum(-1)) - picked).mean() / 2
    assert wide['valid/loss'] == pytest.approx(total, rel=1e-5)
    assert wide['valid/perplexity'] == pytest.approx(np.exp(total), rel=1e-5)


def test_byte_models_are_measured_on_what_counts():
    r = np.random.default_rng(0)
    x, y = r.integers(97, 100, (2, B, L))
    given = (x, y, np.ones((B, L)))
    plain, wide = (
        data.witten_bell_bits_on_batches(['abcabcab' * 9], [b]) for b in (given, padded(given, 3))
    )
    assert wide == pytest.approx(plain, rel=1e-12)


def test_throughput_counts_positions_that_count(monkeypatch):
    counted = []
    monkeypatch.setattr(Throughput, 'step', lambda self, tokens: counted.append(tokens))
    x, y, w = batch()
    w[0, :3] = 0
    w[1] = 0.25
    loop([padded((x, y, w), rows=2)], STILL).run(1)
    images = np.zeros((3, 5, 2), np.float32), np.zeros(3, np.int32), np.array([1.0, 1.0, 0.0])
    loop([images], tl.Serial(tl.Flatten(), tl.Dense(V))).run(1)
    assert counted == [B * L - 3, 2]


def test_a_row_of_metrics_is_of_its_own_step_and_not_of_those_between(tmp_path):
    batches = [batch(i) for i in range(6)]
    for name, every in (('each', 1), ('some', 3)):
        loop(batches, STILL, tmp_path / name, log_every=every).run(6)
    each = {row['step']: row['train/loss'] for row in read_metrics(tmp_path / 'each')}
    some = {row['step']: row['train/loss'] for row in read_metrics(tmp_path / 'some')}
    assert some == {step: each[step] for step in (3, 6)}
    assert each[3] != pytest.approx(np.mean([each[1], each[2], each[3]]), rel=1e-6)


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
def test_a_loss_weight_that_is_not_finite_is_blamed_on_the_data(wrong):
    x, y, w = batch(1)
    w[2, 3] = wrong
    with pytest.raises(UsageError, match=f'step 2: the loss is nan .* loss weight is {wrong}; ch'):
        loop([batch(), (x, y, w)], STILL).run(2)


def test_a_negative_loss_weight_is_refused():
    good, (x, y, w) = batch(), batch(1)
    w[2, 3] = -0.5
    cause = r'a loss weight is -0\.5: it says how much a position counts in the mean, so give 0'
    with pytest.raises(UsageError, match=f'the batch of step 2: {cause}'):
        loop([good, (x, y, w)], STILL).run(2)
    weights, state = STILL.init(lc.signature_of((x,)), jax.random.key(0))
    task = EvalTask([good, (x, y, w)], LOSS)
    with pytest.raises(UsageError, match=f"EvalTask 'valid', batch 2: {cause}"):
        evaluate(STILL, weights, state, task)


def test_weights_may_be_booleans_or_integers():
    x, y, w = batch()
    w[0, :3] = 0
    rows = [loop([(x, y, w.astype(kind))]).run(1) for kind in (np.float32, bool, np.int32)]
    assert rows[1]['train/loss'] == rows[2]['train/loss'] == rows[0]['train/loss']
