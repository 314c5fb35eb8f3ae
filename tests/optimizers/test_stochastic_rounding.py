"""Rounding by chance has the right mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.optimizers.rounding import to_bfloat16, tree_to_bfloat16


def key(seed=0):
    return jax.random.key(seed)


def test_numbers_go_to_one_of_their_neighbours_with_the_right_mean():
    x = jnp.array([1.001, -1.001, 3e-30, 1234.5, 0.0])
    many = jnp.tile(x, (20_000, 1))
    rounded = to_bfloat16(many, key())
    assert rounded.dtype == jnp.bfloat16
    found = np.asarray(rounded.astype(jnp.float32))
    spacing = np.abs(np.asarray(x)) / 128  # at most
    assert (np.abs(found - np.asarray(x)) <= spacing).all()
    assert [len(np.unique(column)) for column in found.T] == [2, 2, 2, 2, 1]
    np.testing.assert_array_less(np.abs(found.mean(0) - np.asarray(x)), spacing / 50 + 1e-37)


def test_what_bfloat16_holds_and_what_is_not_finite_stay():
    x = jnp.array([1.0, -0.5, 0.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    rounded = to_bfloat16(x, key()).astype(jnp.float32)
    np.testing.assert_array_equal(rounded, x)


def testchances_are_of_the_key_the_place_and_the_leaf():
    x = jnp.full((64, 64), 1 + 1 / 256)
    again, other = to_bfloat16(x, key()), to_bfloat16(x, key(1))
    np.testing.assert_array_equal(to_bfloat16(x, key()), again)
    up = [np.asarray(r > 1).astype(float).reshape(-1) for r in (again, other)]
    made = tree_to_bfloat16({'a': x, 'b': x, 'n': jnp.int32(3)}, key())
    up += [np.asarray(made[name] > 1).astype(float).reshape(-1) for name in 'ab']
    assert np.abs(np.corrcoef(up) - np.eye(4)).max() < 0.06
    rows = up[0].reshape(64, 64)
    assert abs(np.corrcoef(rows[:, 1:].reshape(-1), rows[:, :-1].reshape(-1))[0, 1]) < 0.06
    assert made['n'].dtype == jnp.int32


def test_a_running_mean_moves_where_rounding_to_the_nearest_stands_still():
    """A mean of squares whose β is 0.999 falls by a thousandth a step, less than bfloat16 has."""

    def run(rounding):
        def step(v, i):
            return rounding(0.999 * v.astype(jnp.float32), jax.random.fold_in(key(), i)), None

        first = jnp.ones(1000, jnp.bfloat16)
        return jax.lax.scan(step, first, jnp.arange(700, dtype=jnp.int32))[0]

    assert (run(lambda x, _: x.astype(jnp.bfloat16)) == 1).all()
    np.testing.assert_allclose(run(to_bfloat16).astype(jnp.float32).mean(), 0.999**700, rtol=0.01)
