"""The loss of DPO and its relatives beside plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import losses, tl

B, L, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2 * B, L, V)).astype(np.float32)
TOKENS = RNG.integers(0, V, (2 * B, L)).astype(np.int32)
# Answers of different lengths; the last pair is padding in its second row, so it does not count.
WEIGHTS = (np.arange(L) < [[5], [2], [3], [4], [1], [0]]).astype(np.float32)
WEIGHTS[:, 0] = [0, 0, 1, 0, 1, 0]
REFERENCE = RNG.normal(-8, 1, 2 * B).astype(np.float32)
MEAN = (REFERENCE / np.maximum(WEIGHTS.sum(1), 1)).astype(np.float32)
SHARES = np.broadcast_to(MEAN[:, None], (2 * B, L)).copy()
TARGETS = np.stack([TOKENS, SHARES.view(np.int32)], -1)


def gains(logits, normalized=False):
    """h of each pair that counts, from the definition."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for row in range(2 * B):
        at = np.flatnonzero(WEIGHTS[row])
        total = sum(log_p[row, t, TOKENS[row, t]] for t in at) - REFERENCE[row]
        found.append(total / max(len(at), 1) if normalized else total)
    return np.array([found[0] - found[1], found[2] - found[3]])


def measured(metric, logits=LOGITS, targets=TARGETS, weights=WEIGHTS):
    (values, counts), _ = metric.apply({}, {}, tuple(map(jnp.asarray, (logits, targets, weights))))
    return [float(x) for x in metric.sums(values, counts)]


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize('normalized', [False, True])
def test_the_loss_is_that_of_the_papers(normalized):
    h = gains(LOGITS.astype(np.float64), normalized)
    given = {'length_normalized': normalized, 'beta': 0.3}
    for metric, wanted in [
        (tl.PreferenceLoss(**given), -log_sigmoid(0.3 * h)),
        (
            tl.PreferenceLoss(**given, label_smoothing=0.2),
            -0.8 * log_sigmoid(0.3 * h) - 0.2 * log_sigmoid(-0.3 * h),
        ),
        (tl.PreferenceLoss(**given, kind='ipo'), (h - 1 / 0.6) ** 2),
        (tl.RewardMargin(**given), 0.3 * h),
        (tl.PreferenceAccuracy(length_normalized=normalized), (h > 0).astype(float)),
    ]:
        total, count = measured(metric)
        assert count == 2
        assert total == pytest.approx(wanted.sum(), rel=2e-5)


def test_a_model_that_is_its_reference_has_log_2_and_a_tie():
    same = np.repeat(LOGITS[::2], 2, 0), np.repeat(TARGETS[::2], 2, 0), np.ones_like(WEIGHTS)
    assert measured(tl.PreferenceLoss(), *same) == pytest.approx([3 * math.log(2), 3])
    assert measured(tl.PreferenceAccuracy(), *same) == [1.5, 3]


def test_the_gradient_is_that_of_differences():
    loss = tl.PreferenceLoss(beta=0.5, label_smoothing=0.1)

    def f(logits):
        (values, counts), _ = loss.apply({}, {}, (logits, jnp.asarray(TARGETS), WEIGHTS))
        total, count = loss.sums(values, counts)
        return total / count

    direction = RNG.normal(size=LOGITS.shape).astype(np.float32)
    found = float(jnp.vdot(jax.grad(f)(jnp.asarray(LOGITS)), direction))
    h = [gains(LOGITS.astype(np.float64) + e * direction) for e in (1e-5, -1e-5)]
    up, down = (np.mean(-0.9 * log_sigmoid(0.5 * x) - 0.1 * log_sigmoid(-0.5 * x)) for x in h)
    assert found == pytest.approx((up - down) / 2e-5, rel=1e-3)
    assert not np.asarray(jax.grad(f)(jnp.asarray(LOGITS)))[4:].any()  # a pair that does not count


def test_pieces_give_what_the_whole_gives(key):
    net = tl.Serial(tl.Embedding(V, 4), tl.Dense(V))
    x = jnp.asarray(TOKENS)
    weights, state = net.init((x,), key)
    batch = (x, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
    loss = tl.PreferenceLoss()
    found = [
        loss.sums(*losses.attach(net, loss, chunk_len=n).apply(weights, state, batch)[0])
        for n in (None, 2)
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_what_is_no_batch_of_pairs_is_refused():
    loss = tl.PreferenceLoss()
    for targets in (TOKENS, TARGETS[:, :-1]):
        with pytest.raises(ValueError, match=r'PreferenceLoss takes logits .*preference_batches'):
            measured(loss, targets=targets)
    with pytest.raises(TypeError, match='must be int32, got float32'):
        measured(loss, targets=TARGETS.astype(np.float32))
    with pytest.raises(ValueError, match=r'takes pairs of rows, .* got 5 rows'):
        measured(loss, LOGITS[:5], TARGETS[:5], WEIGHTS[:5])
    with pytest.raises(ValueError, match="kind='ipo' has no label_smoothing"):
        tl.PreferenceLoss(kind='ipo', label_smoothing=0.1)
    with pytest.raises(ValueError, match=r'label_smoothing must be at least 0 and below 0.5'):
        tl.PreferenceLoss(label_smoothing=0.5)
    with pytest.raises(ValueError, match='beta must be above 0'):
        tl.PreferenceLoss(beta=0)
