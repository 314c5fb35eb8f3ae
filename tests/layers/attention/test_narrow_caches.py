"""Caches of keys and values in 16 and 8 bits: what is attended to is what was rounded."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
import layercomb_kernels
from layercomb import Mode, tl, transforms
from layercomb.layers.decoding.caches import KVCache
from layercomb.layers.decoding.narrow import Rounded, rounded, widened, zeros

B, G, K, V, ROOM = 2, 2, 20, 24, 16
BITS = None, 16, 8


def reads(x, bits):
    """What a cache gives back of vectors, by NumPy."""
    x = np.asarray(x, np.float32)
    if bits == 16:
        words = x.view(np.uint32)
        words = words + 0x7FFF + (words >> 16 & 1) & np.uint32(0xFFFF0000)
        return words.view(np.float32)
    if bits == 8:
        scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        return np.rint(x / np.where(scales > 0, scales, 1)) * scales
    return x


def attended(q, k, v, t, bits, window, softcap, real):
    """Attention of a query (H, K) at position t to keys (G, M, K) up to there."""
    first = 0 if window is None else max(0, t + 1 - window)
    group = len(q) // len(k)
    k, v = (np.repeat(reads(x[:, first : t + 1], bits), group, 0) for x in (k, v))
    s = np.einsum('hk,hck->hc', q, k) / np.sqrt(q.shape[-1])
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = np.where(real[first : t + 1], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum('hc,hcv->hv', p / p.sum(-1, keepdims=True), v)


def given(n_heads, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, n_heads, ROOM, K), (B, G, ROOM, K), (B, G, ROOM, V)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k * 3, v, rng.random((B, ROOM)) < 0.7


def fresh(layer, *inputs):
    signature = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    return layer.init(signature, jax.random.key(0), Mode.PREDICT)[1]


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize(
    'n_heads, window, softcap, masked',
    [(2, None, None, False), (6, 5, None, False), (10, None, 2.0, True), (4, 3, 3.0, True)],
)
@pytest.mark.parametrize('kernels', [True, False])
def test_attention_is_to_what_was_rounded(bits, n_heads, window, softcap, masked, kernels):
    layer = tl.DotProductAttention(window=window, softcap=softcap, masked=masked, cache_bits=bits)
    q, k, v, real = given(n_heads)
    real[:, :2] = True
    mask = (real,) if masked else ()
    real = real if masked else np.ones_like(real)
    state = fresh(layer, q, k, v, *mask)
    with contextlib.nullcontext() if kernels else layercomb_kernels.off():
        apply = jax.jit(lambda s, x: layer.apply({}, s, x, mode=Mode.PREDICT))
        t = 0
        for length in (1, 3, 1, 1, 3, 1):
            new = tuple(x[:, :, t : t + length] for x in (q, k, v))
            (y,), state = apply(state, (*new, *(x[:, t : t + length] for x in mask)))
            assert y.dtype == jnp.float32
            for b in range(B):
                for i in range(length):
                    more = bits, window, softcap, real[b]
                    wanted = attended(q[b, :, t + i], k[b], v[b], t + i, *more)
                    np.testing.assert_allclose(y[b, :, i], wanted, atol=2e-5, rtol=2e-5)
            t += length


@pytest.mark.parametrize('bits', [16, 8])
def test_ragged_rows_go_back_and_on(bits):
    layer = tl.DotProductAttention(cache_bits=bits)
    q, k, v, _ = given(4)
    state = fresh(layer, q, k, v)
    _, state = layer.apply({}, state, tuple(x[:, :, :9] for x in (q, k, v)), mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([3, 7]))
    at = np.array([3, 7])
    for _ in range(4):
        new = tuple(np.stack([x[b, :, at[b]][:, None] for b in range(B)]) for x in (q, k, v))
        (y,), state = layer.apply({}, state, new, mode=Mode.PREDICT)
        for b in range(B):
            wanted = attended(
                q[b, :, at[b]], k[b], v[b], at[b], bits, None, None, np.ones(ROOM, bool)
            )
            np.testing.assert_allclose(y[b, :, 0], wanted, atol=2e-5, rtol=2e-5)
        at += 1


@pytest.mark.parametrize('bits', [16, 8])
@pytest.mark.parametrize('length', [1, 3])
def test_what_overflows_is_nan_or_refused(bits, length):
    layer = tl.DotProductAttention(cache_bits=bits)
    q, k, v, _ = given(2)
    state = tl.seek(fresh(layer, q, k, v), jnp.array([ROOM, 2]))
    new = tuple(x[:, :, :length] for x in (q, k, v))
    (y,), _ = jax.jit(lambda s, x: layer.apply({}, s, x, mode=Mode.PREDICT))(state, new)
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all()
    with pytest.raises(ValueError, match='the cache holds 16 positions, 16 are taken'):
        layer.apply({}, state, new, mode=Mode.PREDICT)


@pytest.mark.parametrize('bits', BITS)
def test_local_attention_keeps_what_was_rounded(bits):
    layer = tl.LocalAttention(4, cache_bits=bits)
    q, k, v, _ = given(4)
    state = fresh(layer, q, k, v)
    (wanted,), _ = tl.LocalAttention(4).apply({}, {}, (q, reads(k, bits), reads(v, bits)))
    t, made = 0, []
    for length in (1, 6, 1, 3, 5):
        new = tuple(x[:, :, t : t + length] for x in (q, k, v))
        (y,), state = layer.apply({}, state, new, mode=Mode.PREDICT)
        made.append(y)
        t += length
    np.testing.assert_allclose(jnp.concatenate(made, 2), wanted, atol=2e-5, rtol=2e-5)


def test_the_state_is_as_narrow_as_the_layer_says():
    q, k, v, _ = given(2)
    state = fresh(tl.DotProductAttention(cache_bits=8), q, k, v)
    assert isinstance(state, KVCache) and isinstance(state.k, Rounded)
    assert state.k.shape == (B * G, ROOM, K) and state.v.shape == (B * G, ROOM, V)
    assert (state.k.integers.dtype, state.v.scales.shape) == (jnp.int8, (B * G, ROOM, 1))
    assert state.room == ROOM
    half = fresh(tl.DotProductAttention(cache_bits=16), q, k, v)
    assert half.k.dtype == half.v.dtype == jnp.bfloat16
    assert fresh(tl.DotProductAttention(False, cache_bits=8), q, k, v) == {}


@pytest.mark.parametrize('bits', [16, 8])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_activations_may_be_narrow_too(bits, dtype):
    layer = tl.DotProductAttention(cache_bits=bits)
    q, k, v = (jnp.asarray(x, dtype) for x in given(4)[:3])
    state = fresh(layer, q, k, v)
    assert bits == 8 or state.k.dtype == dtype  # which has no more bits
    (y,), _ = layer.apply({}, state, (q, k, v), mode=Mode.PREDICT)
    (wanted,), _ = layer.apply({}, {}, (q, k, v))
    assert y.dtype == dtype
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (y, wanted)), atol=0.06)


def test_numbers_are_rounded_to_the_nearest():
    x = jnp.array([[1.0, -2.0, 0.004, 254.0], [0, 0, 0, 0], [1e-45, 0, 0, 0]])
    kept = rounded(x, zeros(x.shape, x.dtype, 8))
    assert kept.integers.tolist()[:2] == [[0, -1, 0, 127], [0, 0, 0, 0]]
    assert widened(kept).tolist()[:2] == [[0, -2, 0, 254], [0, 0, 0, 0]]
    assert jnp.isfinite(widened(kept)).all()
    for wrong in (jnp.nan, jnp.inf):
        kept = rounded(x.at[0, 1].set(wrong), kept)
        assert jnp.isnan(widened(kept)[0]).all() and jnp.isfinite(widened(kept)[1]).all()
    assert rounded(x, zeros(x.shape, x.dtype, 16)).dtype == jnp.bfloat16
    assert rounded(x, zeros(x.shape, x.dtype, None)) is not None


def test_a_derivative_goes_through_a_step():
    layer = tl.DotProductAttention(cache_bits=16)
    q, k, v, _ = given(2)
    state = fresh(layer, q, k, v)

    def total(q):
        new = q, k[:, :, :1], v[:, :, :1]
        return layer.apply({}, state, new, mode=Mode.PREDICT)[0][0].sum()

    assert jnp.isfinite(jax.grad(total)(q[:, :, :1])).all()


def test_layers_say_what_bits_there_are():
    with pytest.raises(TypeError, match='cache_bits must be 16 or 8 or None, got 4'):
        tl.DotProductAttention(cache_bits=4)
    assert transforms.narrow_caches(tl.LocalSelfAttention(2, 8), 16).core.cache_bits == 16
    assert (
        lc.init_state(
            transforms.narrow_caches(tl.SelfAttention(2)),
            jax.ShapeDtypeStruct((1, 4, 8), jnp.float32),
        )['core'].k.dtype
        == jnp.bfloat16
    )
