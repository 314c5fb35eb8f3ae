"""Panels: the same weights as rows, and the same products, rows and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layercomb_kernels
from layercomb.layers.quantized import panels
from layercomb.layers.quantized.matrix import Narrow, in_panels
from layercomb.layers.quantized.rounding import narrow

CASES = [
    ('io', (64, 50)),
    ('ioo', (64, 3, 16)),
    ('iio', (4, 16, 7)),
    ('oi', (37, 64)),
]


def both(axes, shape, bits):
    """A matrix as rows, and in panels."""
    wide = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    values, scales = narrow(wide, axes, bits, 16)
    made = Narrow(*in_panels(values, scales, axes.count('o'), bits), axes, bits)
    assert made.in_panels
    return Narrow(values, scales, axes, bits), made


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([8, 4]),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_panels_and_rows_are_inverse(bits, rows, groups, layers, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (layers, rows, 2, 16 * groups)).astype(np.uint8)
    values = values.view(np.int8) if bits == 8 else values
    scales = rng.normal(size=(layers, rows, 2, groups)).astype(np.float32)
    words, laid = panels.of_rows(values, scales, 2)
    assert words.dtype == np.uint32 and laid.shape == scales.shape
    assert words.nbytes == values.nbytes
    for x, y in zip(panels.as_rows(words, laid, 2, bits), (values, scales), strict=True):
        np.testing.assert_array_equal(x, y)
    by_jax = panels.of_rows(jnp.asarray(values), jnp.asarray(scales), 2)
    np.testing.assert_array_equal(by_jax[0], words)
    np.testing.assert_array_equal(by_jax[1], laid)


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(('axes', 'shape'), CASES)
def test_they_are_the_same_matrix(axes, shape, bits):
    rows, made = both(axes, shape, bits)
    assert made.shape == rows.shape
    np.testing.assert_array_equal(made.wide(), rows.wide())
    i = [n for n, axis in zip(shape, axes, strict=True) if axis == 'i']
    for m in (1, 3, 70):
        x = jnp.asarray(np.random.default_rng(m).normal(size=(m, *i)), jnp.float32)
        with layercomb_kernels.off():
            exact = rows.product(x)
            np.testing.assert_allclose(made.product(x), exact, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(jax.jit(Narrow.product)(made, x), exact, atol=1.5e-3)
        less = dataclasses.replace(made, activation_bits=8).product(x)
        assert jnp.linalg.norm(less - exact) < 0.015 * jnp.linalg.norm(exact)
        gradients = (
            jax.grad(lambda x, w=w, ct=exact: (w.product(x) * ct).sum())(x) for w in (rows, made)
        )
        np.testing.assert_allclose(*gradients, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize('bits', [8, 4])
def test_rows_of_a_table_in_panels(bits):
    rows, made = both('oi', (37, 64), bits)
    at = jnp.asarray([[0, 15, 16], [31, 32, 36]])
    np.testing.assert_array_equal(made.take(at), rows.take(at))
    assert jnp.isnan(made.take(jnp.asarray([37, -1]))).all()
    for dtype in ('uint8', 'int8', 'uint16', 'int16', 'uint32'):  # which hold no index of the table
        np.testing.assert_array_equal(made.take(at.astype(dtype)), rows.take(at))
    x = jnp.ones((2, 64))
    np.testing.assert_allclose(
        made.gathered_product(x, at), rows.gathered_product(x, at), atol=1e-3
    )


def test_what_is_no_whole_number_of_words_stays_rows():
    for bits, columns, group in ((8, 30, 15), (4, 24, 12), (4, 16, 4), (16, 64, 64)):
        assert not panels.fit(columns, group, bits)
    wide = jnp.ones((30, 8))
    values, scales = narrow(wide, 'io', 8, 15)
    assert in_panels(values, scales, 1, 8)[0] is values


@pytest.mark.parametrize('bits', [8, 4])
def test_minima_make_weights_that_are_not_symmetric_nearer(bits):
    wide = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (64, 40)), jnp.float32)
    values, scales = narrow(wide, 'io', bits, 16, True)
    rows = Narrow(values, scales, 'io', bits, minima=True)
    made = Narrow(*in_panels(values, scales, 1, bits, True), 'io', bits, minima=True)
    assert made.in_panels and scales.shape == (40, 8)
    np.testing.assert_array_equal(made.wide(), rows.wide())
    steps = (2**bits - 1) * 2
    assert jnp.abs(rows.wide() - wide).max() <= 1.0001 / steps
    for m in (1, 40):
        x = jnp.asarray(np.random.default_rng(m).normal(size=(m, 64)), jnp.float32)
        np.testing.assert_allclose(made.product(x), x @ rows.wide(), atol=2e-3)
        np.testing.assert_allclose(rows.product(x), x @ rows.wide(), atol=2e-3)
    zeros = narrow(jnp.zeros((64, 16)), 'io', bits, 16, True)
    assert (Narrow(*zeros, 'io', bits, minima=True).wide() == 0).all()
