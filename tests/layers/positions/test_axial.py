"""Axial positions beside coordinates written out, in pieces, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, shape_dtype, tl
from layercomb.layers.core.mode import Mode


@pytest.mark.parametrize('shape', [(3, 5), (2, 4, 3)])
def test_each_position_gets_the_rows_of_its_coordinates(shape):
    layer = tl.AxialPositions(shape)
    length = 11
    signature = (shape_dtype((2, length, 8)),)
    weights, _ = layer.init(signature, jax.random.key(0))
    x = jnp.zeros((2, length, 8))
    (y,), _ = layer.apply(weights, {}, (x,))
    for t in range(length):
        places = np.unravel_index(t, shape)
        expected = jnp.concatenate([weights[f'table_{a}'][i] for a, i in enumerate(places)])
        np.testing.assert_array_equal(y[1, t], expected)
    state = init_state(layer, signature, Mode.PREDICT)
    for piece in (slice(0, 4), slice(4, 5), slice(5, 11)):
        (got,), state = layer.apply(weights, state, (x[:, piece],), mode=Mode.PREDICT)
        np.testing.assert_array_equal(got, y[:, piece])


def test_depths_are_as_said():
    layer = tl.AxialPositions((3, 5), (2, 6))
    weights, _ = layer.init((shape_dtype((1, 15, 8)),), jax.random.key(0))
    assert weights['table_0'].shape == (3, 2) and weights['table_1'].shape == (5, 6)


def test_errors():
    with pytest.raises(ValueError, match=r'shape=\(15,\) must be two positive numbers'):
        tl.AxialPositions((15,))
    with pytest.raises(ValueError, match=r'needs a positive depth for each axis, got depths=\(8'):
        tl.AxialPositions((3, 5), (8,))
    with pytest.raises(ValueError, match='add up to 7, the input is 8 wide'):
        tl.AxialPositions((3, 5), (3, 4)).init((shape_dtype((1, 15, 8)),), jax.random.key(0))
    with pytest.raises(ValueError, match=r'16.*15'):
        tl.AxialPositions((3, 5)).init((shape_dtype((1, 16, 8)),), jax.random.key(0))
