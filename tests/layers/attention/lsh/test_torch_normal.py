"""The normal numbers of torch, beside those recorded from torch 2.13 (see make_reformer.py)."""

from pathlib import Path

import numpy as np
import pytest

from layercomb.layers.attention.lsh.torch_normal import torch_normal

RECORDED = Path(__file__).parents[3] / 'data' / 'pretrained' / 'reformer' / 'expected.npz'


@pytest.mark.parametrize(
    ('seed', 'n'), [(0, 1), (1, 15), (0, 16), (3, 20), (2**33 + 5, 40), (-1, 17)]
)
def test_numbers_are_those_of_torch(seed, n):
    """Fewer than a block of 16, a block, and a last block that is not whole; any seed."""
    with np.load(RECORDED) as file:
        recorded = file[f'normal {seed} {n}']
    made = torch_normal(seed, (n,))
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, recorded, rtol=1e-6, atol=1e-6)


def test_a_shape_is_filled_in_order():
    np.testing.assert_array_equal(torch_normal(3, (4, 5)).reshape(-1), torch_normal(3, (20,)))
