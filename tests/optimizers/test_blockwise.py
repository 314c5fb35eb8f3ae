"""One byte a number: beside a slow search through the code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb.optimizers import blockwise


def places(tops):
    """The values of g at some places, by its definition, in float64."""
    t = np.asarray(tops, np.float64)
    i = np.floor(np.log2(t))
    return 10.0 ** (i - 7) * (1 + 9 * (t / 2**i - 1))


SIGNED = np.concatenate([-places(np.arange(127, 0, -1)), [0.0], places(np.arange(1, 128))])
UNSIGNED = np.concatenate([[0.0], places(np.arange(1, 128.25, 0.5))])


def slow(block):
    """What a block is rounded to, by a search for the nearest value of the code."""
    largest = np.abs(block).max()
    if not largest:
        return block
    if (block < 0).any():
        code = SIGNED * largest / SIGNED[-1]
        return code[np.abs(block[:, None] - code).argmin(1)]
    code = UNSIGNED * largest
    near = code[np.abs(block[:, None] - code).argmin(1)]
    return np.where((near == 0) & (block > 0), code[1], near)


def numbers(shape, seed=0):
    """Numbers of many sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 0, shape)).astype(np.float32)


def test_the_codes_have_256_values_and_grow():
    assert len(SIGNED) == 255 and len(UNSIGNED) == 256
    assert (np.diff(SIGNED) > 0).all() and (np.diff(UNSIGNED) > 0).all()
    assert UNSIGNED[1] == 1e-7 and UNSIGNED[-1] == 1


@pytest.mark.parametrize('kind', ['signed', 'positive', 'mixed', 'zeros'])
def test_each_number_becomes_the_nearest_of_its_block(kind):
    x = numbers((3, 512))
    x = {'signed': x, 'positive': x**2, 'mixed': np.where(x > 0, x, 0), 'zeros': 0 * x}[kind]
    x[1, 256:] = np.abs(x[1, 256:])
    made = blockwise.narrow(jnp.asarray(x))
    assert made.codes.shape == x.shape and made.codes.dtype == jnp.uint8
    assert made.scales.shape == (3, 2)
    wanted = np.concatenate([slow(b.astype(np.float64)) for b in x.reshape(-1, 256)])
    got = np.asarray(blockwise.wide(made)).reshape(-1)
    scale = np.repeat(np.abs(x).reshape(-1, 256).max(1), 256)
    # A number half-way between two values may become either.
    off = np.abs(got - x.reshape(-1)) - np.abs(wanted - x.reshape(-1))
    assert (off <= 1e-6 * scale).all()
    np.testing.assert_array_equal(got == 0, wanted == 0)


def test_a_mean_of_squares_never_becomes_0_and_small_ones_keep_their_size():
    squares = jnp.geomspace(1e-6, 1, 256)
    again = blockwise.wide(blockwise.narrow(squares))
    off = np.abs(again / squares - 1)
    assert off.max() < 0.6 and off[squares > 1e-3].max() < 0.3 and off[squares > 0.1].max() < 0.04
    least = blockwise.wide(blockwise.narrow(jnp.array([1e-20, 1.0])))
    np.testing.assert_allclose(least, [1e-7, 1], rtol=1e-5)


def test_a_mean_of_squares_is_rounded_by_chance_with_the_right_mean():
    squares = jnp.abs(jnp.asarray(numbers((1, 64)))).at[0, 0].set(1.0)
    many = jnp.tile(squares, (20_000, 1))
    again = np.asarray(blockwise.wide(blockwise.narrow(many, jax.random.key(0))), np.float64)
    off = again.mean(0) - np.asarray(squares[0])
    assert (np.abs(off) <= 5 * again.std(0) / 20_000**0.5 + 1e-6 * again.mean(0) + 1e-7).all()
    assert (again[:, 0] == again[0, 0]).all()  # the largest one stays
    both = many.at[:, 1].set(-0.5)
    nearest = np.asarray(blockwise.wide(blockwise.narrow(both, jax.random.key(0))))
    assert (nearest == nearest[0]).all()


def test_a_mean_of_squares_falls_when_gradients_do():
    def root(by_chance):
        def step(bytes_, i):
            key = jax.random.fold_in(jax.random.key(0), i) if by_chance else None
            squares = jnp.where((jnp.arange(256) % 2 == 0) & (i >= 300), 0.0, 1.0)
            return blockwise.narrow(0.99 * blockwise.wide(bytes_) + 0.01 * squares[None], key), None

        begin = blockwise.narrow(jnp.ones((1, 256)))
        end, _ = jax.lax.scan(step, begin, jnp.arange(600, dtype=jnp.int32))
        return np.asarray(blockwise.wide(end))[0, ::2].mean()

    assert root(by_chance=False) > 0.3
    assert root(by_chance=True) == pytest.approx(0.99**300, rel=0.1)


@pytest.mark.parametrize('width', [1, 255, 256, 257, 300, 1000])
def test_blocks_are_along_the_last_axis_alone(width):
    x = numbers((4, 3, width)) * np.geomspace(1e-12, 1, 12, dtype=np.float32).reshape(4, 3, 1)
    together = blockwise.wide(blockwise.narrow(jnp.asarray(x)))
    one_by_one = [
        blockwise.wide(blockwise.narrow(jnp.asarray(row))) for row in x.reshape(-1, width)
    ]
    np.testing.assert_allclose(together.reshape(-1, width), np.stack(one_by_one), rtol=1e-5)
    assert blockwise.narrow(jnp.asarray(x)).scales.shape == (4, 3, -(-width // 256))


def test_the_largest_number_stays_and_rounding_again_changes_nothing():
    x = jnp.asarray(numbers((8, 256)))
    once = blockwise.wide(blockwise.narrow(x))
    np.testing.assert_allclose(jnp.abs(once).max(1), jnp.abs(x).max(1), rtol=1e-5)
    twice = blockwise.wide(blockwise.narrow(once))
    np.testing.assert_allclose(twice, once, rtol=1e-4)


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
def test_what_is_not_finite_is_seen(wrong):
    x = jnp.asarray(numbers((2, 64))).at[0, 3].set(wrong)
    again = blockwise.wide(blockwise.narrow(x))
    assert not jnp.isfinite(again[0]).all() and jnp.isfinite(again[1]).all()


def test_it_is_the_same_compiled():
    x = jnp.asarray(numbers((8, 256)))
    plain, compiled = blockwise.narrow(x), jax.jit(blockwise.narrow)(x)
    differ = np.asarray(plain.codes, int) - np.asarray(compiled.codes, int)
    assert np.abs(differ).max() <= 1 and (differ != 0).mean() < 1e-2
