"""Losses and metrics against NumPy, with padding, and what is not a number."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.metrics.metric import weighted_sum
from layercomb.shapes import shape_dtype

B, L, V = 2, 4, 5
made = np.random.default_rng(0)
LOGITS = made.normal(size=(B, L, V)).astype(np.float32) * 3
TARGETS = made.integers(0, V, (B, L)).astype(np.int32)
WEIGHTS = np.array([[1, 1, 0.5, 0], [1, 0, 0, 0]], np.float32)


def run(metric, logits=LOGITS, targets=TARGETS, weights=WEIGHTS):
    inputs = tuple(map(jnp.asarray, (logits, targets, weights)))
    return metric.apply({}, {}, inputs)[0]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def entropies(logits=LOGITS, targets=TARGETS):
    return -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]


def test_cross_entropy_and_its_like():
    for metric in (tl.CrossEntropyLoss(), tl.Perplexity(), tl.BitsPerByte()):
        values, weights = run(metric)
        np.testing.assert_allclose(values, entropies(), rtol=1e-5)
        assert (weights == WEIGHTS).all()
        assert values.dtype == weights.dtype == jnp.float32


def test_label_smoothing_is_the_cross_entropy_to_a_softened_target():
    soft = 0.9 * np.eye(V)[TARGETS] + 0.1 / V
    values, _ = run(tl.CrossEntropyLoss(label_smoothing=0.1))
    np.testing.assert_allclose(values, -(soft * log_softmax(LOGITS)).sum(-1), rtol=1e-5)
    with pytest.raises(ValueError, match='label_smoothing must be at least 0 and below 1, got 1'):
        tl.CrossEntropyLoss(label_smoothing=1)


def test_accuracy():
    values, _ = run(tl.Accuracy())
    assert (np.asarray(values) == (LOGITS.argmax(-1) == TARGETS)).all()


@pytest.mark.parametrize('metric', [tl.CrossEntropyLoss(), tl.Perplexity(), tl.Accuracy()])
def test_targets_in_the_place_of_weights_are_refused(metric):
    say = r'targets must be integers, got float32\[2,4\]: a batch is \(inputs…, targets, loss_w'
    with pytest.raises(TypeError, match=say):
        run(metric, targets=WEIGHTS, weights=TARGETS)
    with pytest.raises(TypeError, match=say):
        metric.output_signature((LOGITS, WEIGHTS, TARGETS))


def test_finish():
    assert tl.CrossEntropyLoss().finish(2.0) == 2.0
    assert tl.Perplexity().finish(2.0) == math.exp(2.0)
    assert math.isfinite(tl.Perplexity().finish(1e6)) and math.isnan(tl.Perplexity().finish(np.nan))
    assert tl.BitsPerByte().finish(math.log(2)) == 1.0
    assert tl.BitsPerByte(bytes_per_token=4.0).finish(math.log(16)) == 1.0


def test_labels_are_what_reports_call_them():
    metrics = [tl.CrossEntropyLoss(), tl.Perplexity(), tl.BitsPerByte(), tl.Accuracy(name='top')]
    assert [m.label for m in metrics] == ['loss', 'perplexity', 'bits_per_byte', 'top']


@pytest.mark.parametrize('dtype', ['int32', 'uint8', 'int8'])
def test_targets_of_every_integer_type(dtype):
    logits = made.normal(size=(3, 256)).astype(np.float32)
    targets = np.array([0, 127, 5], dtype)
    values, _ = run(tl.CrossEntropyLoss(), logits, targets, np.ones(3, np.float32))
    np.testing.assert_allclose(values, entropies(logits, targets.astype(int)), rtol=1e-5)
    largest = np.array([255], 'uint8')
    values, _ = run(tl.CrossEntropyLoss(), logits[:1], largest, np.ones(1, np.float32))
    np.testing.assert_allclose(values, entropies(logits[:1], largest.astype(int)), rtol=1e-5)


def test_a_target_outside_the_vocabulary_is_nan():
    targets = np.array([[V, -1, 0, 1]], np.int32)
    for metric in (tl.CrossEntropyLoss(label_smoothing=0.1), tl.Perplexity(), tl.BitsPerByte()):
        values, _ = run(metric, LOGITS[:1], targets, WEIGHTS[:1])
        assert np.isnan(values).tolist() == [[True, True, False, False]]


def test_padding_counts_for_nothing_even_if_it_is_not_a_number():
    targets = np.where(WEIGHTS == 0, -100, TARGETS)

    def loss(logits):
        return tl.weighted_mean(*run(tl.CrossEntropyLoss(), logits, targets))

    value, grads = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    wanted = (entropies() * WEIGHTS).sum() / WEIGHTS.sum()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert np.isfinite(grads).all()
    assert ((np.abs(grads).sum(-1) > 0) == (WEIGHTS > 0)).all()


def test_weighted_mean():
    values, weights = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 3.0])
    assert tl.weighted_mean(values, weights) == 2.5
    assert [float(x) for x in weighted_sum(values, weights)] == [10.0, 4.0]
    assert tl.weighted_mean(values, jnp.zeros(3)) == 0.0
    assert jnp.isnan(tl.weighted_mean(values, jnp.ones(3)))


def test_logits_of_few_bits_are_scored_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    values, weights = run(tl.CrossEntropyLoss(), logits, weights=WEIGHTS.astype(jnp.bfloat16))
    assert values.dtype == weights.dtype == jnp.float32
    np.testing.assert_allclose(values, entropies(logits.astype(np.float32)), rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    signature = shape_dtype((B, L, V)), shape_dtype((B, L + 1), 'int32'), shape_dtype((B, L))
    wanted = (
        r'Accuracy takes logits \(…, V\), targets \(…\) and weights \(…\), got \(2, 4, 5\), \(2, 5'
    )
    with pytest.raises(ValueError, match=wanted):
        tl.Accuracy().output_signature(signature)
