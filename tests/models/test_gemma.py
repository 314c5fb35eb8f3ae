"""Gemma: what its options change, decoding, and training. Its logits: tests/interop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, losses, models, tl, trees
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype

V, D, F, N, H, G, L = 11, 8, 12, 3, 4, 2, 7
TOKENS = (shape_dtype((2, L), 'int32'),)
KINDS = {
    'Gemma2': functools.partial(models.Gemma2, V, D, F, N, H, G, L, d_head=4, window=(3, None)),
    'Gemma3': functools.partial(models.Gemma3, V, D, F, N, H, G, L, d_head=4, window=(3, None)),
}


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, V, (2, L)).astype(np.int32)


def init(layer):
    shapes = jax.eval_shape(functools.partial(layer.init, TOKENS), jax.random.key(0))[0]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, inputs, mode=Mode.EVAL):
    return layer.apply(weights, state, inputs, mode=mode)


@pytest.mark.parametrize('kind', list(KINDS))
def test_decoding_is_evaluation(kind):
    net, ids = KINDS[kind](), tokens()
    weights = init(net)
    (y,), _ = apply(net, weights, {}, (ids,))
    state, made = init_state(net, TOKENS), []
    for span in ((0, 5), (5, 6), (6, 7)):
        (piece,), state = apply(net, weights, state, (ids[:, slice(*span)],), Mode.PREDICT)
        made.append(piece)
    np.testing.assert_allclose(np.concatenate(made, 1), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', list(KINDS))
def test_it_trains_with_a_loss_in_pieces(kind):
    net, ids = KINDS[kind](dropout=0.1), tokens()
    weights, counts = init(net), np.ones(ids.shape, np.float32)

    def loss(weights, chunk_len):
        scored = losses.attach(net, tl.CrossEntropyLoss(), chunk_len=chunk_len)
        (values, _), _ = scored.apply(weights, {}, (ids, ids, counts))
        return values.sum()

    whole, pieces = (jax.jit(jax.grad(loss), static_argnums=1)(weights, n) for n in (None, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), pieces, whole)
    assert all(bool(jnp.abs(x).max() > 0) for x in jax.tree.leaves(whole))


def test_paths_and_depth():
    weights = jax.eval_shape(lambda: init(KINDS['Gemma3']()))
    shapes = {path: x.shape for path, x in trees.flatten(weights).items()}
    assert shapes['block/attention/self_attention/key_norm/scale'] == (1, 4)  # 3 layers, 2 kinds
    assert {path.split('/')[0] for path in shapes} == {
        'block', 'block_1', 'block_2', 'embedding', 'norm',
    }  # fmt: skip
    deep = models.Gemma3(V, D, F, 14, H, G, L, d_head=4)
    shapes = trees.flatten(jax.eval_shape(lambda: init(deep)))
    assert shapes['block/5/attention/norm_after/scale'].shape == (2, D)
    assert shapes['block_1/attention/norm/scale'].shape == (2, D)


def test_gemma_begins_with_factors_of_one():
    net = KINDS['Gemma3']()
    weights = net.init(TOKENS, jax.random.key(0))[0]
    assert not weights['norm']['scale'].any()
    table, ids = weights['embedding']['table'], tokens()
    (x,), _ = net.layer.layers[0].apply({'table': table}, {}, (ids,))
    np.testing.assert_allclose(x, np.asarray(table)[ids] * np.sqrt(D), rtol=1e-6)


def test_caps_bound_what_they_cap():
    net = KINDS['Gemma2'](logit_softcap=2.0)
    (y,), _ = apply(net, jax.tree.map(lambda w: 10 * w, init(net)), {}, (tokens(),))
    assert 1 < np.abs(y).max() <= 2
    assert KINDS['Gemma2'](softcap=None) != KINDS['Gemma2']()
