"""LSH attention beside a slow reference from the equations; exactly causal, masks, decoding."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layercomb as lc
import layercomb_kernels
from layercomb import tl
from layercomb.layers.attention.lsh.function import lsh_attention
from layercomb.layers.attention.lsh.hashing import (
    automatic_buckets,
    lsh_buckets,
    rotated_buckets,
    torch_rotations,
)
from layercomb.layers.attention.lsh.torch_normal import torch_normal
from layercomb.layers.attention.lsh.windows import SELF
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import Decisions
from layercomb.layers.state.parts import beside, own


def windows(buckets, chunk_len, causal, mask, neighbourhood):
    """(R, L, L) int: how often a query of one head sees each key in a round, query by query."""
    if neighbourhood == 'circle':
        return circle(buckets, chunk_len, causal, mask)
    n_rounds, length = buckets.shape
    seen = np.zeros((n_rounds, length, length), int)
    for r in range(n_rounds):
        order = sorted(range(length), key=lambda t: (not mask[t], buckets[r, t], t))
        place = {t: i for i, t in enumerate(order)}
        for t in range(length):
            for c in range(length):
                if not (mask[t] and mask[c]) or (causal and c > t):
                    continue
                if neighbourhood == 'bucket':
                    near = abs(place[t] - place[c]) < chunk_len
                    seen[r, t, c] = near and buckets[r, t] == buckets[r, c]
                else:
                    apart = place[t] // chunk_len - place[c] // chunk_len
                    seen[r, t, c] = apart in ((0, 1) if causal else (-1, 0, 1))
    return seen


def circle(buckets, chunk_len, causal, mask):
    """The `windows` of chunks in a circle: one list of all rounds, cut and turned around."""
    n_rounds, length = buckets.shape
    n = -(-length // chunk_len)
    chunks = []
    for r in range(n_rounds):
        order = sorted(range(length), key=lambda t: (not mask[t], buckets[r, t], t))
        chunks += [order[i * chunk_len : (i + 1) * chunk_len] for i in range(n)]
    seen = np.zeros((n_rounds, length, length), int)
    for i, chunk in enumerate(chunks):
        around = chunks[i - 1] + chunk
        if not causal:
            around = around + chunks[(i + 1) % len(chunks)]
        for t in chunk:
            for c in around:
                seen[i // n, t, c] += mask[t] and mask[c] and (c <= t or not causal)
    return seen


def reference(q, v, count, scale=None, softcap=None):
    """One head: a softmax over a multiset, in which pair (t, c) is there count[t, c] times."""
    k = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    s = q @ k.T * (1 if scale is None else scale)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = jnp.where(np.eye(len(q), dtype=bool), SELF, s)
    s = jnp.where(count > 0, s, -1e30)
    p = count * jnp.exp(s - s.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1) @ v


def case(length, n_hashes, n_buckets, seed=0, heads=2, depth=4, shared=None):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = 3 * jax.random.normal(keys[0], (1, heads, length, depth))
    v = jax.random.normal(keys[1], (1, shared or heads, length, depth + 1))
    return q, v, lsh_buckets(q, keys[2], n_buckets=n_buckets, n_hashes=n_hashes)


@settings(max_examples=8, deadline=None)
@given(
    length=st.sampled_from([1, 7, 24, 37]),
    chunk_len=st.sampled_from([1, 3, 8]),
    n_hashes=st.sampled_from([1, 2, 4]),
    n_buckets=st.sampled_from([1, 2, 6]),
    causal=st.booleans(),
    masked=st.booleans(),
    neighbourhood=st.sampled_from(['bucket', 'chunk', 'circle']),
    duplicates=st.sampled_from(['count', 'once']),
    together=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 3),
)
def test_output_and_gradient_are_the_equations(
    length,
    chunk_len,
    n_hashes,
    n_buckets,
    causal,
    masked,
    neighbourhood,
    duplicates,
    together,
    seed,
):
    q, v, buckets = case(length, n_hashes, n_buckets, seed)
    mask = jax.random.bernoulli(jax.random.key(seed), 0.7, (1, length)) if masked else None
    real = np.ones(length, bool) if mask is None else np.asarray(mask[0])
    counts = []
    for head in np.asarray(buckets[0]):
        count = windows(head, chunk_len, causal, real, neighbourhood).sum(0)
        counts.append(np.minimum(count, 1) if duplicates == 'once' else count)

    def fast(q, v):
        return lsh_attention(
            q,
            v,
            buckets,
            n_buckets=n_buckets,
            chunk_len=chunk_len,
            causal=causal,
            mask=mask,
            neighbourhood=neighbourhood,
            duplicates=duplicates,
            chunks_together=together,
            heads_together=together,
        )

    def slow(q, v):
        heads = [reference(q[0, h], v[0, h], counts[h].astype(np.float32)) for h in range(2)]
        return jnp.stack(heads)[None]

    y, pull = jax.vjp(fast, q, v)
    expected, pull_slow = jax.vjp(slow, q, v)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    ct = jax.random.normal(jax.random.key(5), y.shape)
    for ours, theirs in zip(pull(ct), pull_slow(ct), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize('together', [None, 1, 4])
@pytest.mark.parametrize('options', [{}, {'scale': 0.3, 'softcap': 0.5, 'duplicates': 'once'}])
def test_values_may_be_shared_and_scores_capped(together, options):
    q, v, buckets = case(37, 2, 4, heads=4, shared=2)
    real = np.ones(37, bool)
    counts = [windows(b, 8, True, real, 'bucket').sum(0) for b in np.asarray(buckets[0])]
    if options:
        counts = [np.minimum(count, 1) for count in counts]
    scores = {name: options[name] for name in options if name != 'duplicates'}

    def fast(q, v):
        given = {'n_buckets': 4, 'chunk_len': 8, 'heads_together': together, **options}
        return lsh_attention(q, v, buckets, **given)

    def slow(q, v):
        heads = [
            reference(q[0, h], v[0, h // 2], counts[h].astype(np.float32), **scores)
            for h in range(4)
        ]
        return jnp.stack(heads)[None]

    y, pull = jax.vjp(fast, q, v)
    expected, pull_slow = jax.vjp(slow, q, v)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    ct = jax.random.normal(jax.random.key(5), y.shape)
    for ours, theirs in zip(pull(ct), pull_slow(ct), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize('kernels', [True, False])
@pytest.mark.parametrize('duplicates', ['count', 'once'])
def test_decoding_with_shared_values_and_capped_scores(kernels, duplicates):
    net = tl.LSHSelfAttention(
        4,
        n_kv_heads=2,
        n_hashes=2,
        chunk_len=4,
        n_buckets=4,
        duplicates=duplicates,
        scale=0.3,
        softcap=0.5,
        query_norm=tl.RMSNorm(),
    )
    x = jax.random.normal(jax.random.key(0), (2, 20, 8))
    signature = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    weights, state = net.init(signature, jax.random.key(1), Mode.PREDICT)
    (wanted,), _ = net.apply(weights, {}, (x,), mode=Mode.EVAL)
    assert state['core'].v.shape[0] == 4 and state['core'].k.shape[0] == 8

    @jax.jit
    def step(state, x):
        return net.apply(weights, state, (x,), mode=Mode.PREDICT)

    with contextlib.nullcontext() if kernels else layercomb_kernels.off():
        made = []
        for start, stop in ((0, 9), *((t, t + 1) for t in range(9, 20))):
            (y,), state = step(state, x[:, start:stop])
            made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), wanted, rtol=1e-4, atol=1e-5)


def test_one_bucket_and_one_chunk_is_dense_attention_with_shared_queries_and_keys():
    q, v, buckets = case(40, 3, 1)
    y = lsh_attention(q, v, buckets, n_buckets=1, chunk_len=40)
    causal = np.tril(np.ones((40, 40), np.float32))
    for h in range(2):
        np.testing.assert_allclose(y[0, h], reference(q[0, h], v[0, h], causal), atol=1e-5)


BUCKETS = st.sampled_from([{'n_buckets': 6}, {'n_buckets': (4, 2)}, {'max_len': 80}])


@settings(max_examples=4, deadline=None)
@given(
    length=st.sampled_from([2, 9, 40]),
    n_hashes=st.sampled_from([1, 3]),
    chunk_len=st.sampled_from([3, 8]),
    buckets=BUCKETS,
    mode=st.sampled_from([Mode.EVAL, Mode.TRAIN]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_no_later_position_moves_an_earlier_output(
    length, n_hashes, chunk_len, buckets, mode, seed, data
):
    layer = tl.LSHAttention(n_hashes=n_hashes, chunk_len=chunk_len, seed=seed, **buckets)
    q, v, _ = case(length, 1, 2, seed)

    def attend(q, v):
        return layer.apply({}, {}, (q, v), rng=jax.random.key(seed), mode=mode)[0][0]

    t = data.draw(st.integers(1, length - 1))
    before, q_2, v_2 = attend(q, v), q.at[:, :, t:].add(1.5), v.at[:, :, t:].multiply(-2)
    # The same positions are summed, but perhaps in another order within a chunk: a last bit, found
    # at length 40 with one round, chunk_len 8, 6 buckets.
    np.testing.assert_allclose(attend(q_2, v_2)[:, :, :t], before[:, :, :t], rtol=0, atol=3e-7)
    after = attend(jnp.concatenate([q_2, q_2], 2), jnp.concatenate([v_2, v_2], 2))
    np.testing.assert_allclose(after[:, :, :t], before[:, :, :t], atol=1e-6)


@settings(max_examples=4, deadline=None)
@given(
    length=st.sampled_from([2, 9, 30]),
    n_hashes=st.sampled_from([1, 3]),
    buckets=BUCKETS,
    causal=st.booleans(),
    neighbourhood=st.sampled_from(['bucket', 'chunk', 'circle']),
    seed=st.integers(0, 99),
)
def test_padding_is_neither_seen_nor_seeing(length, n_hashes, buckets, causal, neighbourhood, seed):
    layer = tl.LSHAttention(
        n_hashes=n_hashes,
        chunk_len=8,
        causal=causal,
        masked=True,
        neighbourhood=neighbourhood,
        seed=seed,
        **buckets,
    )
    q, v, _ = case(length, 1, 2, seed)
    mask = jax.random.bernoulli(jax.random.key(seed), 0.6, (1, length))
    (before,), _ = layer.apply({}, {}, (q, v, mask))
    hidden = ~mask[:, None, :, None]
    other = jnp.where(hidden, 9.0, q), jnp.where(hidden, -9.0, v), mask
    (after,), _ = layer.apply({}, {}, other)
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert not jnp.where(hidden, before, 0.0).any()


def test_dropout_has_the_gradient_of_what_it_computes():
    q, v, buckets = case(24, 2, 4)

    def f(q, v):
        y = lsh_attention(
            q, v, buckets, n_buckets=4, chunk_len=8, dropout_rate=0.3, rng=jax.random.key(0)
        )
        return (y * y[:, :, ::-1]).sum()

    step = 1e-2
    d_q, d_v = jax.grad(f, (0, 1))(q, v)
    along = jax.random.normal(jax.random.key(9), q.shape)
    slope = (f(q + step * along, v) - f(q - step * along, v)) / (2 * step)
    np.testing.assert_allclose((d_q * along).sum(), slope, rtol=2e-2)
    along = jax.random.normal(jax.random.key(9), v.shape)
    slope = (f(q, v + step * along) - f(q, v - step * along)) / (2 * step)
    np.testing.assert_allclose((d_v * along).sum(), slope, rtol=2e-2)


def test_rounds_may_be_changed_after_training():
    few, many = (tl.LSHSelfAttention(2, n_hashes=n, chunk_len=4, max_len=16) for n in (1, 8))
    x = jax.random.normal(jax.random.key(0), (1, 16, 8))
    weights, _ = few.init(lc.signature_of(x), jax.random.key(1))
    (y,), _ = many.apply(weights, {}, (x,))
    assert np.isfinite(y).all() and not np.allclose(y, few.apply(weights, {}, (x,))[0][0])


def test_more_rounds_keep_the_first_ones():
    q, _, _ = case(20, 1, 4)
    few = lsh_buckets(q, jax.random.key(3), n_buckets=(4, 2), n_hashes=2)
    many = lsh_buckets(q, jax.random.key(3), n_buckets=(4, 2), n_hashes=5)
    np.testing.assert_array_equal(few, many[:, :, :2])
    assert few.max() < 8 and few.min() >= 0


def test_buckets_are_the_argmax_of_the_rotation_and_its_negative():
    q, _, _ = case(1500, 1, 4, heads=1)
    got = lsh_buckets(q, jax.random.key(3), n_buckets=6, n_hashes=2)
    for r in range(2):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), r)
        y = q[0, 0] @ jax.random.normal(key, (4, 3))
        expected = jnp.argmax(jnp.concatenate([y, -y], -1), -1)
        assert (got[0, 0, r] == expected).mean() > 0.999


def test_many_buckets_are_hashed_in_pieces_that_fit_a_cache():
    q, _, _ = case(300, 1, 4, heads=2)
    rotations = jax.random.normal(jax.random.key(3), (2, 8, 96, 4))  # pieces of 128 positions
    got = rotated_buckets(q, rotations, n_buckets=(128, 64))
    y = np.einsum('bhtk,hrfk->bhrtf', q, rotations)
    high, low = (np.concatenate([x, -x], -1).argmax(-1) for x in (y[..., :64], y[..., 64:]))
    assert (got == 64 * high + low).mean() > 0.999


@pytest.mark.parametrize('factors', [(128, 64), (6,), (1,), (2, 1, 4)])
@pytest.mark.parametrize('depth', [64, 13])
def test_one_position_is_hashed_as_many_are(factors, depth):
    q = jax.random.normal(jax.random.key(0), (3, 2, 1, depth))
    rotations = jax.random.normal(jax.random.key(1), (2, 5, sum(f // 2 for f in factors), depth))
    got = jax.jit(functools.partial(rotated_buckets, n_buckets=factors))(q, rotations)
    with layercomb_kernels.off():
        plain = rotated_buckets(q, rotations, n_buckets=factors)
    many = rotated_buckets(
        jnp.pad(q, [(0, 0)] * 2 + [(0, 1), (0, 0)]), rotations, n_buckets=factors
    )
    np.testing.assert_array_equal(got, plain)
    np.testing.assert_array_equal(got, many[..., :1])


def test_one_position_takes_equal_and_unknown_scores_as_many_do():
    q = jnp.asarray([[[[1.0, 0.0]]], [[[0.0, 0.0]]], [[[jnp.nan, 0.0]]], [[[-1.0, 0.0]]]])
    rotations = jnp.asarray([[1.0, 0.0], [-1.0, 2.0], [1.0, 3.0]])[None, None]
    got = jax.jit(functools.partial(rotated_buckets, n_buckets=6))(q, rotations)
    with layercomb_kernels.off():
        np.testing.assert_array_equal(got, rotated_buckets(q, rotations, n_buckets=6))
    np.testing.assert_array_equal(got[:, 0, 0, 0], [0, 0, 5, 1])


def test_automatic_buckets_are_even_and_enough():
    for length in (1, 64, 1000, 4096, 65536, 1 << 20):
        factors = automatic_buckets(length, 64)
        assert all(f % 2 == 0 for f in factors)
        assert np.prod(factors) >= 2 * length // 64


@pytest.mark.parametrize(
    ('neighbourhood', 'duplicates'),
    [('bucket', 'count'), ('bucket', 'once'), ('chunk', 'count'), ('circle', 'count')],
)
def test_a_prompt_and_single_positions_see_what_the_whole_sees(neighbourhood, duplicates):
    layer = tl.LSHSelfAttention(
        2,
        n_hashes=3,
        chunk_len=4,
        n_buckets=4,
        neighbourhood=neighbourhood,
        duplicates=duplicates,
        masked=True,
    )
    x = jax.random.normal(jax.random.key(1), (2, 23, 8))
    mask = jnp.ones((2, 23), bool).at[1, 2:5].set(False)
    signature = lc.signature_of((x, mask))
    weights, state = layer.init(signature, jax.random.key(0), Mode.PREDICT)
    outputs, at = [], 0
    step = jax.jit(functools.partial(layer.apply, mode=Mode.PREDICT))
    for length in (9, 1, 1, 5, *[1] * 7):
        piece = x[:, at : at + length], mask[:, at : at + length]
        (y,), state = step(weights, state, piece)
        outputs.append(y)
        at += length
    for t in (23,) if neighbourhood == 'bucket' else (9, 10, 11, 16, 23):
        (expected,), _ = layer.apply(weights, {}, (x[:, :t], mask[:, :t]), mode=Mode.EVAL)
        got = jnp.concatenate(outputs, 1)[:, :t]
        where = slice(0, t) if neighbourhood == 'bucket' else slice(t - 1, t)
        np.testing.assert_allclose(got[:, where], expected[:, where], atol=1e-5)
    with pytest.raises(ValueError, match='the cache holds 23 positions, 23 are taken and 1 more'):
        layer.apply(weights, state, (x[:, :1], mask[:, :1]), mode=Mode.PREDICT)


def test_recorded_buckets_are_replayed():
    layer = tl.LSHAttention(chunk_len=4, n_buckets=4)
    q, v, _ = case(16, 1, 4)

    def apply(state, mode):
        return layer.apply({}, state, (q, v), rng=jax.random.key(2), mode=mode)

    (y,), recorded = apply({}, Mode.RECORD)
    buckets = own(recorded, Decisions).values['buckets']
    assert buckets.dtype == jnp.uint8
    (trained,), plain = apply({}, Mode.TRAIN)
    assert not plain
    np.testing.assert_array_equal(trained, y)
    flipped = beside({}, Decisions({'buckets': buckets[..., ::-1]}))
    (replayed,), _ = apply(recorded, Mode.REPLAY)
    (other,), _ = apply(flipped, Mode.REPLAY)
    np.testing.assert_array_equal(replayed, y)
    assert not np.allclose(other, y)


@pytest.mark.parametrize('neighbourhood', ['bucket', 'circle'])
def test_temporaries_grow_with_the_length_alone(optimized, neighbourhood):
    def step(q, v, buckets):
        f = functools.partial(
            lsh_attention, n_buckets=64, chunk_len=64, neighbourhood=neighbourhood
        )
        return jax.grad(lambda q: f(q, v, buckets).sum())(q)

    sizes = []
    for length in (2048, 4096):
        shapes = [(1, 2, length, 32)] * 2 + [(1, 2, 4, length)]
        dtypes = [jnp.float32] * 2 + [jnp.int32]
        args = map(jax.ShapeDtypeStruct, shapes, dtypes)
        memory = jax.jit(step).lower(*args).compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 2.2 * sizes[0]
    assert sizes[1] < 24 * 4096 * 32 * 4


def in_float32(q, v, buckets, chunk_len):
    """One head as transformers computes it: a softmax a round, and scores of −10⁵ in float32."""
    length = buckets.shape[1]
    seen = circle(buckets, chunk_len, True, np.ones(length, bool))
    s = q @ (q / np.linalg.norm(q, axis=-1, keepdims=True)).T
    s = np.where(np.eye(length, dtype=bool), np.float32(-1e5), s)
    logits, outputs = [], []
    for count in seen:
        m = np.where(count > 0, s, -np.inf).max(-1, keepdims=True)
        z = m + np.log((count * np.exp(np.where(count > 0, s - m, 0))).sum(-1, keepdims=True))
        z = z.astype(np.float32)
        outputs.append(count * np.exp(np.where(count > 0, s - z, 0)) @ v)
        logits.append(z)
    z = np.stack(logits)
    m = z.max(0)
    share = np.exp(z - (m + np.log(np.exp(z - m).sum(0))).astype(np.float32))
    return (share * np.stack(outputs)).sum(0)


@pytest.mark.parametrize('n_hashes', [1, 3])
def test_what_is_alone_is_rounded_as_elsewhere(n_hashes):
    q, v, buckets = case(20, n_hashes, 4)
    options = {'n_buckets': 4, 'chunk_len': 4, 'neighbourhood': 'circle'}

    def attend(v, alone):
        return lsh_attention(q, v, buckets, alone=alone, **options)

    y, pull = jax.vjp(lambda v: attend(v, 'rounded'), v)
    arrays = (np.asarray(x[0]) for x in (q, v, buckets))
    wanted = np.stack([in_float32(*head, 4) for head in zip(*arrays, strict=True)])
    np.testing.assert_allclose(y[0], wanted, rtol=2e-5, atol=2e-5)
    parted = np.abs(y - attend(v, 'exact')).max((0, 1, 3))
    assert (parted[0] > 1e-4) == (n_hashes == 3) and parted[-1] < 1e-6
    ct = jax.random.normal(jax.random.key(5), y.shape)
    other = jax.random.normal(jax.random.key(6), v.shape)  # y is linear in v
    along = (attend(v + other, 'rounded') - y) * ct
    np.testing.assert_allclose((pull(ct)[0] * other).sum(), along.sum(), rtol=1e-3)


@pytest.mark.parametrize('length', [9, 17, 24])
@pytest.mark.parametrize('causal', [True, False])
def test_rounds_of_a_circle_may_be_filled_further(length, causal):
    """That is the same as padding which a mask hides."""
    q, v, buckets = case(length, 2, 4)
    more = -length % 12
    wide = [(0, 0), (0, 0), (0, more), (0, 0)]
    given = {'n_buckets': 4, 'chunk_len': 4, 'neighbourhood': 'circle', 'causal': causal}
    y = lsh_attention(q, v, buckets, round_len=12, **given)
    wanted = lsh_attention(
        jnp.pad(q, wide),
        jnp.pad(v, wide),
        jnp.pad(buckets, [*wide[:2], (0, 0), (0, more)]),
        mask=(jnp.arange(length + more) < length)[None],
        **given,
    )
    np.testing.assert_allclose(y, wanted[:, :, :length], atol=1e-6)


def test_rotations_of_torch_come_from_the_seed():
    layer = tl.LSHAttention(chunk_len=4, n_buckets=(4, 2), n_hashes=3, rotations='torch', seed=7)
    q, v, _ = case(16, 1, 4)
    recorded = rotated_buckets(
        q, torch_rotations(7, 2, 4, n_buckets=(4, 2), n_hashes=3), n_buckets=(4, 2)
    )
    normal = torch_normal(7, (2, 4, 3, 3))  # its factors are (2, 4), the first counts fastest
    y = np.einsum('bhtk,hkrf->bhrtf', q, normal)
    low, high = (np.concatenate([part, -part], -1).argmax(-1) for part in (y[..., :1], y[..., 1:]))
    np.testing.assert_array_equal(recorded, low + 2 * high)
    (got,), _ = layer.apply({}, {}, (q, v), mode=Mode.EVAL)
    wanted = lsh_attention(q, v, recorded, n_buckets=8, chunk_len=4)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (
            lambda: tl.LSHSelfAttention(4, n_buckets=7),
            ValueError,
            'or 1 for a single bucket: use 8',
        ),
        (
            lambda: tl.LSHAttention(n_buckets=1, rotations='torch'),
            ValueError,
            "n_buckets=1: torch's rotations make even numbers",
        ),
        (
            lambda: tl.LSHSelfAttention(4, n_buckets=2, alone='rounded'),
            ValueError,
            "alone='rounded': it is 'exact', or 'rounded' for causal",
        ),
        (
            lambda: tl.LSHSelfAttention(4, chunk_len=8, neighbourhood='circle', round_len=12),
            ValueError,
            "round_len=12 is of neighbourhood='circle', and a multiple of chunk_len=8",
        ),
        (lambda: tl.LSHSelfAttention(4, n_buckets=(8, 3)), ValueError, 'n_buckets=.8, 3.'),
        (lambda: tl.LSHSelfAttention(4, chunk_len=0), ValueError, 'chunk_len'),
        (lambda: tl.LSHSelfAttention(4, n_hashes=0), ValueError, 'n_hashes'),
        (lambda: tl.LSHAttention(neighbourhood='near'), (ValueError, TypeError), 'neighbourhood'),
    ],
)
def test_bad_fields_are_refused_when_a_layer_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nan_shows():
    q, v, _ = case(12, 1, 4)
    q = q.at[0, 0, 5, 1].set(jnp.nan)
    buckets = lsh_buckets(q, jax.random.key(0), n_buckets=4, n_hashes=2)
    assert buckets.max() < 4
    y = lsh_attention(q, v, buckets, n_buckets=4, chunk_len=12)
    assert jnp.isnan(y[0, 0]).any() and not jnp.isnan(y[0, 1]).any()


def test_decoding_without_a_number_of_buckets_is_refused():
    signature = (lc.shape_dtype((1, 8, 4)),)
    with pytest.raises(ValueError, match='decoding needs the number of buckets of training: give'):
        tl.LSHSelfAttention(2).init(signature, jax.random.key(0), Mode.PREDICT)
    with pytest.raises(ValueError, match=r'8.*max_len.*4|max_len=4'):
        tl.LSHSelfAttention(2, max_len=4).init(signature, jax.random.key(0))


def test_narrow_queries_have_the_gradient_of_the_keys_that_were_used():
    q, v, buckets = case(24, 2, 4, depth=8)
    wide = q.astype(jnp.bfloat16), v.astype(jnp.bfloat16)

    def loss(q, v):
        y = lsh_attention(q, v, buckets, n_buckets=4, chunk_len=8).astype(jnp.float32)
        return (y * y[:, :, ::-1]).sum()

    narrow = jax.grad(loss, (0, 1))(*wide)
    exact = jax.grad(loss, (0, 1))(*(x.astype(jnp.float32) for x in wide))
    for ours, theirs in zip(narrow, exact, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.03 * scale)
