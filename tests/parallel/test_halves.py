"""Weights in halves come back bit for bit, and their first halves are bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb.parallel import halves


def numbers():
    """All kinds of bits, those of infinities and of what is none included."""
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 128), np.uint32)
    bits[0, :8] = 0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F7FFFFF, 0x8000
    bits[1, :3] = 0x7FFFFFFF, 0x7FFF8000, 0x7F800001  # of what is no number
    return bits.view(np.float32)


@pytest.mark.parametrize('there', ['numpy', 'jax', 'jit'])
def test_halves_come_back_bit_for_bit(there):
    x = numbers()
    given = {
        'empty': {},
        'a': {'kernel': x if there == 'numpy' else jnp.asarray(x), 'none': None, 'bias': x},
    }

    def cut(tree):
        return halves.split(tree, ('a/kernel', 'a/none', 'b/other'))

    back = halves.joined
    if there == 'jit':
        cut, back = jax.jit(cut), jax.jit(back)
    made = cut(given)
    assert halves.halved(made) == ['a/kernel', 'a/none']
    assert made['a']['kernel'].dtype == jnp.bfloat16
    assert made['a']['kernel' + halves.LOW].shape == (64, 64)
    whole = back(made)
    assert jax.tree.structure(whole) == jax.tree.structure(given)
    found, is_number = np.asarray(whole['a']['kernel']), ~np.isnan(x)
    np.testing.assert_array_equal(found.view(np.uint32)[is_number], x.view(np.uint32)[is_number])
    assert np.isnan(found[~is_number]).all()
    assert np.isnan(np.float32(halves.first(made)['a']['kernel'])[~is_number]).all()


def test_first_halves_are_the_nearest():
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    made = halves.split({'kernel': x, 'bias': x}, ('kernel',))
    found = halves.widened(halves.first(made), made)
    assert found.keys() == {'kernel', 'bias'}
    np.testing.assert_array_equal(found['kernel'], np.float32(jnp.asarray(x, jnp.bfloat16)))
    np.testing.assert_array_equal(found['bias'], x)


def test_what_has_no_halves():
    struct = jax.ShapeDtypeStruct
    assert halves.is_halved(struct((3, 4), jnp.float32))
    for x in (struct((4, 3), jnp.float32), struct((), jnp.float32), struct((4, 4), jnp.int32)):
        assert not halves.is_halved(x)
