"""Attention by native kernels against XLA's way, and against the full matrix in float64."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels as kernels
from layercomb.layers.attention.functions import dot_product_attention
from layercomb.layers.quantized.native import attends_natively

pytestmark = pytest.mark.skipif(not kernels.available(), reason='no kernels here')


def drawn(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradients(f, q, k, v, d_out):
    out, pull = jax.vjp(f, q, k, v)
    return out, *pull(d_out)


def by_kernel(q, k, v, d_out, sight, **given):
    """The output and the gradients of q, k and v, without a program around them."""
    kept = kernels.flash_forward(sight, q, k, v, **given)
    return kept[0], *kernels.flash_backward(sight, q, k, v, kept, d_out, **given)


def by_matrix(q, k, v, d_out, sight, mask=None, offset=None, segments=None):
    """The same by the definition, in float64."""
    b, h, n_queries, _ = q.shape
    n_keys, group = k.shape[2], h // k.shape[1]
    at = (
        np.arange(n_queries) + (np.zeros(b, int) if offset is None else np.asarray(offset))[:, None]
    )
    at, key = at[:, None, :, None], np.arange(n_keys)  # (B, 1, Lq, 1), (Lk,)
    see = np.broadcast_to(key <= at if sight.causal else key >= 0, (b, 1, n_queries, n_keys))
    if sight.window:
        see = see & (key > at - sight.window)
    if mask is not None:
        see = see & np.asarray(mask)[:, None, None]
    if segments is not None:
        see = see & np.equal(segments[:, None, :, None], segments[:, None, None])
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    s = sight.scale * q @ k.swapaxes(2, 3)
    slope = 1.0
    if sight.softcap:
        s = sight.softcap * np.tanh(s / sight.softcap)
        slope = 1 - np.square(s / sight.softcap)
    s = np.where(see, s, -1e300)
    p = np.exp(s - s.max(-1, keepdims=True)) * see
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    d_p = d_out @ v.swapaxes(2, 3)
    d_s = sight.scale * slope * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    d_k, d_v = d_s.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out
    d_k, d_v = (x.reshape(b, -1, group, *x.shape[2:]).sum(2) for x in (d_k, d_v))
    return p @ v, d_s @ k, d_k, d_v


def assert_close(got, wanted, tolerance=1e-5):
    for name, x, y in zip(('output', 'q', 'k', 'v'), got, wanted, strict=True):
        atol = tolerance * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize('seed', range(16))
def test_the_kernels_are_the_full_softmax(seed):
    rng = np.random.default_rng(seed)
    b, g, group = rng.integers(1, 4, 3)
    d_key, d_value = 16 * rng.integers(1, 9, 2)
    n_queries, n_keys = rng.choice([1, 2, 17, 63, 64, 65, 127, 128, 130, 200, 300], 2)
    causal = bool(rng.integers(2))
    sight = kernels.Sight(
        scale=rng.choice([d_key**-0.5, 1.0]),
        causal=causal,
        window=int(rng.choice([1, 5, 70])) if causal and rng.integers(2) else None,
        softcap=5.0 if rng.integers(3) == 0 else None,
    )
    given = {}
    if rng.integers(2):
        given['mask'] = jnp.asarray(rng.random((b, n_keys)) < 0.7).at[0].set(False)
    if rng.integers(2):
        given['offset'] = jnp.asarray(rng.integers(0, 100, b), jnp.int32)
    elif rng.integers(2):
        n_queries = n_keys
        given['segments'] = jnp.asarray(np.sort(rng.integers(0, 4, (b, n_keys))), jnp.int32)
    shapes = [(b, g * group, n_queries, d_key), (b, g, n_keys, d_key), (b, g, n_keys, d_value)]
    args = drawn(*shapes, (b, g * group, n_queries, d_value), seed=seed)
    tolerance = 1e-5 if sight.scale < 1 else 2e-5
    assert_close(by_kernel(*args, sight, **given), by_matrix(*args, sight, **given), tolerance)


@pytest.mark.parametrize(
    'options',
    [
        {'causal': True},
        {'mask': jnp.arange(150)[None] < jnp.array([[150], [0]])},
        {'causal': True, 'window': 40, 'softcap': 3.0, 'offset': jnp.array([0, 7], jnp.int32)},
    ],
    ids=['causal', 'masked', 'windowed'],
)
def test_they_are_what_xla_computes(options):
    args = drawn((2, 4, 150, 32), (2, 2, 150, 32), (2, 2, 150, 16), (2, 4, 150, 16))

    def f(q, k, v):
        return dot_product_attention(q, k, v, **options)

    both = jax.jit(lambda *args: with_gradients(f, *args))
    assert 'layercomb_flash_backward' in both.lower(*args).as_text()
    fast = both(*args)
    with kernels.off():
        assert 'layercomb' not in both.lower(*args).as_text()
        assert_close(fast, both(*args))


def test_they_are_used_where_they_apply():
    q, k, wide = drawn((1, 2, 8, 16), (1, 1, 8, 16), (1, 1, 8, 24))
    assert attends_natively(q, k, k)
    assert not attends_natively(q, k, wide)  # its depth is no whole number of vectors
    assert not attends_natively(q.astype(jnp.bfloat16), k, k)
    with kernels.off():
        assert not attends_natively(q, k, k)
    text = jax.jit(dot_product_attention).trace(q, k, k).lower(lowering_platforms=('cuda',))
    assert 'layercomb' not in text.as_text()


@pytest.mark.parametrize('dropout', [False, True])
def test_what_they_lack_is_left_to_xla(dropout):
    q, k = drawn((1, 2, 8, 16), (1, 1, 8, 16))
    more = (
        {'dropout_rate': 0.5, 'rng': jax.random.key(0)} if dropout else {'bias': jnp.ones((3, 2))}
    )
    f = jax.jit(lambda q, k: dot_product_attention(q, k, k, **more))
    assert 'layercomb' not in f.lower(q, k).as_text()


def test_mapped_scanned_and_rematerialized_they_are_the_same():
    args = drawn((3, 1, 2, 20, 16), (3, 1, 1, 20, 16), (3, 1, 1, 20, 16), (3, 1, 2, 20, 16))

    def f(q, k, v):
        return jax.checkpoint(lambda *x: dot_product_attention(*x, causal=True))(q, k, v)

    def one(*args):
        return with_gradients(f, *args)

    wanted = [
        jnp.stack(xs) for xs in zip(*[one(*row) for row in zip(*args, strict=True)], strict=True)
    ]
    mapped = jax.jit(jax.vmap(one))(*args)
    scanned = jax.jit(lambda *args: jax.lax.map(lambda row: one(*row), args))(*args)
    jax.tree.map(np.testing.assert_array_equal, tuple(wanted), mapped)
    jax.tree.map(np.testing.assert_array_equal, mapped, scanned)


def test_a_query_does_not_depend_on_the_others():
    """So that a prompt read in pieces gives bit for bit what it gives at once."""
    q, k, v = drawn((1, 2, 200, 32), (1, 1, 200, 32), (1, 1, 200, 32))
    sight = kernels.Sight(0.2, causal=True)
    whole, z = kernels.flash_forward(sight, q, k, v)
    for first, last in ((0, 1), (3, 80), (80, 200)):
        offset = jnp.array([first], jnp.int32)
        y, its = kernels.flash_forward(sight, q[:, :, first:last], k, v, offset=offset)
        np.testing.assert_array_equal(y, whole[:, :, first:last])
        np.testing.assert_array_equal(its, z[:, :, first:last])


def test_segments_are_as_if_each_were_alone():
    q, k, v, d_out = drawn((1, 2, 300, 16), (1, 1, 300, 16), (1, 1, 300, 16), (1, 2, 300, 16))
    sight, bounds = kernels.Sight(0.25, causal=True), (0, 5, 140, 141, 300)
    segments = np.zeros((1, 300), np.int32)
    for first in bounds[1:-1]:
        segments[:, first:] += 1
    got = by_kernel(q, k, v, d_out, sight, segments=jnp.asarray(segments))
    for first, last in itertools.pairwise(bounds):
        args = (x[:, :, first:last] for x in (q, k, v, d_out))
        its = [x[:, :, first:last] for x in got]
        assert_close(its, [np.asarray(x) for x in by_kernel(*args, sight)])


def test_large_scores_do_not_overflow():
    q, k, v, d_out = drawn((1, 1, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16), (1, 1, 70, 16))
    args = 1e3 * q, 1e3 * k, v, d_out
    got = by_kernel(*args, kernels.Sight(1.0))
    assert all(np.isfinite(x).all() for x in got)
    largest = jnp.take_along_axis(v, jnp.argmax(q @ k.swapaxes(2, 3), -1)[..., None], 2)
    np.testing.assert_allclose(got[0], largest, atol=1e-5)
    huge = by_kernel(1e15 * q, 1e15 * k, v, d_out, kernels.Sight(1.0, causal=True))
    assert all(np.isfinite(x).all() for x in huge[:1])


def test_not_a_number_is_not_hidden():
    q, k, v = drawn((1, 1, 5, 16), (1, 1, 5, 16), (1, 1, 5, 16))
    y, _ = kernels.flash_forward(kernels.Sight(1.0), q.at[0, 0, 2, 3].set(jnp.nan), k, v)
    assert np.isnan(y[0, 0, 2]).all() and np.isfinite(y[0, 0, 3]).all()


def test_who_sees_nothing_gets_zeros():
    args = drawn((2, 2, 70, 16), (2, 2, 70, 16), (2, 2, 70, 16), (2, 2, 70, 16))
    mask = jnp.zeros((2, 70), bool).at[0, 3].set(True)
    got = by_kernel(*args, kernels.Sight(1.0, causal=True), mask=mask)
    assert not any(np.asarray(x)[1].any() for x in got)
    assert not np.asarray(got[0])[0, :, :3].any() and np.asarray(got[0])[0, :, 3:].all()
    assert not np.asarray(got[2])[0, :, 4:].any()


def test_queries_before_the_first_key_see_nothing():
    offset = jnp.array([-140, -3], jnp.int32)
    args = drawn((2, 2, 150, 16), (2, 1, 130, 16), (2, 1, 130, 16), (2, 2, 150, 16))
    sight = kernels.Sight(0.25, causal=True)
    wanted = by_matrix(*args, sight, offset=offset)
    assert not wanted[1][0, :, :140].any()
    assert_close(by_kernel(*args, sight, offset=offset), wanted)

    def f(q, k, v):
        return dot_product_attention(q, k, v, causal=True, offset=offset, block_len=64)

    with kernels.off():
        assert_close(with_gradients(f, *args), wanted)


def test_every_run_is_the_same_bit_for_bit():
    shapes = (1, 4, 700, 16), (1, 2, 700, 16), (1, 2, 700, 16), (1, 4, 700, 16)
    args, sight = drawn(*shapes), kernels.Sight(0.2, causal=True)
    first = by_kernel(*args, sight)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, by_kernel(*args, sight), first)


_PROGRAM = """
import hashlib, numpy as np, layercomb_kernels as kernels
q, k, v, d = (np.random.default_rng(i).normal(size=(1, h, 700, 32)).astype(np.float32)
              for i, h in enumerate((4, 2, 2, 4)))
sight = kernels.Sight(0.2, causal=True)
kept = kernels.flash_forward(sight, q, k, v)
made = *kept, *kernels.flash_backward(sight, q, k, v, kept, d)
print(hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in made)).hexdigest())
"""


@pytest.mark.slow
def test_it_does_not_depend_on_the_number_of_threads():
    def digest(n_threads):
        environment = {**os.environ, 'NPROC': str(n_threads)}
        command = [sys.executable, '-c', _PROGRAM]
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    assert digest(1) == digest(2) == digest(7)
