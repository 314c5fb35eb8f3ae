"""Named trees: paths, and what goes by them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import tl, trees
from layercomb.shapes import shape_dtype

names = st.sampled_from(['a', 'b', 'dense', '0'])
nested = st.dictionaries(
    names,
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=6
    ),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(nested)
def test_flatten_and_back(tree):
    flat = trees.flatten(tree)
    assert trees.unflatten(flat) == tree
    assert list(flat.values()) == jax.tree.leaves(tree)
    for path, leaf in flat.items():
        assert trees.get(tree, path) == leaf
        rest = trees.flatten(trees.drop(tree, path))
        assert rest == {p: x for p, x in flat.items() if p != path}
    assert trees.flatten(trees.map_with_path(lambda path, x: (path, x), tree)) == {
        p: (p, x) for p, x in flat.items()
    }


def test_get_says_what_there_is():
    tree = {'block': {'dense': {'kernel': 1}, 'norm': 2}}
    assert trees.get(tree, 'block/dense') == {'kernel': 1}
    with pytest.raises(KeyError, match="no 'block/x' in the tree: at block there is dense, norm"):
        trees.get(tree, 'block/x')
    with pytest.raises(KeyError, match="no 'head' in the tree: at the root there is block"):
        trees.get(tree, 'head')
    with pytest.raises(KeyError, match='at block/norm there is a leaf'):
        trees.get(tree, 'block/norm/scale')
    with pytest.raises(KeyError, match="no 'x' in the tree"):
        trees.drop(tree, 'x')


def test_put_takes_no_place_twice():
    tree = {'a': {'x': 1}}
    assert trees.put(tree, 'b/y', 2) == {'a': {'x': 1}, 'b': {'y': 2}}
    assert tree == {'a': {'x': 1}}
    with pytest.raises(ValueError, match='two weights under one path'):
        trees.put(tree, 'a/x', 2)
    with pytest.raises(ValueError, match='a weight and a subtree under one path'):
        trees.put(tree, 'a/x/y', 2)


def test_drop_takes_empty_subtrees_along():
    assert trees.drop({'a': {'b': {'c': 1}}, 'd': 2}, 'a/b/c') == {'d': 2}
    assert trees.drop({'a': {'b': 1, 'c': 2}}, 'a/b') == {'a': {'c': 2}}


def test_count_and_bytes():
    tree = {'a': jnp.zeros((3, 4)), 'b': {'c': shape_dtype((5,), 'bfloat16'), 'd': jnp.int8(1)}}
    assert trees.count(tree) == 12 + 5 + 1
    assert trees.n_bytes(tree) == 48 + 10 + 1
    assert trees.n_bytes({'key': jax.random.key(0)}) == 0
    assert trees.count({}) == trees.n_bytes({}) == 0


def test_decay_goes_by_names_not_axes():
    net = tl.Repeat(tl.Residual(tl.LayerNorm(), tl.Dense(4)), 3)
    weights = jax.eval_shape(lambda: net.init((shape_dtype((2, 4)),), jax.random.key(0))[0])
    assert weights['dense']['bias'].shape == (3, 4)
    assert trees.flatten(trees.decay_mask(weights)) == {
        'dense/bias': False,
        'dense/kernel': True,
        'layer_norm/bias': False,
        'layer_norm/scale': False,
    }


def test_partition_and_merge():
    weights = {
        'dense': {'kernel': jnp.ones(2), 'bias': jnp.zeros(2)},
        'ids': jnp.arange(3),
    }
    yes, no = trees.partition(weights)
    assert (yes['ids'], no['dense']) == (None, {'kernel': None, 'bias': None})
    assert len(jax.tree.leaves(yes)) == 2
    yes, no = trees.partition(weights, lambda path: path.endswith('kernel'))
    assert yes['dense']['bias'] is None and no['dense']['kernel'] is None
    for both in (trees.merge(yes, no), trees.merge(no, yes)):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), both, weights))
    grads = jax.grad(lambda w: trees.merge(w, no)['dense']['kernel'].sum())(yes)
    assert grads['ids'] is None and (grads['dense']['kernel'] == 1).all()
    assert jax.tree.structure(grads) == jax.tree.structure(yes)


def test_leaves_that_are_absent_stay_absent():
    assert trees.map_with_path(lambda path, x: x + 1, {'a': None, 'b': 1}) == {'a': None, 'b': 2}
    assert np.all(trees.merge({'a': None}, {'a': np.ones(2)})['a'] == 1)
