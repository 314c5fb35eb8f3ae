"""`selected_attention` against the sentence that defines it, written as loops over positions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels
from layercomb.layers.attention.selected.function import selected_attention

KINDS = ('random', 'one', 'half', 'half of keys', 'apart')
BASE = {'b': 2, 'h': 2, 'g': 2, 'r': 2, 'length': 37, 'n': 8, 'local_len': 5, 'n_sinks': 0}
CASES = [
    {},
    {'r': 1, 'length': 61, 'local_len': 0},
    {'length': 64, 'masked': True},
    {'r': 4, 'length': 50, 'n': 4, 'local_len': 11, 'n_sinks': 3},
    {'length': 9, 'n': 16, 'masked': True, 'n_sinks': 2},
    {'r': 3, 'length': 130, 'segmented': True, 'n_sinks': 2},
    {'h': 4, 'length': 40, 'segmented': True, 'masked': True, 'n_sinks': 1},
    {'h': 6, 'g': 2, 'length': 70},
    {'causal': False, 'segmented': True, 'n_sinks': 3},
    {'causal': False, 'h': 4, 'masked': True, 'local_len': 4, 'length': 45},
    {'causal': False, 'n': 1, 'local_len': 0},
    {'r': 0, 'local_len': 7, 'length': 33},
]


def arrays(kind, case, seed):
    """q, k, v, buckets, and what goes with them; buckets are random, or as skewed as they get."""
    g = np.random.default_rng(seed)
    b, h, heads, r, length = (case[name] for name in ('b', 'h', 'g', 'r', 'length'))
    q = g.normal(size=(b, h, length, 16)).astype(np.float32)
    k, v = g.normal(size=(2, b, heads, length, 16)).astype(np.float32)
    bq, bk = (g.integers(0, 6, (b, n, r, length)) for n in (h, heads))
    if kind == 'one':
        bq[:], bk[:] = 5, 5
    if kind in ('half', 'half of keys'):
        bk[g.random(bk.shape) < 0.5] = 1
    if kind == 'half':
        bq[g.random(bq.shape) < 0.5] = 1
    if kind == 'apart':  # the buckets of most queries hold no keys
        bk[g.random(bk.shape) < 0.9] = 0
        bq[g.random(bq.shape) < 0.9] = 1
    further = {'mask': None, 'segments': None}
    if case.get('masked'):
        further['mask'] = jnp.asarray(g.random((b, length)) < 0.8)
    if case.get('segmented'):
        numbers = np.sort(g.integers(1, 5, (b, length)), 1).astype(np.int32)
        further['segments'] = jnp.asarray(numbers)
    return [jnp.asarray(x) for x in (q, k, v, bq, bk)], further


def counts(bq, bk, case, mask, segments):
    """How often each query finds each key, (B, H, L, L)."""
    (b, h, rounds, length), n = bq.shape, case['n']
    real = np.ones((b, length), bool) if mask is None else np.asarray(mask)
    document = np.zeros((b, length), int) if segments is None else np.asarray(segments)
    causal, group = case.get('causal', True), h // bk.shape[1]
    made = np.zeros((b, h, length, length), np.float32)

    def near(found, i, n):
        before, after = [j for j in found if j <= i], [j for j in found if j > i]
        if causal:
            return before[-n:]
        return before[-((n + 1) // 2):] + after[: n // 2]  # fmt: skip

    for row, head, i in np.ndindex(b, h, length):
        if not real[row, i]:
            continue
        there = [j for j in range(length) if real[row, j] and document[row, j] == document[row, i]]
        for r in range(rounds):
            same = [j for j in there if bk[row, head // group, r, j] == bq[row, head, r, i]]
            made[row, head, i, near(same, i, n)] += 1
        if case['local_len']:
            made[row, head, i, near(there, i, case['local_len'])] += 1
        first = [j for j in there if j <= i or not causal][: case['n_sinks']]
        made[row, head, i, first] += 1
    return made


def reference(q, k, v, n):
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, 1) for x in (k, v))
    s = jnp.where(n > 0, jnp.einsum('bhik,bhjk->bhij', q, k) / 16**0.5, -1e30)
    p = n * jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    total = p.sum(-1, keepdims=True)
    return jnp.einsum('bhij,bhjd->bhid', p / jnp.where(total > 0, total, 1), v)


@pytest.mark.parametrize(
    ('number', 'duplicates'),
    [(i, ('once', 'count')[i % 2]) for i in range(len(CASES))] + [(3, 'once'), (6, 'count')],
)
@pytest.mark.parametrize('kernels', [True, False])
def test_outputs_and_gradients_are_those_of_the_definition(number, duplicates, kernels):
    case = BASE | CASES[number]
    kind = KINDS[number % len(KINDS)]
    (q, k, v, bq, bk), further = arrays(kind, case, number)
    n = counts(np.asarray(bq), np.asarray(bk), case, **further)
    n = np.minimum(n, 1) if duplicates == 'once' else n
    options = {name: case[name] for name in ('local_len', 'n_sinks')}
    fast = functools.partial(
        selected_attention, q_buckets=bq, k_buckets=bk, n_buckets=6, n_keys=case['n'],
        causal=case.get('causal', True), duplicates=duplicates, tile_len=8, **options, **further,
    )  # fmt: skip
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    with contextlib.nullcontext() if kernels else layercomb_kernels.off():
        got, pull = jax.vjp(fast, q, k, v)
        grads = pull(d_out)
    wanted, pull_reference = jax.vjp(functools.partial(reference, n=jnp.asarray(n)), q, k, v)
    for a, b in zip((got, *grads), (wanted, *pull_reference(d_out)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def both(kernels, f, *args):
    with contextlib.nullcontext() if kernels else layercomb_kernels.off():
        return f(*args)


def simple(case=(), seed=0, **more):
    """Arrays, and the function of them."""
    (q, k, v, bq, bk), _ = arrays('random', BASE | dict(case), seed)
    options = {'n_buckets': 6, 'n_keys': 5, 'local_len': 4, **more}

    def f(q, k, v, bq=bq, bk=bk):
        return selected_attention(q, k, v, bq, bk, **options)

    return f, (q, k, v), (bq, bk)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('options', [{'softcap': 2.0}, {'scale': 0.4, 'n_sinks': 2}])
def test_kernels_and_tiles_are_the_same(options, causal):
    for depth in (32, 64, 128):
        f, args, _ = simple({'length': 70}, causal=causal, **options)
        args = [jnp.tile(x, (1, 1, 1, depth // 16)) / 4 for x in args]
        grad = jax.value_and_grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2))
        got, wanted = (both(kernels, grad, *args) for kernels in (True, False))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('kernels', [True, False])
def test_what_is_not_finite_stays_in_its_row(kernels):
    f, (q, k, v), _ = simple()
    grad = jax.grad(lambda *a: f(*a)[1].sum(), (0, 1, 2))
    spoilt = v.at[0].set(jnp.nan)
    assert jnp.isnan(both(kernels, f, q, k, spoilt)[0]).all()
    np.testing.assert_array_equal(both(kernels, f, q, k, spoilt)[1], both(kernels, f, q, k, v)[1])
    for a, b in zip(both(kernels, grad, q, k, spoilt), both(kernels, grad, q, k, v), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize('kernels', [True, False])
def test_padding_may_be_anything(kernels):
    mask = jnp.arange(37)[None] < jnp.array([[20], [30]])
    f, (q, k, v), _ = simple(mask=mask)
    spoilt = [jnp.where(mask[:, None, :, None], x, jnp.inf) for x in (k, v)]
    got, wanted = both(kernels, f, q, *spoilt), both(kernels, f, q, k, v)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('kernels', [True, False])
def test_documents_are_neighbours_of_one_number(kernels):
    ids = jnp.asarray(np.repeat([[-1, 3, -1]], [12, 13, 12], axis=1), jnp.int32)
    ids = jnp.broadcast_to(ids, (2, 37))
    numbered = jnp.asarray(np.repeat([[0, 1, 2]], [12, 13, 12], axis=1), jnp.int32)
    for causal in (True, False):
        f, args, _ = simple(segments=ids, causal=causal)
        g, _, _ = simple(segments=jnp.broadcast_to(numbered, (2, 37)), causal=causal)
        np.testing.assert_array_equal(both(kernels, f, *args), both(kernels, g, *args))


@pytest.mark.parametrize('kernels', [True, False])
def test_buckets_out_of_bounds_take_the_nearest(kernels):
    f, args, (bq, bk) = simple()
    got = both(kernels, lambda *a: f(*a, bq * 3 - 4, bk * 3 - 4), *args)
    wanted = both(kernels, lambda *a: f(*a, *(jnp.clip(b * 3 - 4, 0, 5) for b in (bq, bk))), *args)
    np.testing.assert_array_equal(got, wanted)


def test_a_window_of_everything_takes_no_more_room_than_there_is():
    f, args, _ = simple(local_len=2**30, n_keys=2**30, n_sinks=2**30)
    wanted, _, _ = simple(local_len=37)
    np.testing.assert_allclose(f(*args), wanted(*args), atol=1e-6)


@pytest.mark.skipif(not layercomb_kernels.available(), reason='no kernels here')
@pytest.mark.parametrize('causal', [True, False])
def test_kernels_take_any_size(causal):
    q, k, v, bq, bk = arrays('random', BASE, 0)[0]
    selection = layercomb_kernels.Selection(
        n_buckets=6, n_keys=37, local_len=0, n_sinks=0, causal=causal, once=True, scale=0.25
    )

    def both_ways(**sizes):
        its = dataclasses.replace(selection, **sizes)
        kept = layercomb_kernels.selected_forward(its, q, k, v, (bq, bk))
        gradients = layercomb_kernels.selected_backward(its, q, k, v, (bq, bk), kept, q)
        return (*kept, *gradients)

    for name in ('n_keys', 'local_len', 'n_sinks'):
        wanted = both_ways(**{name: 2 * 37})
        for size in (2**31 - 1, 2**40):
            for x, y in zip(both_ways(**{name: size}), wanted, strict=True):
                np.testing.assert_array_equal(x, y)
        with pytest.raises(ValueError, match=f'{name}=-1 must not be negative'):
            both_ways(**{name: -1})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'n_keys': 0}, 'n_keys=0 are at least 1'),
        ({'duplicates': 'twice'}, "duplicates is 'once' or 'count'"),
        ({'dropout_rate': 0.1}, 'needs a random key'),
        ({'dropout_rate': 1.0}, 'dropout_rate must be in'),
    ],
)
def test_bad_options_are_refused(options, message):
    f, args, _ = simple(**options)
    with pytest.raises(ValueError, match=message):
        f(*args)


def test_seeing_nothing_is_refused():
    f, args, _ = simple({'r': 0}, local_len=0)
    with pytest.raises(ValueError, match='no query sees a key: give buckets'):
        f(*args)


def test_dropout_has_the_gradient_of_what_it_computes():
    f, (q, k, v), _ = simple({'h': 4}, dropout_rate=0.4, rng=jax.random.key(3))
    direction = jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)
    grad = jax.grad(lambda v: f(q, k, v).sum())(v)
    change = f(q, k, v + direction).sum() - f(q, k, v).sum()  # it is linear in the values
    np.testing.assert_allclose((grad * direction).sum(), change, rtol=1e-3, atol=1e-3)
    assert jnp.abs(f(q, k, v) - simple({'h': 4})[0](q, k, v)).max() > 0.1
