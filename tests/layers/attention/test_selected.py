"""`selected_attention` against the sentence that defines it, written as loops over positions."""

from __future__ import annotations

import contextlib
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
