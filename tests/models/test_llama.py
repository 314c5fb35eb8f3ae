"""Llama and its relatives: against a plain NumPy block, and what each option changes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, losses, models, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.models.llama import in_depth, places
from layercomb.shapes import describe, shape_dtype

V, D, F, N, H, G, L = 11, 8, 12, 2, 4, 2, 6
TOKENS = (shape_dtype((2, L), 'int32'),)


def llama(**changes):
    return models.Llama(V, D, F, N, H, G, L, **changes)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, V, (2, L)).astype(np.int32)


def init(layer, scale=1.0):
    """Random weights, norms and biases too."""
    shapes = jax.eval_shape(functools.partial(layer.init, TOKENS), jax.random.key(0))[0]
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, inputs, mode=Mode.EVAL):
    return layer.apply(weights, state, inputs, mode=mode)


def assert_close(got, wanted, tolerance=1e-4):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


# A plain reference, one sequence at a time.


def rms(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def turned(x, period):
    """(L, H, K): features i and i + K/2 of position t turn by t·period^(−2i/K)."""
    n = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * period ** (-np.arange(n) / n)
    a, b = x[..., :n], x[..., n:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(h, w, window, period, norm):
    q, k, v = (
        np.einsum('ld,dhk->lhk', h, w[name]['kernel']) + w[name].get('bias', 0)
        for name in ('query', 'key', 'value')
    )
    if 'query_norm' in w:
        q, k = norm(q, w['query_norm']['scale']), norm(k, w['key_norm']['scale'])
    q, k = turned(q, period), turned(k, period)
    out = np.zeros((len(h), *q.shape[1:]))
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        for t in range(len(h)):
            first = 0 if window is None else max(0, t - window + 1)
            score = k[first : t + 1, shared] @ q[t, head] / np.sqrt(q.shape[-1])
            p = np.exp(score - score.max())
            out[t, head] = p / p.sum() @ v[first : t + 1, shared]
    return np.einsum('lhk,hkd->ld', out, w['output']['kernel']) + w['output'].get('bias', 0)


def reference(weights, ids, *, window=None, period=10000.0, epsilon=1e-6):
    """Logits (L, V) of one sequence."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    norm = functools.partial(rms, epsilon=epsilon)
    x = w['embedding']['table'][ids]
    for i in range(N):
        block = jax.tree.map(lambda x, i=i: x[i], w['block'])
        part = block['attention']
        h = norm(x, part['norm']['scale'])
        x = x + attention(h, part['self_attention'], window, period, norm)
        part = block['feed_forward']
        h, gated = norm(x, part['norm']['scale']), part['gated_dense']
        gate, up = (h @ gated[n] + gated.get(f'{n}_bias', 0) for n in ('gate', 'up'))
        h = gate / (1 + np.exp(-gate)) * up
        x = x + h @ part['dense']['kernel'] + part['dense'].get('bias', 0)
    h = norm(x, w['norm']['scale'])
    return h @ (w['head']['kernel'] if 'head' in w else w['embedding']['table'].T)


OPTIONS = {
    'plain': {},
    'tied': {'tied': True},
    'biases': {'qkv_bias': True, 'out_bias': True, 'ff_bias': True},
    'qk_norm': {'qk_norm': True, 'epsilon': 1e-3},
    'period': {'period': 100.0},
    'window': {'window': 3},
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=list(OPTIONS))
def test_llama_is_its_equations(options):
    net, ids = llama(**options), tokens()
    weights = init(net)
    (y,), _ = apply(net, weights, {}, (ids,))
    given = {k: v for k, v in options.items() if k in ('window', 'period', 'epsilon')}
    for row in range(2):
        assert_close(y[row], reference(weights, ids[row], **given), 1e-3)


def test_heads_of_another_depth_and_as_many_keys_as_queries():
    wide = init(models.Llama(V, D, F, N, H, None, L, d_head=6))
    attention = wide['block']['attention']['self_attention']
    assert attention['key']['kernel'].shape == (N, D, H, 6)
    assert models.Llama(V, D, F, N, H, H, L, d_head=D // H) == models.Llama(V, D, F, N, H, None, L)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=list(OPTIONS))
def test_decoding_is_evaluation(options):
    net, ids = llama(**options), tokens()
    weights = init(net, 0.3)
    (y,), _ = apply(net, weights, {}, (ids,))
    state, made = init_state(net, TOKENS), []
    for span in ((0, 4), (4, 5), (5, 6)):
        (piece,), state = apply(net, weights, state, (ids[:, slice(*span)],), Mode.PREDICT)
        made.append(piece)
    assert_close(np.concatenate(made, 1), y)


def test_paths():
    weights = jax.eval_shape(lambda: init(llama()))
    assert list(trees.flatten(weights)) == [
        'block/attention/norm/scale',
        'block/attention/self_attention/key/kernel',
        'block/attention/self_attention/output/kernel',
        'block/attention/self_attention/query/kernel',
        'block/attention/self_attention/value/kernel',
        'block/feed_forward/dense/kernel',
        'block/feed_forward/gated_dense/gate',
        'block/feed_forward/gated_dense/up',
        'block/feed_forward/norm/scale',
        'embedding/table',
        'head/kernel',
        'norm/scale',
    ]
    other = jax.eval_shape(lambda: init(llama(dropout=0.1, ff_chunk_len=2, remat=True)))
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, weights)


