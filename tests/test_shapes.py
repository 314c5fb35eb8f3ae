"""Signatures of values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb.shapes import check_float, describe, is_float, shape_dtype, signature_of


def test_shape_dtype():
    assert shape_dtype([2, 3]) == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert shape_dtype((), 'bfloat16').dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ('values', 'text'),
    [
        (jnp.zeros((2, 3)), 'float32[2,3]'),
        (np.zeros(2, np.int8), 'int8[2]'),
        ((jnp.zeros(2), shape_dtype((3,), bool)), 'float32[2], bool[3]'),
        ([jnp.zeros(2)], 'float32[2]'),
        ((), ''),
        (3, 'int32[]'),
        (([1, 2, 3],), 'int32[3]'),
        ([1.5], 'float32[]'),
    ],
)
def test_signature_of_values(values, text):
    assert describe(signature_of(values)) == text


def test_what_is_no_array_is_described_by_its_type():
    assert describe([np.zeros(2, np.int8), None, 3.0]) == 'int8[2], NoneType, float'


@pytest.mark.parametrize('value', ['text', None, object(), {'a': 1}])
def test_what_has_no_shape_is_refused(value):
    with pytest.raises(
        TypeError, match=r'made of arrays .*, got .*: pass e.g. lc.shape_dtype\(\(ba'
    ):
        signature_of(value)


def test_floats():
    assert is_float(shape_dtype((2,), 'float16')) and not is_float(np.zeros(2, np.int8))
    assert check_float('Dense', jnp.zeros(3)) is None
    for wrong in (jnp.zeros(()), jnp.zeros(3, bool)):
        with pytest.raises(TypeError, match='Dense takes floating-point vectors along the last'):
            check_float('Dense', wrong)
