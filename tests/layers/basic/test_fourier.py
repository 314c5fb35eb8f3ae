"""`FourierMixing` against sums of cosines, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl


def slow(x):
    """Re F_L F_D x as sums, (B, L, D)."""
    _, length, width = x.shape
    positions, features = np.arange(length), np.arange(width)
    turns = (
        positions[:, None, None, None] * positions[None, None, :, None] / length
        + features[None, :, None, None] * features[None, None, None, :] / width
    )  # (L, D, L, D)
    return np.einsum('ldmn,bmn->bld', np.cos(2 * np.pi * turns), x)


@pytest.mark.parametrize('shape', [(2, 5, 6), (1, 1, 4), (1, 8, 1)])
def test_it_is_a_sum_of_cosines(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (y,), _ = tl.FourierMixing().apply({}, {}, (x,))
    np.testing.assert_allclose(y, slow(x), atol=1e-4)


def test_its_gradient_is_that_of_the_sum():
    rng = np.random.default_rng(1)
    x, ct = rng.normal(size=(2, 1, 5, 6)).astype(np.float32)
    _, pull = jax.vjp(lambda x: tl.FourierMixing().apply({}, {}, (x,))[0][0], x)
    np.testing.assert_allclose(pull(ct)[0], slow(ct), atol=1e-4)


def test_it_keeps_the_dtype_and_computes_in_float32():
    x = jnp.ones((1, 300, 4), jnp.bfloat16)
    (y,), _ = tl.FourierMixing().apply({}, {}, (x,))
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0]) == 1200


def test_what_is_no_sequence_of_floats_is_refused():
    with pytest.raises(ValueError, match='FourierMixing'):
        tl.FourierMixing().apply({}, {}, (jnp.ones((3, 4)),))
    with pytest.raises((TypeError, ValueError), match='FourierMixing'):
        tl.FourierMixing().apply({}, {}, (jnp.ones((1, 3, 4), jnp.int32),))
