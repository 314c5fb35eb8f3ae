"""Metrics that are no means, against slow NumPy that counts position by position."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import Model, UsageError, tl
from layercomb.supervised import EvalTask, TrainTask, evaluate

N = 4
made = np.random.default_rng(3)


def confusion(targets, found, weights, n=N):
    counts = np.zeros((n, n))
    for t, f, w in zip(targets.ravel(), found.ravel(), weights.ravel(), strict=True):
        if w:
            counts[t, f] += w
    return counts


def f1(counts, c):
    tp = counts[c, c]
    fp = sum(counts[t, c] for t in range(len(counts)) if t != c)
    fn = sum(counts[c, f] for f in range(len(counts)) if f != c)
    if tp + fp + fn == 0:
        return None
    if tp == 0:
        return 0.0
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall)


def macro(counts):
    scores = [s for s in (f1(counts, c) for c in range(len(counts))) if s is not None]
    return sum(scores) / len(scores)


def batches(n=3, classes=N, shape=(5, 6)):
    """Logits, targets and weights; the last class is nowhere, and padding has strange targets."""
    for _ in range(n):
        logits = made.normal(size=(*shape, classes)).astype(np.float32)
        logits[..., -1] -= 99
        weights = made.choice([0, 0.5, 1, 2], shape).astype(np.float32)
        targets = made.integers(0, classes - 1, shape).astype(np.int32)
        yield logits, np.where(weights == 0, -100, targets), weights


def measured(metric, data, **kwargs):
    net = tl.Fn('Same', lambda x: x)
    (value,) = evaluate(net, {}, {}, EvalTask(data, metric, **kwargs)).values()
    return value


@pytest.mark.parametrize('shape', [(7,), (5, 6)])
def test_counts_of_all_batches_are_added_up_before_anything_is_made_of_them(shape):
    data = list(batches(shape=shape))
    found = [logits.argmax(-1) for logits, _, _ in data]
    counts = sum(confusion(t, f, w) for f, (_, t, w) in zip(found, data, strict=True))
    assert measured(tl.ConfusionMatrix(N), data) == counts.tolist()
    assert measured(tl.F1(N), data) == pytest.approx(macro(counts), rel=1e-12)
    means = np.mean([measured(tl.F1(N), [batch]) for batch in data])
    assert measured(tl.F1(N), data) != pytest.approx(means, rel=1e-3)  # it is no mean of batches


def test_in_pieces_it_counts_the_same():
    net = tl.Serial(tl.Embedding(N, 8), tl.Dense(N))
    x = made.integers(0, N, (3, 7)).astype(np.int32)
    model = Model(net).init(x)
    data = [(x, np.roll(x, 1), np.ones(x.shape, np.float32))] * 2
    metrics = (tl.ConfusionMatrix(N), tl.F1(N), tl.CrossEntropyLoss())
    whole, pieces = (
        evaluate(net, model.weights, model.state, EvalTask(data, metrics, loss_chunk_len=n))
        for n in (None, 3)
    )
    assert whole['valid/confusion_matrix'] == pieces['valid/confusion_matrix']
    assert whole['valid/f1'] == pieces['valid/f1']


@pytest.mark.parametrize('average', ['binary', 'macro'])
def test_two_classes(average):
    data = []
    for logits, targets, weights in batches(classes=3):
        data.append((logits[..., :2], targets, weights))
    counts = sum(confusion(t, x.argmax(-1), w, 2) for x, t, w in data)
    wanted = f1(counts, 1) if average == 'binary' else macro(counts)
    assert measured(tl.F1(2, average), data) == pytest.approx(wanted, rel=1e-12)


def test_one_logit():
    logits = made.normal(size=(6, 5)).astype(np.float32)
    targets = made.integers(0, 2, (6, 5)).astype(np.float32)
    weights = made.integers(0, 3, (6, 5)).astype(np.float32)
    counts = confusion(targets.astype(int), (logits > 0).astype(int), weights, 2)
    strange = np.where(weights == 0, np.nan, targets)
    got = measured(tl.BinaryF1(), [(logits, strange, weights)])
    assert got == pytest.approx(f1(counts, 1), rel=1e-12)
    with pytest.raises(UsageError, match=r'^valid/binary_f1: the sum over the data is nan: look'):
        measured(tl.BinaryF1(), [(logits, targets + 1, weights)])


def test_nothing_of_the_class_is_the_score_0():
    logits = np.array([[1.0, 0.0]] * 3, np.float32)
    batch = (logits, np.zeros(3, np.int32), np.ones(3, np.float32))
    assert measured(tl.F1(2, 'binary'), [batch]) == 0
    assert measured(tl.F1(2), [batch]) == 1  # class 1 is left out
    binary = (-np.ones(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32))
    assert measured(tl.BinaryF1(), [binary]) == 0


def test_what_is_refused():
    logits, targets, weights = next(batches())
    ones = np.ones_like(weights)
    with pytest.raises(UsageError, match=r'^valid/f1: the sum over the data is nan: look at the'):
        measured(tl.F1(N), [(logits, targets * 0 + N, ones)])
    with pytest.raises(UsageError, match=r'^valid/f1: all loss weights are 0'):
        measured(tl.F1(N), [(logits, targets, weights * 0)])
    with pytest.raises(ValueError, match=r'F1 is of n_classes=3, got 4 logits: give n_classes=4'):
        measured(tl.F1(3), [(logits, targets, weights)])
    with pytest.raises(ValueError, match=r"average='binary' is of 2 classes, got n_classes=3"):
        tl.F1(3, 'binary')
    with pytest.raises(ValueError, match='n_classes must be at least 2 and below 4097, got 1'):
        tl.ConfusionMatrix(1)
    with pytest.raises(TypeError, match='targets must be integers'):
        measured(tl.F1(N), [(logits, weights, ones)])
    for metric in (tl.F1(2), tl.ConfusionMatrix(2), tl.BinaryF1()):
        with pytest.raises(ValueError, match=r'^TrainTask: loss=.* is no mean over positions.*: g'):
            TrainTask([(logits, targets, weights)], metric, None)


class Odds(tl.Metric):
    """A metric of one's own that is no mean: how often right, over how often wrong."""

    def values(self, outputs, targets):
        return (outputs.argmax(-1) == targets).astype(jnp.float32)

    def sums(self, values, weights):
        right = (values * weights).sum()
        return right, weights.sum() - right, weights.sum()

    def total(self, sums):
        return float(sums[0] / sums[1])


def test_a_metric_of_ones_own():
    data = [(x, t, np.ones_like(w)) for x, t, w in batches()]
    right = sum((x.argmax(-1) == t).sum() for x, t, _ in data)
    n = sum(t.size for _, t, _ in data)
    assert measured(Odds(), data) == pytest.approx(right / (n - right), rel=1e-12)


def test_one_cell_a_position_however_many_batches():
    """Counts beyond what a float32 holds exactly are exact in the sum over batches."""
    n = 2**14
    batch = (np.eye(2, dtype=np.float32)[np.zeros(n, int)], np.zeros(n, np.int32))
    data = [(*batch, np.full(n, 1000, np.float32))] * 3
    assert measured(tl.ConfusionMatrix(2), data)[0][0] == 3 * 1000 * n