def test_pieces_and_recomputing_change_nothing():
    net, ids = llama(), tokens()
    weights = init(net)
    (wanted,), _ = apply(net, weights, {}, (ids,))
    (got,), _ = apply(llama(ff_chunk_len=4, remat=True), weights, {}, (ids,))
    assert_close(got, wanted)


@pytest.mark.parametrize('tied', [False, True])
def test_it_trains_with_a_loss_in_pieces(tied):
    net, ids = llama(tied=tied, dropout=0.1), tokens()
    weights, counts = init(net, 0.3), np.ones(ids.shape, np.float32)

    def loss(weights, chunk_len):
        scored = losses.attach(net, tl.CrossEntropyLoss(), chunk_len=chunk_len)
        (values, _), _ = scored.apply(weights, {}, (ids, ids, counts))
        return values.sum()

    whole, pieces = (jax.jit(jax.grad(loss), static_argnums=1)(weights, n) for n in (None, 2))
    jax.tree.map(assert_close, pieces, whole)
    assert all(bool(jnp.abs(x).max() > 0) for x in jax.tree.leaves(whole))


def test_a_tied_model_is_cast_and_quantized():
    net, ids = llama(tied=True), tokens()
    weights = init(net, 0.3)
    (wanted,), _ = apply(net, weights, {}, (ids,))
    (y,), _ = apply(transforms.cast(net), weights, {}, (ids,))
    np.testing.assert_allclose(np.float32(y), wanted, atol=0.05)
    small, narrow = transforms.quantize(net, weights, smallest=1)
    (y,), _ = apply(small, narrow, {}, (ids,))
    np.testing.assert_allclose(y, wanted, atol=0.05)


# Depth.


def test_equal_blocks_are_scanned_together():
    def paths(kinds):
        blocks = [tl.Serial(tl.Dense(n), name='block') for n in kinds]
        return [(each.layer.name, each.n) for each in in_depth(blocks)]

    assert paths([4] * 5) == [('block', 5)]
    assert paths([4, 4, 8] * 3 + [4, 4]) == [('block', 3), ('block_1', 2)]
    assert paths([4, 4, 4, 8, 8]) == [('block', 3), ('block_1', 2)]
    assert paths([4]) == [('block', 1)]


@pytest.mark.parametrize('kinds', ['aaaa', 'aab', 'abababa', 'aaabaaabaa', 'abc', 'a', 'aabb'])
def test_places_are_where_the_blocks_are(kinds):
    net = tl.Serial(*in_depth([tl.Serial(tl.Dense(name=kind), name='block') for kind in kinds]))
    shapes = jax.eval_shape(lambda k: net.init((shape_dtype((1, 4)),), k)[0], jax.random.key(0))
    found = {}
    for path, layers in places(kinds):
        for kind, leaf in trees.get(shapes, path).items():
            assert len(layers) == leaf['kernel'].shape[0]
            found |= dict.fromkeys(layers, kind)
    assert ''.join(found[i] for i in range(len(kinds))) == kinds


def test_relatives_are_options():
    sizes = (V, D, F, N, H, G, L)
    assert models.Qwen2(*sizes) == llama(period=1e6, qkv_bias=True)
    assert models.Qwen3(*sizes, tied=True) == llama(period=1e6, qk_norm=True, tied=True)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='n_kv_heads=3 does not divide n_heads=4: use'):
        models.Llama(V, D, F, N, H, 3, L)
    with pytest.raises(ValueError, match='window is empty: give a number of positions'):
        llama(window=())
    with pytest.raises(TypeError, match="Llama: d_ff must be an int, got '12'"):
        models.Llama(V, D, '12')
    assert describe(llama().output_signature(TOKENS)) == f'float32[2,{L},{V}]'
