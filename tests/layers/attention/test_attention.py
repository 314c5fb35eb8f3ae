"""Attention layers against sums written out from their weights, and the caches of decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels
from layercomb import init_state, tl
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype, signature_of

B, L, D = 2, 7, 8


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def made(layer, *shapes):
    """Weights with biases that are not zero, for inputs of these shapes and a mask where needed."""
    inputs = [jnp.zeros(s) for s in shapes]
    if layer.n_in > len(inputs):
        inputs.append(jnp.ones(shapes[-1][:2], bool))
    signature = signature_of(tuple(inputs))
    weights, _ = jax.jit(functools.partial(layer.init, signature))(jax.random.key(1))
    for i, part in enumerate(('query', 'key', 'value', 'output')):
        if 'bias' in weights[part]:
            weights[part]['bias'] += 0.1 * values(*weights[part]['bias'].shape, seed=i)
    for i, part in enumerate(('query_norm', 'key_norm')):
        if part in weights:
            weights[part]['scale'] += values(*weights[part]['scale'].shape, seed=i)
    return weights


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, inputs, mode=Mode.EVAL):
    return layer.apply(weights, state, inputs, mode=mode)


def run(layer, *inputs, weights=None):
    if weights is None:
        weights = made(layer, *(x.shape for x in inputs if x.ndim == 3))
    return np.asarray(apply(layer, weights, {}, inputs)[0][0])


def rotated(x, t):
    """x (K,) at position t."""
    half = len(x) // 2
    angles = t * 10000.0 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    )


def rms_normed(x, weights):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * weights['scale']


def slow(weights, x, memory, sees, rotary=False, scale=None, softcap=None):
    """A query, a head, a key at a time; sees(b, t, s) says whether query t sees key s."""
    weights = jax.tree.map(np.asarray, weights)
    q, k, v = (
        np.einsum('bld,dhk->bhlk', z, weights[p]['kernel'])
        + weights[p].get('bias', np.zeros(1))[:, None]
        for p, z in (('query', x), ('key', memory), ('value', memory))
    )
    if 'query_norm' in weights:
        q, k = rms_normed(q, weights['query_norm']), rms_normed(k, weights['key_norm'])
    k, v = (z.repeat(q.shape[1] // z.shape[1], 1) for z in (k, v))
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, t in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[2]) if sees(b, t, s)]
        if not seen:
            continue
        at = (
            (rotated(q[b, h, t], t), [rotated(k[b, h, s], s) for s in seen])
            if rotary
            else (
                q[b, h, t],
                [k[b, h, s] for s in seen],
            )
        )
        scores = np.array([at[0] @ one for one in at[1]]) * scale
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        y[b, h, t] = (p / p.sum()) @ v[b, h, seen]
    out = weights['output']
    return np.einsum('bhlk,hkd->bld', y, out['kernel']) + out.get('bias', 0)


MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    'layer',
    [
        tl.SelfAttention(2),
        tl.SelfAttention(2, d_head=6, rotary=tl.RotaryPositions(), masked=True),
        tl.SelfAttention(4, causal=False, masked=True),
        tl.SelfAttention(2, window=3),
        tl.SelfAttention(2, window=2, masked=True, rotary=tl.RotaryPositions()),
        tl.SelfAttention(4, n_kv_heads=2, rotary=tl.RotaryPositions(), scale=0.7, softcap=0.4),
        tl.SelfAttention(
            6,
            n_kv_heads=1,
            d_head=4,
            qkv_bias=False,
            out_bias=False,
            query_norm=tl.RMSNorm(),
            key_norm=tl.RMSNorm(),
            rotary=tl.RotaryPositions(),
        ),
    ],
)
def test_self_attention(layer):
    x = values(B, L, D)
    mask = (MASK,) if layer.masked else ()

    def sees(b, t, s):
        near = layer.window is None or s > t - layer.window
        return near and (not layer.causal or s <= t) and (not mask or MASK[b, s])

    scores = {'scale': layer.scale, 'softcap': layer.softcap}
    wanted = slow(made(layer, x.shape), x, x, sees, layer.rotary is not None, **scores)
    np.testing.assert_allclose(run(layer, x, *mask), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'layer',
    [
        tl.LocalSelfAttention(2, 3),
        tl.LocalSelfAttention(2, 2, look_back=2, masked=True),
        tl.LocalSelfAttention(2, 2, causal=False, look_ahead=1),
        tl.LocalSelfAttention(4, 3, n_kv_heads=2, masked=True, scale=0.7, softcap=0.4),
    ],
)
def test_local_self_attention(layer):
    x, c = values(B, L, D), layer.chunk_len
    mask = (MASK,) if layer.masked else ()

    def sees(b, t, s):
        first = (t // c - layer.look_back) * c
        last = t if layer.causal else (t // c + 1 + layer.look_ahead) * c - 1
        return first <= s <= last and (not mask or MASK[b, s])

    scores = {'scale': layer.scale, 'softcap': layer.softcap}
    wanted = slow(made(layer, x.shape), x, x, sees, **scores)
    np.testing.assert_allclose(run(layer, x, *mask), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'layer',
    [
        tl.CrossAttention(2, d_head=3, masked=True),
        tl.CrossAttention(6, d_head=3, masked=True, n_kv_heads=2, softcap=0.4, scale=0.7),
    ],
)
def test_cross_attention(layer):
    x, memory = values(B, 4, D), values(B, L, 6, seed=1)
    weights, scores = made(layer, x.shape, memory.shape), (layer.scale, layer.softcap)
    wanted = slow(weights, x, memory, lambda b, t, s: MASK[b, s], False, *scores)
    np.testing.assert_allclose(run(layer, x, memory, MASK), wanted, rtol=1e-4, atol=1e-4)


def test_cross_attention_to_another_width_asks_for_the_depth_of_heads():
    with pytest.raises(ValueError, match=r'sequence 8 wide and keys of one 6 wide .* say d_head='):
        tl.CrossAttention(2).output_signature(signature_of((values(B, 4, D), values(B, L, 6))))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(
        ValueError, match='3 heads do not divide the width 8: use 2, or say d_head='
    ):
        tl.SelfAttention(3).output_signature(signature_of(values(B, L, D)))
    layer = tl.SelfAttention(3, d_head=5)
    assert layer.output_signature(signature_of(values(B, L, D)))[0].shape == (B, L, D)


@pytest.mark.parametrize('layer', [tl.SelfAttention(2), tl.LocalSelfAttention(2, 2)])
def test_what_comes_later_changes_nothing_before(layer):
    x = values(B, L, D)
    y = run(layer, x)
    for t in (1, 4):
        edited = x.copy()
        edited[:, t:] = values(B, L - t, D, seed=9)
        changed = run(layer, edited)
        np.testing.assert_array_equal(changed[:, :t], y[:, :t])
        assert (changed[:, t:] != y[:, t:]).any(-1).all()


@pytest.mark.parametrize(
    'layer',
    [
        tl.SelfAttention(2, dropout=0.1),
        tl.LocalSelfAttention(2, 4),
        tl.LSHSelfAttention(2, chunk_len=4),
        tl.SparseQKVAttention(2, 2),
    ],
)
def test_no_rows_give_none_and_no_positions_are_refused(layer):
    weights = jax.eval_shape(lambda: layer.init((shape_dtype((1, L, D)),), jax.random.key(0))[0])

    def total(weights, x):
        (y,), _ = layer.apply(weights, {}, (x,), rng=jax.random.key(1), mode=Mode.TRAIN)
        assert y.shape == x.shape
        return y.sum()

    jax.eval_shape(jax.grad(total), weights, shape_dtype((0, L, D)))
    with pytest.raises(ValueError, match='attention needs one position at least, got'):
        jax.eval_shape(total, weights, shape_dtype((1, 0, D)))


def test_dropout_of_probabilities_needs_a_key():
    layer = tl.SelfAttention(2, dropout=0.5)
    x, weights = values(B, L, D), made(tl.SelfAttention(2), (B, L, D))
    with pytest.raises(
        ValueError, match=r'attention with dropout=0.5 draws in training: pass rng='
    ):
        layer.apply(weights, {}, (x,), mode=Mode.TRAIN)
    np.testing.assert_array_equal(run(layer, x, weights=weights), run(tl.SelfAttention(2), x))


# Parts.


def test_parts_can_be_replaced():
    x = values(B, L, D)
    shared = tl.SelfAttention(2, key=tl.SplitHeads(2, use_bias=False))
    assert 'bias' not in shared.init(signature_of(x), jax.random.key(0))[0]['key']
    assert repr(shared) == 'SelfAttention(2, key=SplitHeads(2, use_bias=False))'
    assert shared.keys == ('query', 'key', 'value', 'core', 'output')


def test_parts_that_nobody_chose_follow_the_other_fields():
    layer = tl.SelfAttention(2, output=tl.MergeHeads(False)).replace(causal=False, n_heads=4)
    assert layer == tl.SelfAttention(4, causal=False, output=tl.MergeHeads(False))
    assert layer.core == tl.DotProductAttention(causal=False)
    assert layer.query == tl.SplitHeads(4)
    local = tl.LocalSelfAttention(2, 4).replace(chunk_len=8, look_back=0)
    assert local.core == tl.LocalAttention(8, look_back=0)
    assert tl.CrossAttention(2).replace(masked=True).core.masked


@pytest.mark.parametrize(
    'text',
    [
        'SelfAttention(2, False, masked=True, rotary=RotaryPositions(), key=SplitHeads(2, 3))',
        'LocalSelfAttention(2, 4, look_back=2, d_head=3, dropout=0.5, rotary=RotaryPositions())',
        'CrossAttention(2, d_head=3, masked=True, dropout=0.5)',
        "LSHSelfAttention(2, n_hashes=2, d_head=3, masked=True, seed=1, name='x')",
        'SparseQKVAttention(2, 8, kernel_size=(1, 1), rotary=RotaryPositions())',
        'SelfAttention(2, window=4, d_head=3, masked=True, rotary=RotaryPositions())',
        'SelfAttention(6, n_kv_heads=2, qkv_bias=False, key_norm=RMSNorm(), softcap=5.0)',
    ],
)
def test_descriptions_are_what_they_were_in_old_runs(text):
    """Fields that classes share stand where each class had its own: runs are told apart by it."""
    layer = eval(text, vars(tl))
    assert ' '.join(repr(layer).split()).replace('( ', '(').replace(', )', ')') == text
    assert eval(repr(layer), vars(tl)) == layer


def test_lsh_attention_has_its_options_once():
    options = {field.name for field in dataclasses.fields(tl.LSHAttention)}
    layer = tl.LSHSelfAttention(2, n_hashes=3, neighbourhood='chunk', max_len=9, masked=True)
    assert all(getattr(layer.core, name) == getattr(layer, name) for name in options)
    assert layer.replace(n_hashes=5).core == layer.core.replace(n_hashes=5)
    assert layer.replace(n_hashes=3) == layer and hash(layer.replace(n_hashes=3)) == hash(layer)
    with pytest.raises(TypeError, match='positional'):
        tl.LSHSelfAttention(2, 3)


def test_repr_of_what_the_default_does_not_go_with():
    layer = tl.LocalSelfAttention(2, 4, causal=False, look_ahead=1)
    assert repr(layer) == 'LocalSelfAttention(2, 4, False, look_ahead=1)'
    assert eval(repr(layer), vars(tl)) == layer


# Caches.


def decode(layer, x, prompt, state=None, weights=None, steps=None):
    """A prompt, then single positions; (B, L, D)."""
    weights = made(layer, x.shape) if weights is None else weights
    state = init_state(layer, signature_of(x)) if state is None else state
    pieces = [(0, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]
    out = []
    for start, stop in pieces:
        (y,), state = apply(layer, weights, state, (x[:, start:stop],), Mode.PREDICT)
        out.append(y)
    return np.concatenate(out, 1), state


DECODERS = [
    tl.SelfAttention(2, rotary=tl.RotaryPositions()),
    tl.LocalSelfAttention(2, 2, rotary=tl.RotaryPositions()),
    tl.SelfAttention(2, window=3, rotary=tl.RotaryPositions()),
]
GROUPED = [
    tl.SelfAttention(
        4,
        n_kv_heads=2,
        rotary=tl.RotaryPositions(),
        query_norm=tl.RMSNorm(),
        key_norm=tl.RMSNorm(),
        softcap=0.5,
    ),
    tl.LocalSelfAttention(4, 2, n_kv_heads=1, rotary=tl.RotaryPositions(), scale=0.3, softcap=0.5),
    tl.SelfAttention(4, n_kv_heads=2, window=3, rotary=tl.RotaryPositions(), softcap=0.5),
]


@pytest.mark.parametrize('layer', GROUPED, ids=['full', 'local', 'window'])
@pytest.mark.parametrize('kernels', [True, False])
def test_decoding_with_shared_heads(layer, kernels):
    jax.clear_caches()
    with contextlib.nullcontext() if kernels else layercomb_kernels.off():
        test_decoding_equals_evaluation_from_any_prompt(layer)
        test_rows_stand_at_positions_of_their_own(layer)
    state = init_state(layer, signature_of(values(B, L, D)))
    assert state['core'].k.shape[0] == state['core'].v.shape[0] == B * layer.n_kv_heads


@pytest.mark.parametrize('layer', DECODERS, ids=['full', 'local', 'window'])
def test_decoding_equals_evaluation_from_any_prompt(layer):
    x = values(B, L, D)
    for prompt in (1, 4):
        y, state = decode(layer, x, prompt)
        np.testing.assert_allclose(y, run(layer, x), rtol=1e-4, atol=1e-4)
        assert state['core'].position.rows.tolist() == [L, L]


@pytest.mark.parametrize('layer', DECODERS, ids=['full', 'local', 'window'])
def test_rows_stand_at_positions_of_their_own(layer):
    x, lengths = values(B, L, D), np.array([2, 4])
    weights = made(layer, x.shape)
    padded = x[:, :4].copy()
    padded[0, 2:] = 99.0
    state = init_state(layer, signature_of(x))
    _, state = apply(layer, weights, state, (padded,), Mode.PREDICT)
    state = tl.seek(state, lengths)
    wanted = run(layer, x)
    for step in range(3):
        now = lengths + step
        (y,), state = apply(layer, weights, state, (x[np.arange(B), now][:, None],), Mode.PREDICT)
        np.testing.assert_allclose(y[:, 0], wanted[np.arange(B), now], rtol=1e-4, atol=1e-4)
    assert state['core'].position.rows.tolist() == [5, 7]


@pytest.mark.parametrize('layer', DECODERS, ids=['full', 'local', 'window'])
def test_running_past_the_cache_is_refused(layer):
    x, weights = jnp.asarray(values(B, 3, D)), made(layer, (B, 3, D))
    state = tl.seek(init_state(layer, signature_of(x)), jnp.array([1, 2]))
    wanted = r'the cache holds 3 positions, 2 are taken and 2 more were given: make the state with'
    with pytest.raises(ValueError, match=wanted) as e:
        layer.apply(weights, state, (x[:, :2],), mode=Mode.PREDICT)
    notes = [n for n in e.value.__notes__ if n.startswith('in ')]
    assert len(notes) == 1 and notes[0].startswith(f'in {type(layer).__name__}.core: ')


@pytest.mark.parametrize('layer', DECODERS, ids=['full', 'local', 'window'])
def test_running_past_the_cache_is_nan_in_the_rows_concerned(layer):
    x, weights = values(B, 3, D), made(layer, (B, 3, D))
    state = tl.seek(init_state(layer, signature_of(x)), jnp.array([1, 3]))
    (y,), _ = apply(layer, weights, state, (x[:, :1],), Mode.PREDICT)
    assert np.isnan(y).all((1, 2)).tolist() == [False, True]
    assert np.isfinite(y[0]).all()


@pytest.mark.parametrize('window', [1, 2, 3, 6, 7, 9])
def test_windows_of_any_length_decode_as_they_evaluate(window):
    layer, x = tl.SelfAttention(2, window=window), values(B, L, D)
    for prompt in (1, 3, L):
        y, _ = decode(layer, x, prompt)
        np.testing.assert_allclose(y, run(layer, x), rtol=1e-4, atol=1e-4)


def test_a_step_reads_only_the_window():
    """What lies before the window, or after the position, may be anything, and no array is L²."""
    layer, x = tl.SelfAttention(2, window=3), values(B, L, D)
    weights = made(layer, x.shape)
    _, state = decode(layer, x[:, :5], 5, init_state(layer, signature_of(x)), weights)
    (wanted,), _ = apply(layer, weights, state, (x[:, 5:6],), Mode.PREDICT)
    core = state['core']
    rest = jnp.array([t not in (3, 4) for t in range(L)])[None, :, None]
    spoilt = core.replace(k=jnp.where(rest, jnp.nan, core.k), v=jnp.where(rest, jnp.nan, core.v))
    (got,), _ = apply(layer, weights, {**state, 'core': spoilt}, (x[:, 5:6],), Mode.PREDICT)
    np.testing.assert_array_equal(got, wanted)


def test_a_window_is_of_causal_attention():
    with pytest.raises(ValueError, match=r'window=4 is of causal attention: leave causal=True'):
        tl.SelfAttention(2, causal=False, window=4)
    with pytest.raises(ValueError, match='Attention: window must be at least 1, got 0'):
        tl.SelfAttention(2, window=0)
    q = jnp.ones((1, 1, 3, 4))
    with pytest.raises(ValueError, match='window=4 is of causal attention: pass causal=True'):
        tl.dot_product_attention(q, q, q, window=4)
    with pytest.raises(ValueError, match='window must be at least 1, got 0'):
        tl.dot_product_attention(q, q, q, causal=True, window=0)


@pytest.mark.parametrize(
    'layer', [tl.SelfAttention(2, masked=True), tl.SelfAttention(2, masked=True, window=2)]
)
def test_masked_decoding_equals_evaluation(layer):
    x = values(B, L, D)
    weights, wanted = made(layer, x.shape), run(layer, x, MASK)
    state, out = init_state(layer, signature_of((x, jnp.asarray(MASK)))), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        inputs = x[:, start:stop], MASK[:, start:stop]
        (y,), state = apply(layer, weights, state, inputs, Mode.PREDICT)
        out.append(y)
    np.testing.assert_allclose(np.concatenate(out, 1), wanted[:, :5], rtol=1e-4, atol=1e-4)


def test_seek_reaches_every_position_and_goes_by_its_type_alone():
    state = {
        'a': {'at': tl.Position.first(2), 'k': 1, 'position': jnp.zeros(2)},
        'b': {'0': {'position': tl.Position.first(2)}},
        'position': {'k': 2},
    }
    moved = tl.seek(state, np.array([3, 4]))
    assert moved['a']['at'].rows.tolist() == moved['b']['0']['position'].rows.tolist() == [3, 4]
    assert moved['a']['at'].rows.dtype == jnp.int32
    assert (moved['a']['k'], moved['a']['position'].tolist(), moved['position']['k']) == (
        1,
        [0, 0],
        2,
    )


def test_keys_and_values_of_a_memory_are_made_at_the_first_step():
    layer = tl.CrossAttention(2)
    x, memory = values(B, L, D), values(B, 6, D)
    weights, state = layer.init(signature_of((x, memory)), jax.random.key(0), Mode.PREDICT)
    (whole,), _ = apply(layer, weights, {}, (x, memory), Mode.EVAL)
    (first,), state = apply(layer, weights, state, (x[:, :1], memory), Mode.PREDICT)
    # What is handed over later is not looked at: it is the same memory by contract.
    (second,), _ = apply(layer, weights, state, (x[:, 1:2], memory * jnp.nan), Mode.PREDICT)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    'layer', [tl.SelfAttention, functools.partial(tl.LocalSelfAttention, chunk_len=2)]
)
def test_shared_heads_that_do_not_divide_the_heads(layer):
    with pytest.raises(ValueError, match=r'n_kv_heads=4 does not divide n_heads=9: use 3$'):
        layer(n_heads=9, n_kv_heads=4)
    with pytest.raises(ValueError, match=r'LSHSelfAttention: n_kv_heads=4 does not divide n_he'):
        tl.LSHSelfAttention(9, n_kv_heads=4)


def test_shared_heads_have_the_depth_of_the_others():
    layer = tl.SelfAttention(6, n_kv_heads=2)
    weights, _ = layer.init((shape_dtype((1, 3, 24)),), jax.random.key(0))
    assert weights['key']['kernel'].shape == weights['value']['kernel'].shape == (24, 2, 4)
    with pytest.raises(ValueError, match='6 heads do not divide the width 20: use 5, or say'):
        layer.key.init((shape_dtype((1, 3, 20)),), jax.random.key(0))
    assert tl.SelfAttention(6, n_kv_heads=6).key == tl.SelfAttention(6).key


def test_norms_do_not_change_the_keys_that_the_core_draws_from():
    plain, normed = tl.SelfAttention(2), tl.SelfAttention(2, query_norm=tl.RMSNorm())
    assert plain.keys == normed.keys[:5] and normed.keys[5:] == ('query_norm',)


@pytest.mark.parametrize('field', ['key', 'value'])
def test_own_projections_of_a_memory_are_made_once(field):
    own = tl.SplitHeads(2, 4, use_bias=False)
    layer = tl.CrossAttention(2, d_head=4, **{field: own})
    assert layer == tl.CrossAttention(2, d_head=4, **{field: tl.Once(own)})
    signature = shape_dtype((1, 1, 8)), shape_dtype((1, 5, 8))
    weights, state = layer.init(signature, jax.random.key(0), Mode.PREDICT)
    x, memory = jnp.ones((1, 1, 8)), jax.random.normal(jax.random.key(1), (1, 5, 8))
    first, state = layer.apply(weights, state, (x, memory), mode=Mode.PREDICT)
    second, _ = layer.apply(weights, state, (x, 0 * memory), mode=Mode.PREDICT)
    np.testing.assert_array_equal(first[0], second[0])
