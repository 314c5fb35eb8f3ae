"""The axes of decoding states: rows are set, moved and kept in blocks, whatever a layer keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl
from layercomb.errors import UsageError
from layercomb.layers.decoding.seek import Seekable
from layercomb.supervised.decoding.axes import BLOCK, begun

V = 16
NET = models.TransformerLM(V, 8, 8, 2, 2, 256, attention=tl.LocalSelfAttention(2, 4))


@pytest.fixture(scope='module')
def axes():
    return begun(*unstacked(NET))


def unstacked(net):
    model = lc.Model(net).init(lc.shape_dtype((1, 4), 'int32'))
    return lc.unstack(net, model.weights)[0], {}


def filled(axes, leaves, seed):
    """Leaves of the same shapes, each place with a number of its own."""
    drawn = np.random.default_rng(seed)
    return [jnp.asarray(drawn.integers(0, 99, x.shape).astype(x.dtype)) for x in leaves]


def test_each_leaf_has_its_axes(axes):
    found, fresh = axes
    shapes = {x.shape: leaf for leaf, x in zip(found.leaves, fresh, strict=True)}
    kv = shapes[(2, 4 + BLOCK + 7, 4)]  # heads · rows, places before and after, depth
    assert (kv.row, kv.width, kv.length, kv.beyond) == (0, 2, 1, 11)
    mask, position = shapes[(1, 4 + BLOCK + 7)], shapes[(1,)]
    assert (mask.row, mask.width, mask.length, mask.beyond) == (0, 1, 1, 11)
    assert position.is_position and (position.row, position.length) == (0, None)
    assert found.can_seek and found.rest(fresh) == []


def test_rows_are_moved_with_their_room(axes):
    found, fresh = axes
    three = filled(found, found.moved(fresh, np.zeros(3, np.int32), 128), 1)
    two = found.moved(three, np.array([2, 0], np.int32), 192)
    back = found.moved(two, np.array([1, 0, 0], np.int32), 128)
    for leaf, old, new in zip(found.leaves, three, back, strict=True):
        old, new = (np.moveaxis(np.asarray(x), leaf.row, 0) for x in (old, new))
        old, new = (x.reshape(3, leaf.width, *x.shape[1:]) for x in (old, new))
        np.testing.assert_array_equal(new, old[[0, 2, 2]])


def test_blocks_of_a_row_make_the_row_again(axes):
    found, fresh = axes
    many = filled(found, found.moved(fresh, np.zeros(3, np.int32), 128), 1)
    one = found.moved(many, np.array([1], np.int32), 128)
    other = filled(found, one, 2)
    for number in range(2):
        block = found.block(many, jnp.int32(1), jnp.int32(number))
        other = found.put_block(other, jnp.int32(0), jnp.int32(number), block)
    placed = found.placed(filled(found, many, 3), jnp.int32(2), one, 2)
    for leaf, x, y, z in zip(found.leaves, one, other, placed, strict=True):
        row = z[2 * leaf.width : 3 * leaf.width]
        np.testing.assert_array_equal(row, x)
        if leaf.length is not None:
            np.testing.assert_array_equal(y, x)


def test_idle_rows_are_parked(axes):
    found, fresh = axes
    leaves = found.moved(fresh, np.zeros(2, np.int32), 128)
    leaves = found.sought(leaves, jnp.array([5, 7]))
    parked = found.tree(found.parked(leaves, jnp.array([True, False])))
    kinds = jax.tree.leaves(parked, is_leaf=lambda x: isinstance(x, tl.Position))
    assert {tuple(x.rows.tolist()) for x in kinds if isinstance(x, tl.Position)} == {(5, 0)}


class Odd(tl.Layer):
    """Keeps an array whose shape a test chooses, in a part that can be sought."""

    grows: bool = False

    position_wise = False

    def init(self, signature, rng, mode=tl.Mode.TRAIN):
        b, length, d = signature[0].shape
        shape = (2 * length // 3, d) if self.grows else (b * length, d)
        return {}, {'kept': Kept(jnp.zeros(shape))} if mode is tl.Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
        return inputs, state


class Kept(Seekable):
    """An array."""

    x: jax.Array


@pytest.mark.parametrize('grows', [True, False])
def test_an_axis_of_rows_and_positions_is_refused(grows):
    net = tl.Serial(tl.Embedding(V, 8), Odd(grows=grows), tl.Dense(V))
    with pytest.raises(UsageError, match='needs a state with an axis for rows and another one'):
        begun(net, {})
