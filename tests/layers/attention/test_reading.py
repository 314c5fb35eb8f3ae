"""The next position's attention to a cache: the kernel, XLA's way, and the definition."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels as kernels
from layercomb import tl
from layercomb.layers.attention.selected.cache import PlacedCache
from layercomb.layers.attention.selected.reading import next_attention
from layercomb.layers.core.mode import Mode
from layercomb_kernels import Reading

needs_kernels = pytest.mark.skipif(not kernels.available(), reason='no kernels here')
READING = Reading(local_len=5, n_sinks=2, once=True, scale=0.7)
READINGS = {
    'once': READING,
    'counted': dataclasses.replace(READING, once=False),
    'capped': dataclasses.replace(READING, softcap=2.0),
    'found alone': dataclasses.replace(READING, local_len=0, n_sinks=0),
    'more near than there are': dataclasses.replace(READING, local_len=99, n_sinks=99),
}


def case(n_found=12, group=1, depth=24, width=20, room=40, dtype=jnp.float32):
    """Three rows of two heads: one with padding, one without a new position, one that is empty."""
    rng = np.random.default_rng(n_found)
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((6 * group, depth), (6, room, depth), (6, room, width))
    )
    found = rng.integers(-3, room, (6 * group, n_found)).astype(np.int32)
    found[:, : n_found // 3] = found[:, n_found // 3 : n_found // 3 * 2]  # many of them twice
    found[4 * group :] = -1
    n_real = jnp.asarray([room // 2, 3, 0], jnp.int32)
    at = np.tile(np.arange(room, dtype=np.int32), (3, 1))
    at[0, : room // 2] *= 2
    cache = PlacedCache.unfilled(*(jax.ShapeDtypeStruct((3, 2, room, 1), dtype),) * 2)
    cache = cache.replace(k=keys, v=values, at=jnp.asarray(at), n_real=n_real)
    return q, jnp.asarray(found), cache, jnp.asarray([True, n_found % 2 == 0, True])


def by_definition(reading, q, found, cache, real):
    """A query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, cache.k, cache.v))
    at, n_real = np.asarray(cache.at), np.asarray(cache.n_real)
    y = np.zeros((len(q), v.shape[2]))
    for n, its_found in enumerate(np.asarray(found)):
        row, head = n * len(at) // len(q), n * len(k) // len(q)
        places = list(at[row, : n_real[row]])
        near = places[-reading.local_len :] if reading.local_len else []
        seen = [*its_found[its_found >= 0], *near, *places[: reading.n_sinks]]
        seen = sorted(set(seen)) if reading.once else seen
        if not real[row] or not seen:
            continue
        s = reading.scale * k[head, seen] @ q[n]
        s = reading.softcap * np.tanh(s / reading.softcap) if reading.softcap else s
        p = np.exp(s - s.max())
        y[n] = p / p.sum() @ v[head, seen]
    return y


@pytest.mark.parametrize('reading', READINGS.values(), ids=READINGS.keys())
@pytest.mark.parametrize(
    ('n_found', 'group', 'depth', 'width'),
    [(12, 1, 24, 20), (7, 3, 64, 64), (300, 2, 16, 136), (1, 1, 1, 1), (2, 1, 8, 8)],
)
@pytest.mark.parametrize('off', [False, True], ids=['kernels', 'without'])
def test_the_next_position_reads_what_it_finds_and_what_is_near(
    reading, n_found, group, depth, width, off
):
    given = case(n_found, group, depth, width)
    attend = functools.partial(next_attention, reading)
    if off:
        with kernels.off():
            y = jax.jit(attend)(*given)
    else:
        y = jax.jit(attend)(*given)
    np.testing.assert_allclose(y, by_definition(reading, *given), rtol=1e-5, atol=2e-5)


@needs_kernels
def test_the_kernel_is_used_where_it_applies():
    attend = jax.jit(functools.partial(next_attention, READING))
    assert 'layercomb_placed_attention' in attend.lower(*case()).as_text()
    with kernels.off():
        assert 'layercomb' not in attend.lower(*case()).as_text()


def both(*args):
    """What the kernel makes of it, and what XLA does."""
    with kernels.off():
        wanted = next_attention(*args)
    return np.asarray(next_attention(*args)), np.asarray(wanted)


def test_what_is_not_seen_does_not_show():
    q, found, cache, real = case()
    k, v = np.array(cache.k), np.array(cache.v)
    read = np.zeros(k.shape[:2], bool)
    for n, its in enumerate(np.asarray(found)):
        read[n, its[its >= 0]] = True
    k[~read] = v[~read] = np.nan
    reading = READINGS['found alone']
    poisoned = cache.replace(k=jnp.asarray(k), v=jnp.asarray(v))
    clean = both(reading, q, found, cache, real)
    for y, wanted in zip(both(reading, q, found, poisoned, real), clean, strict=True):
        np.testing.assert_array_equal(y, wanted)
    k[:] = np.nan  # and what is seen shows
    for y in both(reading, q, found, poisoned.replace(k=jnp.asarray(k)), real):
        assert np.isnan(y[:2]).all() and not np.any(y[4:])


