"""Labels and weights of another shape are refused everywhere; the right ones give NumPy's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb import losses, supervised, tl
from layercomb.layers.metrics.metric import weighted_sum
from layercomb.layers.metrics.regression import Elementwise
from layercomb.model import Model
from layercomb.shapes import signature_of

B, L, D, V = 8, 4, 5, 3
made = np.random.default_rng(0)
X = made.normal(size=(B, D)).astype(np.float32)
Y = made.integers(0, V, B).astype(np.int32)
W = np.array([1, 1, 0.5, 0, 1, 2, 0, 1], np.float32)
COLUMN = 'drop the last axis, np.squeeze'

CLASSES = (tl.CrossEntropyLoss(), tl.Perplexity(), tl.BitsPerByte(), tl.Accuracy())
NUMBERS = (tl.L2Loss(), tl.SmoothL1Loss(), tl.BinaryCrossEntropyLoss(), tl.BinaryAccuracy())
SEQUENCES = (tl.SequenceAccuracy(), tl.MaskedSequenceAccuracy())

of_any_class = pytest.mark.parametrize('metric', CLASSES, ids=lambda m: m.label)


def score(metric, *arrays):
    return metric.apply({}, {}, tuple(map(jnp.asarray, arrays)))[0]


def mean(metric, *arrays):
    return float(metric.finish(tl.weighted_mean(*score(metric, *arrays))))


def loop(net, batches, loss, **options):
    learning_rate = options.pop('learning_rate', 0.0)
    task = supervised.TrainTask(batches, loss, optax.sgd(learning_rate), **options)
    return supervised.Loop(net, task, progress=False)


def measured(net, weights, batches, *metrics, **options):
    task = supervised.EvalTask(batches, metrics, **options)
    return {k.split('/')[1]: v for k, v in supervised.evaluate(net, weights, {}, task).items()}


def dense(weights, x):
    return np.asarray(x, float) @ np.asarray(weights['kernel'], float) + np.asarray(weights['bias'])


def entropies(z, y):
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, y[..., None], -1)[..., 0]


# Shapes that are refused.


WRONG = {
    'labels (B, 1)': (Y[:, None], W, rf'targets must be \(8,\) here: {COLUMN}\(targets, -1\)'),
    'labels and weights (B, 1)': (Y[:, None], W[:, None], rf'targets must be \(8,\) .*{COLUMN}'),
    'weights (B, 1)': (Y, W[:, None], rf'weights must be \(8,\) here: {COLUMN}\(weights, -1\)'),
    'one weight': (Y, W[:1], r'weights must be \(8,\) here: np.broadcast_to\(weights, \(8,\)\)'),
    'a number as weight': (
        Y,
        np.float32(1),
        r'weights must be \(8,\) here: np.broadcast_to\(weights, \(8,\)\) repeats',
    ),
    'fewer weights': (Y, W[:4], r'weights must be \(8,\) here: give one for each target'),
    'one label': (Y[:1], W, r'targets must be \(8,\) here: a batch is \(inputs…, targets, loss_'),
    'a row of labels': (Y[None], W, r'targets must be \(8,\) here'),
    'rows of zeros and a one': (
        np.eye(V, dtype=np.int32)[Y],
        W,
        r'targets must be \(8,\) here: give the class .* targets.argmax\(-1\)',
    ),
    'rows of probabilities': (
        np.eye(V, dtype=np.float32)[Y],
        W,
        r'targets must be \(8,\) here: targets of the outputs. shape are for regression, e.g. tl',
    ),
}
wrong = pytest.mark.parametrize(('y', 'w', 'text'), WRONG.values(), ids=list(WRONG))


@of_any_class
@wrong
def test_another_shape_is_refused_where_a_metric_is_applied(metric, y, w, text):
    z = X[:, :V]
    text = rf'{type(metric).__name__} takes logits .*; {text}'
    with pytest.raises(ValueError, match=text):
        score(metric, z, y, w)
    with pytest.raises(ValueError, match=text):
        jax.jit(lambda *batch: metric.apply({}, {}, batch))(z, y, w)
    with pytest.raises(ValueError, match=text):
        metric.init(signature_of((z, y, w)), jax.random.key(0))


@wrong
def test_another_shape_is_refused_by_training_and_evaluation(y, w, text):
    net = tl.Dense(V)
    model = Model(net).init(X)
    if np.shape(w):
        with pytest.raises(ValueError, match=text):
            loop(net, [(X, y, w)], tl.CrossEntropyLoss()).run(1)
    with pytest.raises(ValueError, match=text):
        measured(net, model.weights, [(X, y, w)], tl.Accuracy())
    attached = losses.attach(net, tl.CrossEntropyLoss())
    with pytest.raises(ValueError, match=text):
        attached.apply(model.weights, {}, tuple(map(jnp.asarray, (X, y, w))))


SEQUENCE = made.integers(0, V, (B, L)).astype(np.int32)
LOGITS = made.normal(size=(B, L, V)).astype(np.float32)


@pytest.mark.parametrize('options', [{}, {'loss_chunk_len': 2}, {'accumulate': 2}], ids=str)
@pytest.mark.parametrize(
    ('weights', 'text'),
    [
        (
            np.ones(B, np.float32),
            r'np.broadcast_to\(weights\[:, None\], \(\d, \d\)\) gives each row',
        ),
        (np.ones((B, 1), np.float32), r'np.broadcast_to\(weights, \(\d, \d\)\) repeats them'),
        (np.ones((B, L, 1), np.float32), COLUMN),
    ],
    ids=['a row', 'a column', 'an axis more'],
)
def test_weights_of_a_sequence_of_another_shape_are_refused(weights, text, options):
    net = tl.Dense(V)
    batch = made.normal(size=(B, L, D)).astype(np.float32), SEQUENCE, weights
    with pytest.raises(ValueError) as e:
        loop(net, [batch], tl.CrossEntropyLoss(), **options).run(1)
    if not options:
        assert e.match(rf'CrossEntropyLoss takes .*; weights must be \(8, 4\) here: {text}')


def test_one_weight_a_position_says_how_to_repeat_it():
    with pytest.raises(ValueError, match=r'np.broadcast_to\(weights, \(8, 4\)\) repeats them'):
        score(tl.Accuracy(), LOGITS, SEQUENCE, np.ones(L, np.float32))
    square = LOGITS[:4], SEQUENCE[:4], np.ones(4, np.float32)  # a row or a position, who knows
    with pytest.raises(ValueError, match=r'weights\[:, None\], .* each row one weight, .* repeats'):
        score(tl.Accuracy(), *square)


def test_logits_without_classes_are_refused():
    with pytest.raises(ValueError, match='the outputs have no axis of classes'):
        score(tl.Accuracy(), np.float32(1), np.int32(1), np.float32(1))


def test_public_functions_broadcast_nothing():
    z, y, w = map(jnp.asarray, (X[:, :V], Y, W))
    np.testing.assert_allclose(tl.cross_entropy(z, y), entropies(X[:, :V].astype(float), Y), 1e-5)
    for targets in (y[:, None], y[:1], y[0], jnp.tile(y, (2, 1))):
        with pytest.raises(ValueError, match=r'cross_entropy takes logits .* and targets'):
            tl.cross_entropy(z, targets)
    values = tl.cross_entropy(z, y)
    for f in (tl.weighted_mean, weighted_sum, tl.weighted_sum):
        for weights in (w[:, None], w[:1], jnp.tile(w, (2, 1))):
            with pytest.raises(
                ValueError, match=r'values \(8,\) and weights .* must be of one sha'
            ):
                f(values, weights)
    total, weight = tl.weighted_sum(values, w)
    np.testing.assert_allclose(total / weight, tl.weighted_mean(values, w), 1e-6)


@pytest.mark.parametrize('metric', NUMBERS, ids=lambda m: m.label)
def test_numbers_beside_outputs_of_another_shape_are_refused(metric):
    z = X[:, :1]
    t = (made.random((B, 1)) < 0.5).astype(np.float32)
    score(metric, z, t, W[:, None])
    for targets, weights, text in (
        (t[:, 0], W, r'targets must be \(8, 1\) here: add the last axis, targets\[..., None\]'),
        (t[:1], W[:, None], r'targets must be \(8, 1\) here'),
        (np.tile(t, 2), W[:, None], r'targets must be \(8, 1\) here'),
        (t, W, r'weights must be \(8, 1\) here: np.broadcast_to\(weights\[:, None\], \(8, 1\)\)'),
        (t, np.float32(1), r'weights must be \(8, 1\) here: np.broadcast_to\(weights, \(8, 1\)\)'),
    ):
        with pytest.raises(ValueError, match=f'{type(metric).__name__} takes outputs .*; {text}'):
            score(metric, z, targets, weights)
        with pytest.raises(ValueError, match=text):
            losses.attach(tl.Relu(), metric).apply({}, {}, (z, targets, weights))


def test_complex_numbers_lose_no_part():
    z = X[:, :V].astype(np.complex64)
    with pytest.raises(TypeError, match=r'Accuracy takes real outputs, got complex64\[8,3\]'):
        score(tl.Accuracy(), z, Y, W)
    with pytest.raises(TypeError, match='L2Loss takes real targets, got complex64'):
        score(tl.L2Loss(), X, X.astype(np.complex64), X)
    with pytest.raises(TypeError, match='L2Loss takes real weights, got complex64'):
        score(tl.L2Loss(), X, X, X.astype(np.complex64))


# A metric of one's own.


class Own(tl.Metric):
    """Whatever is asked for, of logits (B, V) and targets (B,)."""

    which: str = 'margin'

    def values(self, outputs, targets):
        margin = outputs.max(-1) - outputs.mean(-1)
        return {
            'margin': margin,
            'right': outputs.argmax(-1) == targets,
            'count': targets,
            'half': margin.astype(jnp.float16),
            'numpy': np.ones(targets.shape),
            'mean': margin.mean(),
            'column': margin[:, None],
            'pairs': margin[:, None] - margin[None],
            'rows': outputs,
            'number': 1.0,
            'list': list(margin),
            'nothing': None,
            'complex': margin.astype(jnp.complex64),
        }[self.which]


@pytest.mark.parametrize('which', ['margin', 'right', 'count', 'half', 'numpy'])
def test_numbers_of_a_metric_of_ones_own_are_float32(which):
    z = X[:, :V]
    values, weights = score(Own(which), z, Y, W)
    assert values.dtype == weights.dtype == jnp.float32
    wanted = {
        'margin': z.max(-1) - z.mean(-1),
        'half': z.max(-1) - z.mean(-1),
        'right': z.argmax(-1) == Y,
        'count': Y,
        'numpy': np.ones(B),
    }[which]
    np.testing.assert_allclose(values, wanted, rtol=1e-2 if which == 'half' else 1e-5)
    got = measured(tl.Relu(), {}, [(np.maximum(z, 0), Y, W)], Own('count'))
    np.testing.assert_allclose(got['own'], (Y * W).sum() / W.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ('which', 'error', 'text'),
    [
        (
            'mean',
            ValueError,
            r'one number for each target, of the shape \(8,\), got \(\): nothing is.*jnp.full\(tar',
        ),
        (
            'column',
            ValueError,
            r'one number for each target, of the shape \(8,\), got \(8, 1\): e.g. values.mean',
        ),
        (
            'pairs',
            ValueError,
            r'one number for each target, of the shape \(8,\), got \(8, 8\): e.g. values.mean',
        ),
        (
            'rows',
            ValueError,
            r'one number for each target, of the shape \(8,\), got \(8, 3\): e.g. values.mean\(-1',
        ),
        ('number', TypeError, r'an array .* got float: .* jnp.full\(targets.shape, …\)'),
        (
            'list',
            TypeError,
            r'an array .* got list: give jnp.stack\(values\); the same',
        ),
        (
            'nothing',
            TypeError,
            r'an array of real numbers, got NoneType: give one for each',
        ),
        ('complex', TypeError, r'an array of real numbers, got complex64\[8\]: give real ones'),
    ],
)
def test_values_of_another_shape_are_refused_at_every_entrance(which, error, text):
    metric, net = Own(which), tl.Dense(V)
    weights = Model(net).init(X).weights
    text = rf'Own.values must give {text}'
    with pytest.raises(error, match=text):
        score(metric, X[:, :V], Y, W)
    with pytest.raises(error, match=text):
        metric.output_signature((X[:, :V], Y, W))
    with pytest.raises(error, match=text):
        loop(net, [(X, Y, W)], metric).run(1)
    with pytest.raises(error, match=text):
        measured(net, weights, [(X, Y, W)], metric)


class Rows(tl.Metric):
    """A value for each row of targets (B, L), with a weight of its own."""

    position_wise = False

    def scores(self, outputs, targets, weights):
        return jnp.abs(outputs.argmax(-1) - targets).sum(-1), weights.max(-1)


class Wide(Rows):
    """As Rows, with the weights of the positions."""

    def scores(self, outputs, targets, weights):
        return super().scores(outputs, targets, weights)[0], weights


class Forces(Elementwise):
    """Targets with an axis more than the outputs."""

    def targets_shape(self, outputs_shape):
        return (*outputs_shape, 2)

    def compare(self, outputs, targets):
        return jnp.square(outputs[..., None] - targets)


def test_a_metric_of_whole_rows_gives_weights_of_its_own():
    weights = (made.random((B, L)) < 0.7).astype(np.float32)
    got = measured(tl.Relu(), {}, [(np.maximum(LOGITS, 0), SEQUENCE, weights)], Rows())
    distance = np.abs(np.maximum(LOGITS, 0).argmax(-1) - SEQUENCE).sum(-1)
    by_row = weights.max(-1)
    np.testing.assert_allclose(got['rows'], (distance * by_row).sum() / by_row.sum(), rtol=1e-6)
    with pytest.raises(
        ValueError, match=r'Wide.values must give one number for each weight, .* \(8, 4\)'
    ):
        score(Wide(), LOGITS, SEQUENCE, weights)


def test_a_metric_says_which_targets_it_takes():
    targets = made.normal(size=(B, D, 2)).astype(np.float32)
    Forces().check(X, targets, targets)
    with pytest.raises(
        ValueError, match=r'Forces takes .*targets must be \(8, 5, 2\) here: a batch'
    ):
        score(Forces(), X, X, X)


class Unsaid(tl.Metric):
    """One that overrides `apply` altogether, weights and values of two shapes."""

    def apply(self, weights, state, inputs, *, rng=None, mode=None):
        return (inputs[0].mean(-1), inputs[2][:, None]), state


def test_a_metric_that_goes_round_the_check_meets_another():
    net = tl.Dense(V)
    with pytest.raises(
        ValueError, match=r'values \(8,\) and weights \(8, 1\) must be of one shape'
    ):
        loop(net, [(X, Y, W)], Unsaid()).run(1)
    with pytest.raises(
        ValueError, match=r'values \(8,\) and weights \(8, 1\) must be of one shape'
    ):
        measured(net, Model(net).init(X).weights, [(X, Y, W)], Unsaid())


# Right values, computed by NumPy.


def test_labels_and_weights_of_the_right_shape_give_the_loss_of_numpy():
    run = loop(tl.Dense(V), [(X, Y, W)], tl.CrossEntropyLoss())
    loss = run.run(1)['train/loss']
    z = dense(run.weights, X)
    np.testing.assert_allclose(loss, (entropies(z, Y) * W).sum() / W.sum(), rtol=1e-5)
    got = measured(tl.Dense(V), run.weights, [(X, Y, W)], tl.Accuracy())
    right = ((z.argmax(-1) == Y) * W).sum() / W.sum()
    np.testing.assert_allclose(got['accuracy'], right, rtol=1e-6)


def test_squared_and_smoothed_errors_are_those_of_numpy():
    y = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 0.999], np.float32)
    t = np.zeros(B, np.float32)
    np.testing.assert_allclose(score(tl.L2Loss(), y, t, W)[0], np.where(W == 0, 0, y**2), 1e-6)
    smooth = [0, 0.125, 0.125, 0.5, 0.5, 2.5, 2.5, 0.999**2 / 2]
    np.testing.assert_allclose(
        score(tl.SmoothL1Loss(), y, t, np.ones_like(W))[0], smooth, rtol=1e-6
    )
    whole = score(tl.L2Loss(), y, t.astype(np.int32), np.ones(B, bool))
    assert [x.dtype for x in whole] == [jnp.float32, jnp.float32]


def test_binary_cross_entropy_is_that_of_numpy_and_exact_for_large_logits():
    x = np.array([-2.0, -0.3, 0.0, 0.7, 3.0, 0.1, -0.1, 1.5], np.float32)
    t = np.array([0, 1, 1, 0, 1, 0.25, 0.5, 1], np.float32)
    p = 1 / (1 + np.exp(-x.astype(float)))
    wanted = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    loss = tl.BinaryCrossEntropyLoss()
    np.testing.assert_allclose(score(loss, x, t, np.ones_like(x))[0], wanted, rtol=1e-5)
    large = np.array([200.0, 200.0, -200.0, -200.0], np.float32)
    got = score(loss, large, np.array([1, 0, 1, 0], np.int32), np.ones(4, np.float32))[0]
    np.testing.assert_allclose(got, [0, 200, 200, 0], rtol=1e-6)
    slope = jax.grad(lambda x: score(loss, x, t, np.ones_like(t))[0].sum())(jnp.asarray(x))
    np.testing.assert_allclose(slope, p - t, rtol=1e-5, atol=1e-6)  # at 0, too


INFINITE = np.array([-np.inf, -1e30, -1.0, 0.0, 1.0, 1e30, np.inf])


def value_and_slope(metric, x, t):
    """Of one output and one target, by the metric; infinite ones are not averaged."""

    def value(x):
        return score(metric, x, jnp.asarray([t]), jnp.ones(1))[0][0]

    y, slope = jax.value_and_grad(value)(jnp.asarray([x], jnp.float32))
    return float(y), float(slope[0])


@pytest.mark.parametrize('t', [0, 1, 0.25])
def test_binary_cross_entropy_of_infinite_logits_is_its_limit(t):
    for x in INFINITE:
        # −log of a probability is max(∓x, 0) far from 0, and a term of probability 0 is none.
        terms = [(p, np.logaddexp(0, z)) for p, z in ((t, -x), (1 - t, x))]
        wanted = sum(p * z for p, z in terms if p)
        rate = 0.5 * (1 + np.tanh(x / 2))
        got = value_and_slope(tl.BinaryCrossEntropyLoss(), x, t)
        np.testing.assert_allclose(got, (wanted, rate - t), rtol=1e-6, atol=1e-7)


def test_a_right_answer_without_doubt_costs_nothing_in_a_mean():
    x = jnp.array([np.inf, -np.inf, 1.0])
    t, w = np.array([1, 0, 1]), np.ones(3)
    loss = tl.BinaryCrossEntropyLoss()
    np.testing.assert_allclose(mean(loss, x, t, w), np.log1p(np.exp(-1)) / 3, rtol=1e-6)


def test_no_nan_arises_on_the_way_to_a_number():
    with jax.debug_nans(True):
        for metric in NUMBERS[:3]:
            for x in (np.inf, -np.inf):
                value_and_slope(metric, x, float(x > 0))


@pytest.mark.parametrize('t', [0.0, -3.5])
def test_the_smoothed_error_pulls_by_1_however_far_it_is(t):
    for x in (*INFINITE, t + 0.5, t - 0.5, t + 1):
        d = x - t
        wanted = d * d / 2 if abs(d) < 1 else abs(d) - 0.5
        got = value_and_slope(tl.SmoothL1Loss(), x, t)
        np.testing.assert_allclose(got, (wanted, np.clip(d, -1, 1)), rtol=1e-6)


@pytest.mark.parametrize('weight', [2, 0.5, True, np.float32(3), jnp.float32(0.25)], ids=repr)
def test_one_weight_for_all_values_gives_the_plain_mean(weight):
    for values in (X, X[:, 0], X[0, 0]):
        values = jnp.asarray(values)
        want = np.asarray(values, float)
        got = tl.weighted_mean(values, weight)
        np.testing.assert_allclose(got, want.mean(), rtol=1e-5)
        total = jax.jit(tl.weighted_sum)(values, jnp.float32(weight))
        wanted = want.sum() * float(weight), want.size * float(weight)
        np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_no_weight_for_all_values_gives_0():
    assert float(tl.weighted_mean(jnp.full(3, jnp.nan), 0.0)) == 0.0


@pytest.mark.parametrize('metric', NUMBERS[2:], ids=lambda m: m.label)
def test_a_target_that_is_no_probability_is_nan(metric):
    t = np.array([-1, 0, 1, 2], np.float32)
    values, _ = score(metric, np.ones(4, np.float32), t, np.ones(4, np.float32))
    assert np.isnan(values).tolist() == [True, False, False, True]
    booleans = score(metric, np.array([1.0, -1.0], np.float32), np.array([True, False]), W[:2])
    assert np.isfinite(booleans[0]).all()


@pytest.mark.parametrize('metric', NUMBERS, ids=lambda m: m.label)
def test_a_missing_number_of_weight_0_counts_nowhere_not_even_in_the_gradient(metric):
    x = jnp.asarray(X)
    t = np.where(made.random(X.shape) < 0.3, np.nan, (X > 0).astype(np.float32))
    w = (~np.isnan(t)).astype(np.float32)

    def loss(x, t, w):
        return tl.weighted_mean(*score(metric, x, t, w))

    value, slope = jax.value_and_grad(loss)(x, t, w)
    there = w == 1
    alone, slope_alone = jax.value_and_grad(loss)(x[there], t[there], w[there])
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    assert (np.asarray(slope)[~there] == 0).all()
    np.testing.assert_allclose(np.asarray(slope)[there], slope_alone, rtol=1e-5, atol=1e-7)


def test_a_binary_decision_is_right_above_and_below_0():
    x = np.array([-1, 0, 1, 2], np.float32)
    values, _ = score(tl.BinaryAccuracy(), x, np.array([0, 0, 1, 0]), np.ones(4, np.float32))
    assert values.tolist() == [1, 1, 1, 0]


def sequence_example():
    logits = 5 * np.eye(V, dtype=np.float32)[SEQUENCE]  # right everywhere
    logits[1, 2] = np.roll(logits[1, 2], 1)  # wrong, and counts
    logits[2, 3] = np.roll(logits[2, 3], 1)  # wrong in the padding
    logits[3] = np.roll(logits[3], 1, -1)  # all wrong, and all padding
    weights = np.ones((B, L), np.float32)
    weights[2, 3] = 0
    weights[3] = 0
    weights[4] = 0.25  # counts as a sequence all the same
    return logits, weights


@pytest.mark.parametrize('metric', SEQUENCES, ids=lambda m: m.label)
def test_a_sequence_is_right_where_all_that_counts_is(metric):
    logits, weights = sequence_example()
    values, counts = score(metric, logits, SEQUENCE, weights)
    assert values.shape == counts.shape == (B,) and values.dtype == counts.dtype == jnp.float32
    assert (np.asarray(values) * np.asarray(counts)).tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert counts.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    net = tl.Fn('Same', jnp.positive)
    got = measured(net, {}, [(logits, SEQUENCE, weights)], metric, tl.Accuracy())
    np.testing.assert_allclose(got[metric.label], 6 / 7, rtol=1e-6)
    right = (logits.argmax(-1) == SEQUENCE) * weights
    np.testing.assert_allclose(got['accuracy'], right.sum() / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize('metric', (*SEQUENCES, Rows()), ids=lambda m: m.label)
def test_a_whole_sequence_cannot_be_judged_in_pieces(metric):
    text = rf'{type(metric).__name__} needs all positions of a sequence .*: measure it without'
    net = tl.Dense(V)
    with pytest.raises(TypeError, match=text):
        losses.attach(net, (tl.Accuracy(), metric), chunk_len=2)
    with pytest.raises(TypeError, match=text):
        weights = Model(net).init(LOGITS).weights
        batch = LOGITS, SEQUENCE, np.ones((B, L), np.float32)
        measured(net, weights, [batch], metric, loss_chunk_len=2)
    with pytest.raises(TypeError, match='mixes positions'):
        tl.Chunk(metric, 2)


def test_one_class_an_example_is_a_sequence_of_one():
    values, counts = score(tl.SequenceAccuracy(), X[:, :V], Y, W)
    assert (np.asarray(values)[W > 0] == (X[:, :V].argmax(-1) == Y)[W > 0]).all()
    assert (np.asarray(counts) == (W != 0)).all()
    with pytest.raises(ValueError, match='takes a batch of sequences, got one target'):
        score(tl.SequenceAccuracy(), X[0, :V], Y[0], W[0])


def gradient_by_hand(metric, z, t):
    return {
        'l2_loss': lambda: 2 * (z - t),
        'smooth_l1_loss': lambda: np.clip(z - t, -1, 1),
        'binary_cross_entropy_loss': lambda: 1 / (1 + np.exp(-z)) - t,
    }[metric.label]()


@pytest.mark.parametrize('options', [{}, {'accumulate': 2}, {'loss_chunk_len': 3}], ids=str)
@pytest.mark.parametrize('metric', NUMBERS[:3], ids=lambda m: m.label)
def test_training_on_numbers_takes_the_step_of_numpy(metric, options):
    x = made.normal(size=(B, L, D)).astype(np.float32)
    t = made.random((B, L, 2)).astype(np.float32)
    w = (made.random((B, L, 2)) < 0.7).astype(np.float32)
    start = Model(tl.Dense(2)).init(x)
    kernel, bias = (np.asarray(start.weights[k], float) for k in ('kernel', 'bias'))
    run = loop(start, [(x, t, w)], metric, learning_rate=0.1, **options)
    loss = run.run(1)['train/loss']
    z = x.astype(float) @ kernel + bias
    slope = gradient_by_hand(metric, z, t) * w / w.sum()
    values = np.asarray(score(metric, z.astype(np.float32), t, w)[0])
    np.testing.assert_allclose(loss, (values * w).sum() / w.sum(), rtol=1e-5)
    d_kernel = np.einsum('bld,blv->dv', x, slope)
    np.testing.assert_allclose(run.weights['kernel'], kernel - 0.1 * d_kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        run.weights['bias'], bias - 0.1 * slope.sum((0, 1)), rtol=1e-4, atol=1e-6
    )


def test_every_metric_of_numbers_is_evaluated_over_batches_of_other_weights():
    batches = []
    for _ in range(2):
        t = (made.random((B, D)) < 0.5).astype(np.float32)
        batches.append((made.normal(size=(B, D)).astype(np.float32), t, made.random((B, D))))
    batches = [(x, t, w.astype(np.float32)) for x, t, w in batches]
    net = tl.Fn('Same', jnp.positive)
    got = measured(net, {}, batches, *NUMBERS)
    z, t, w = (np.concatenate(column).astype(float) for column in zip(*batches, strict=True))
    p = 1 / (1 + np.exp(-z))
    distance = np.abs(z - t)
    wanted = {
        'l2_loss': distance**2,
        'smooth_l1_loss': np.where(distance < 1, distance**2 / 2, distance - 0.5),
        'binary_cross_entropy_loss': -(t * np.log(p) + (1 - t) * np.log(1 - p)),
        'binary_accuracy': (z > 0) == (t == 1),
    }
    for label, values in wanted.items():
        np.testing.assert_allclose(got[label], (values * w).sum() / w.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    'metric',
    [tl.Accuracy(), tl.BinaryAccuracy(), tl.SequenceAccuracy(), tl.MaskedSequenceAccuracy()],
)
def test_what_only_counts_is_no_loss_to_train_on(metric):
    with pytest.raises(ValueError, match=r'has no gradient, so nothing would train: give e.g. tl'):
        supervised.TrainTask([()], metric, optax.sgd(0.1))


@pytest.mark.parametrize(
    'metric', [tl.Perplexity(), tl.BitsPerByte(), tl.L2Loss(), tl.SmoothL1Loss()]
)
def test_what_has_a_gradient_trains(metric):
    outputs = jnp.array([[0.5, -1.0, 2.0]])
    targets = jnp.array([1]) if metric.targets_shape((1, 3)) == (1,) else jnp.zeros((1, 3))

    def loss(outputs):
        (values, weights), _ = metric.apply({}, {}, (outputs, targets, jnp.ones(targets.shape)))
        return tl.weighted_mean(values, weights)

    assert metric.has_gradient and jnp.abs(jax.grad(loss)(outputs)).max() > 0.01
