"""Rounding: near the best scales, and errors made up for as a slow reference does."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb.layers.quantized import fitting, nearest
from layercomb.layers.quantized import rounding as lib
from layercomb.layers.quantized.fitting import Inputs


def problem(seed, rows=5, n=24, samples=200):
    """Weights (R, n), and X Xᵀ of inputs whose features go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, n)) * np.exp(-np.arange(n) / 6)
    x = mixed @ rng.normal(size=(n, samples)) + 0.3 * rng.normal(size=(n, samples))
    return np.float32(rng.normal(size=(rows, n))), np.float32(x @ x.T)


def values(q, scales):
    groups = np.float64(q).reshape(*scales.shape, -1)
    return (groups * np.float64(scales)[..., None]).reshape(q.shape)


def loss(weights, q, scales, gram):
    """|(W − Ŵ) X|² of each row."""
    left = np.float64(weights) - values(q, scales)
    return np.einsum('rn,nm,rm->r', left, np.float64(gram), left)


def known(gram, missing=None):
    return Inputs(jnp.asarray(gram), missing)


def damped(gram):
    gram = np.float64(gram)
    return gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))


def fed_forward(weights, gram, size, bits):
    """Each error is made up for by all later weights, through the inverse of what is left of H."""
    w, h = np.float64(weights).copy(), damped(gram)
    groups = jnp.asarray(weights).reshape(len(w), -1, size)
    scales = np.asarray(nearest.nearest(groups, bits, refined=True)[1]).squeeze(-1)
    q, low, high = np.zeros(w.shape), *((-8, 7) if bits == 4 else (-127, 127))
    order = np.argsort(-np.diag(h), kind='stable')  # the largest inputs first
    for at, i in enumerate(order):
        scale, left = scales[:, i // size], order[at:]
        q[:, i] = np.clip(np.round(w[:, i] / scale), low, high)
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        error = (w[:, i] - q[:, i] * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return q, scales


@pytest.mark.parametrize('bits', [4, 8])
def test_errors_are_fed_forward_as_by_the_inverse_of_what_is_left(bits, monkeypatch):
    monkeypatch.setattr(fitting, '_SWEEPS', 0)
    weights, gram = problem(0)
    q, scales = lib.integers(jnp.asarray(weights), bits, 6, known(gram))
    wanted, wanted_scales = fed_forward(weights, gram, 6, bits)
    assert q.dtype == jnp.int8 and scales.shape == (5, 4)
    q = np.asarray(q)
    np.testing.assert_allclose(scales, wanted_scales, rtol=1e-3)
    assert (np.abs(q - wanted) <= 1).all() and (q == wanted).mean() > 0.9  # ties of float32


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([4, 8, 24]))
def test_no_sweep_makes_a_row_worse(seed, bits, size):
    weights, gram = problem(seed)
    shared = fitting._problem(jnp.asarray(gram), size, bits)
    groups = jnp.asarray(weights).reshape(5, -1, size)
    q, scales = nearest.nearest(groups, bits)
    made = q.astype(jnp.float32).reshape(5, -1).T, scales.squeeze(-1).T

    def lost():
        return loss(weights, np.asarray(made[0]).T, np.asarray(made[1]).T, damped(gram))

    before = lost()
    for _ in range(3):
        made = fitting._descended(shared, jnp.asarray(weights).T, *made)
        after = lost()
        assert (after <= before * (1 + 1e-4) + 1e-4).all()
        before = after
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    assert made[0].min() >= low and made[0].max() <= high
    np.testing.assert_array_equal(made[0], np.round(made[0]))


@pytest.mark.parametrize('bits', [4, 8])
def test_for_inputs_products_are_nearer(bits):
    weights, gram = problem(1, rows=64, n=64, samples=500)
    by_weights = loss(weights, *lib.integers(jnp.asarray(weights), bits, 16), gram)
    made = lib.integers(jnp.asarray(weights), bits, 16, known(gram))
    assert loss(weights, *made, gram).sum() < 0.4 * by_weights.sum()


def test_rows_make_up_for_what_is_missing_in_their_inputs():
    """By hand: of all matrices, one has the products nearest to those wanted; that is rounded."""
    rng = np.random.default_rng(5)
    weights, _ = problem(5, rows=32, n=32)
    before = rng.normal(size=(32, 500))
    after = before + 0.3 * before[rng.permutation(32)]
    gram, missing = np.float32(after @ after.T), np.float32(after @ (before - after).T)
    wanted = np.float64(weights) @ before

    def far(inputs):
        return np.square(
            wanted - values(*lib.integers(jnp.asarray(weights), 4, 16, inputs)) @ after
        )

    aware = far(known(gram, jnp.asarray(missing))).sum()
    assert aware < 0.3 * far(known(gram)).sum()
    best = np.linalg.solve(
        np.float64(gram) + 0.1 * np.trace(gram) / 32 * np.eye(32), np.float64(missing)
    )
    moved = np.float32(weights + weights @ best.T)
    by_hand = lib.integers(jnp.asarray(moved), 4, 16, known(gram))
    np.testing.assert_allclose(np.square(wanted - values(*by_hand) @ after).sum(), aware, rtol=0.02)


def test_uncorrelated_inputs_leave_little_to_make_up_for():
    weights, _ = problem(2)
    eye = np.eye(24, dtype=np.float32)
    by_weights = loss(weights, *lib.integers(jnp.asarray(weights), 4, 6), eye)
    made = lib.integers(jnp.asarray(weights), 4, 6, known(eye))
    assert (loss(weights, *made, eye) <= by_weights * (1 + 1e-5)).all()


def test_rows_are_rounded_alike_alone_and_among_many(monkeypatch):
    weights, gram = map(jnp.asarray, problem(3, rows=7))
    q, scales = lib.integers(weights, 4, 8, known(gram))
    monkeypatch.setattr(fitting, '_TOGETHER', 3)
    again = lib.integers(weights.reshape(7, 1, 24), 4, 8, known(gram))
    assert again[0].shape == (7, 1, 24) and again[1].shape == (7, 1, 3)
    same = (again[0][:, 0] == q).all(-1)
    assert same.sum() >= 4  # a tie of float32 goes on to all weights after it in its row
    np.testing.assert_allclose(again[1][:, 0][same], scales[same], rtol=1e-3)


def test_inputs_of_zeros_and_weights_of_zeros():
    weights, gram = map(jnp.asarray, problem(4))
    q, scales = lib.integers(weights, 4, 6, known(jnp.zeros_like(gram)))
    assert loss(weights, q, scales, np.eye(24)).sum() < 0.02 * np.square(weights).sum()
    q, scales = lib.integers(weights * 0.0, 4, 6, known(gram))
    assert (values(q, scales) == 0).all() and np.isfinite(scales).all()
    some = weights.at[:, 6:12].set(0.0)
    dead = gram.at[3].set(0).at[:, 3].set(0)  # a feature that is always 0
    assert np.isfinite(values(*lib.integers(some, 4, 6, known(dead)))).all()


def test_scales_are_nearly_the_best():
    """Of all scales on a fine grid, none is much better than the one that was found."""
    groups = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    _, plain = nearest.nearest(jnp.asarray(groups), 4)
    _, scales = nearest.nearest(jnp.asarray(groups), 4, refined=True)

    def errors(scales):
        q = np.clip(np.round(groups / scales), -8, 7)
        return np.square(q * scales - groups).sum(-1)

    best = np.inf
    for parts in np.linspace(5, 14, 400):
        for sign in (-1, 1):
            scale = sign * np.abs(groups).max(-1, keepdims=True) / parts
            best = np.minimum(best, errors(scale))
    assert errors(np.asarray(scales)).sum() <= 1.02 * best.sum()
    assert (errors(np.asarray(scales)) <= errors(np.asarray(plain)) * (1 + 1e-5)).all()