@pytest.mark.parametrize('once', [True, False])
def test_what_is_out_of_range_is_the_last(once):
    q, found, cache, real = case()
    room = cache.k.shape[1]
    found = found.at[:2, :4].set(jnp.array([room - 1, room, room + 7, 2**31 - 1]))
    at = cache.at.at[0, -2:].set(jnp.array([room + 1, room + 2]))
    cache = cache.replace(at=at, n_real=jnp.array([room + 3, room, 0], jnp.int32))
    reading = dataclasses.replace(READING, once=once)
    got, wanted = both(reading, q, found, cache, real)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)
    within = cache.replace(at=jnp.minimum(at, room - 1), n_real=jnp.minimum(cache.n_real, room))
    defined = by_definition(reading, q, jnp.minimum(found, room - 1), within, real)
    np.testing.assert_allclose(got, defined, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('softcap', [1e3, 1e6])
def test_a_cap_far_above_the_scores_changes_little(softcap):
    given = case()
    reading = dataclasses.replace(READING, softcap=softcap)
    for y in both(reading, *given):
        np.testing.assert_allclose(y, by_definition(reading, *given), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize('key', [-np.inf, -1e20, -1e35])
def test_scores_may_be_as_small_as_floats_are(key):
    """Of −∞ alone nothing is made; among others it counts nothing."""
    _, found, cache, real = case()
    q = jnp.ones((len(found), cache.k.shape[2])).at[:, 1:].set(0)
    k = jnp.zeros_like(cache.k).at[..., 0].set(key)
    for some in (k, k.at[0, :, 0].set(-1).at[:2, 0, 0].set(key)):
        got, wanted = both(READING, q, found, cache.replace(k=some), real)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)
        assert (got[1] == 0).all() == (key == -np.inf)
    k = k.at[0, :, 0].set(jnp.nan)  # what is no number still shows
    for y in both(READING, q, found, cache.replace(k=k), real):
        assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


@pytest.mark.parametrize('size', [2**31 - 1, 2**31, 10**30])
def test_sizes_may_be_as_large_as_one_likes(size):
    given = case()
    reading = dataclasses.replace(READING, local_len=size, n_sinks=size)
    for y in both(reading, *given):
        np.testing.assert_allclose(y, by_definition(reading, *given), rtol=1e-5, atol=2e-5)
    core, x = tl.BlockAttention(max_len=64, local_len=2**31), jnp.ones((1, 2, 1, 16))
    _, state = core.init((x,) * 3, jax.random.key(0), Mode.PREDICT)
    y, _ = core.apply({}, state, (x,) * 3, mode=Mode.PREDICT)
    np.testing.assert_allclose(jax.tree.leaves(y)[0], x, rtol=1e-5)


@needs_kernels
def test_derivatives_are_those_of_xla():
    q, *given = case()
    with kernels.off():
        wanted = jax.grad(lambda q: next_attention(READING, q, *given).sum())(q)
    got = jax.grad(lambda q: next_attention(READING, q, *given).sum())(q)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize('make', [tl.HashedAttention, tl.BlockAttention, tl.MixedAttention])
def test_a_token_copies_no_array_of_the_room(make):
    room = 1237
    core = make(max_len=room)
    q = jax.ShapeDtypeStruct((1, 2, room, 16), jnp.float32)
    _, state = core.init((q, q, q), jax.random.key(0), Mode.PREDICT)
    one = jnp.ones((1, 2, 1, 16))

    def step(state):
        return core.apply({}, state, (one,) * 3, mode=Mode.PREDICT)

    program = jax.jit(step, donate_argnums=0).lower(state).compile().as_text()
    copies = [line for line in program.splitlines() if ' copy(' in line and f'{room}' in line]
    # The sums of blocks are read whole to choose by, so that a copy of them costs no more.
    assert not [line for line in copies if f'[2,{room},1]' not in line]


@needs_kernels
def test_what_does_not_fit_is_refused():
    q, found, cache, real = case()
    rest = cache.k, cache.v, cache.at, cache.n_real, real
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.placed_attention(READING, q, found[:-1], *rest)
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.placed_attention(READING, q, found, *rest[:-1], real[:-1])
    with pytest.raises(ValueError, match='found must have 2 axes'):
        kernels.placed_attention(READING, q, found[0], *rest)
    for negative in ({'local_len': -1}, {'n_sinks': -50}):
        with pytest.raises(ValueError, match='must not be negative'):
            kernels.placed_attention(dataclasses.replace(READING, **negative), q, found, *rest)
    with pytest.raises(TypeError, match='expected int32, got uint8'):
        kernels.placed_attention(READING, q, found.astype(jnp.uint8), *rest)
    with pytest.raises(TypeError, match='the kernels take float32, got bfloat16'):
        kernels.placed_attention(READING, q.astype(jnp.bfloat16), found, *rest)
