"""Narrow matrices: exact packing, bounded errors, and products equal to those of wide ones."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layercomb_kernels
from layercomb.layers.quantized import matrix as lib
from layercomb.layers.quantized import native, pieces, rounding
from layercomb.layers.quantized.matrix import Narrow

# A kernel multiplies integers by activations of 16 bits: 2e-5 of products, which are up to 15 here.
ROUNDED = 5e-4
CASES = [
    ('io', (24, 10)),
    ('io', (24, 9)),
    ('ioo', (24, 2, 5)),
    ('iio', (2, 12, 7)),
    ('oi', (10, 24)),
]


@pytest.fixture(params=['kernels', 'plain'])
def way(request):
    """With kernels, where they can be had, and without."""
    if request.param == 'plain':
        with layercomb_kernels.off():
            yield
    elif layercomb_kernels.available():
        yield
    else:
        pytest.skip('no kernels here')


def weights(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def made(axes, shape, bits, group_size=8):
    wide = weights(shape)
    return wide, Narrow(*rounding.narrow(wide, axes, bits, group_size), axes, bits)


def joined(axes, shape):
    """The shape with one axis that groups run along."""
    n_i = axes.count('i')
    return shape if axes == 'oi' else (math.prod(shape[:n_i]), *shape[n_i:])


def matrix(x, axes):
    """A matrix with what groups run along first: (D, F)."""
    return x.T if axes == 'oi' else x.reshape(len(x), -1)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_packing_is_exact(n, rows, seed):
    q = np.random.default_rng(seed).integers(-8, 8, (rows, 2 * n)).astype(np.int8)
    packed = rounding._pack(jnp.asarray(q))
    assert packed.shape == (rows, n) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(lib._integers(packed, 4), q)


@pytest.mark.parametrize(('axes', 'shape'), CASES)
def test_int8_is_off_by_half_a_scale_at_most(axes, shape):
    wide, narrow = made(axes, shape, 8)
    assert narrow.values.dtype == jnp.int8 and narrow.shape == joined(axes, shape)
    error = jnp.abs(wide.reshape(narrow.shape) - narrow.wide())
    error = matrix(error, axes).T.reshape(-1, 3, 8)  # (F, G, g)
    assert (error <= narrow.scales.reshape(-1, 3, 1) * (0.5 + 1e-5)).all()


@pytest.mark.parametrize(('axes', 'shape'), CASES)
def test_int4_and_bfloat16_are_near(axes, shape):
    wide, narrow = made(axes, shape, 4, 6)
    wide = wide.reshape(joined(axes, shape))
    error = jnp.linalg.norm(wide - narrow.wide()) / jnp.linalg.norm(wide)
    assert narrow.shape == wide.shape and narrow.values.dtype == jnp.uint8 and error < 0.1
    _, narrow = made(axes, shape, 16)
    assert narrow.scales is None
    np.testing.assert_array_equal(narrow.wide(), wide.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_group_of_zeros_stays_one():
    for bits in (4, 8):
        narrow = Narrow(*rounding.narrow(jnp.zeros((8, 4)), 'io', bits, 8), 'io', bits)
        assert (narrow.wide() == 0).all()


@pytest.mark.parametrize('bits', [4, 8, 16])
@pytest.mark.parametrize(('axes', 'shape'), CASES)
def test_products_are_those_of_the_wide_matrix(axes, shape, bits, way, n=3):
    _, narrow = made(axes, shape, bits)
    i = tuple(k for k, axis in zip(shape, axes, strict=True) if axis == 'i')
    o = tuple(k for k, axis in zip(shape, axes, strict=True) if axis == 'o')
    x = weights((2, n, *i))
    y = jax.jit(Narrow.product)(narrow, x)
    wanted = x.reshape(2, n, -1) @ matrix(narrow.wide(), axes)
    np.testing.assert_allclose(y, wanted.reshape(2, n, *o), rtol=1e-5, atol=ROUNDED)
    assert narrow.product(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert narrow.product(x.astype(jnp.bfloat16), jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(('axes', 'shape'), CASES[1:])
def test_products_of_many_rows(axes, shape):
    test_products_are_those_of_the_wide_matrix(axes, shape, 4, None, n=native.FEW)


@pytest.mark.parametrize('bits', [4, 8, 16])
def test_rows_of_a_table(bits, way):
    _, table = made('oi', (10, 24), bits)
    wide = table.wide()
    at = jnp.asarray([[3, 9, 3], [0, 1, 9]])
    np.testing.assert_array_equal(table.take(at), wide[at])
    assert jnp.isnan(table.take(jnp.asarray([10]))).all()
    x, h = weights((2, 24)), weights((2, 3))
    y = jax.jit(Narrow.gathered_product)(table, x, at)
    np.testing.assert_allclose(y, jnp.einsum('md,mkd->mk', x, wide[at]), atol=ROUNDED)
    y = jax.jit(Narrow.gathered_sum)(table, h, at)
    np.testing.assert_allclose(y, jnp.einsum('mk,mkd->md', h, wide[at]), rtol=1e-5, atol=1e-5)


def test_gradients_loops_branches_and_vmap(way):
    _, narrow = made('io', (24, 24), 8)
    wide = narrow.wide()
    x = weights((3, 24))

    def loop(multiply):
        def body(_, x):
            return jax.lax.cond(x.sum() > 1e9, jnp.sin, lambda x: jnp.tanh(multiply(x)), x)

        return lambda x: jax.lax.fori_loop(0, 3, body, x)

    got = jax.jit(loop(narrow.product))(x)
    np.testing.assert_allclose(got, loop(lambda x: x @ wide)(x), atol=ROUNDED)
    got = jax.grad(lambda x: jnp.sin(narrow.product(x)).sum())(x)
    wanted = jax.grad(lambda x: jnp.sin(x @ wide).sum())(x)
    np.testing.assert_allclose(got, wanted, atol=ROUNDED)
    got = jax.vmap(narrow.product)(x)
    np.testing.assert_allclose(got, x @ wide, atol=ROUNDED)


@pytest.mark.parametrize(('axes', 'shape'), CASES[1:4])
@pytest.mark.parametrize('limit', [1, 24 * 4, 24 * 100])
def test_pieces_give_the_product_and_the_gradient_of_the_whole(axes, shape, limit, monkeypatch):
    """One row at a time, four of nine and a rest, and all at once."""
    monkeypatch.setattr(pieces, 'ON_CPU', limit)
    _, narrow = made(axes, shape, 4)
    wide = matrix(narrow.wide(), axes)
    i = shape[: axes.count('i')]
    x = weights((native.FEW + 1, *i))

    def loss(product, x):
        return jnp.sin(product(x)).sum()

    got = jax.jit(jax.value_and_grad(lambda x: loss(narrow.product, x)))(x)
    wanted = jax.value_and_grad(lambda x: loss(lambda x: x.reshape(len(x), -1) @ wide, x))(x)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-4)
    d = jax.grad(lambda x: loss(narrow.product, x).astype(jnp.float32))(x.astype(jnp.bfloat16))
    assert d.dtype == jnp.bfloat16


def test_a_program_for_elsewhere_calls_no_kernel():
    _, narrow = made('io', (24, 24), 8)
    run = jax.jit(Narrow.product)
    x = weights((1, 24))
    text = run.trace(narrow, x).lower(lowering_platforms=('cuda',)).as_text()
    assert 'layercomb' not in text
    if layercomb_kernels.available():
        assert 'layercomb_row_products' in run.lower(narrow, x).as_text()
    with layercomb_kernels.off():
        assert 'layercomb' not in run.lower(narrow, x).as_text()


def test_groups_divide_what_they_run_along():
    assert [rounding.group_of(n, 64) for n in (768, 96, 100, 257, 3)] == [64, 48, 50, 257, 3]
    _, narrow = made('io', (26, 4), 8, 8)
    assert narrow.scales.shape == (4, 2)
    assert rounding.can_narrow((10, 24), 'oi', 4) and not rounding.can_narrow((10, 25), 'oi', 4)
    assert rounding.can_narrow((24, 9), 'io', 4) and not rounding.can_narrow((3, 5, 2), 'iio', 4)


def test_where_kernels_are_of_no_use_xla_multiplies(monkeypatch):
    if not layercomb_kernels.available():
        pytest.skip('no kernels here')
    x = jnp.ones((1, 4))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert native.has_kernels(1, x) and native.has_kernels(32, x)
    for n_rows, array in ((33, x), (0, x), (1, x[:0]), (1, x.astype(jnp.bfloat16))):
        assert not native.has_kernels(n_rows, array)
    monkeypatch.setattr(jax, 'device_count', lambda: 2)  # they would be given whole arrays
    assert not native.has_kernels(1, x)
