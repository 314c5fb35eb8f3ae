"""The C++ kernels: the same products as plain NumPy, and no harm where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels as kernels
from layercomb_kernels import build

needs_kernels = pytest.mark.skipif(not kernels.available(), reason='no kernels here')
KINDS = ('float32', 'bfloat16', 'int8', 'int4')


def rng():
    return np.random.default_rng(0)


def unpacked(words):
    """(…, n) bytes → (…, 2n) floats."""
    low, high = (words.astype(np.int8) << 4) >> 4, words.astype(np.int8) >> 4
    return np.concatenate([low, high], -1).astype(np.float32)


def matrix(kind, rows, columns, groups=1):
    """Words, scales and the wide weights."""
    scales = np.zeros((0, 0), np.float32)
    if kind in ('float32', 'bfloat16'):
        words = jnp.asarray(rng().normal(size=(rows, columns)), kind)
        return words, scales, np.asarray(words, np.float32)
    scales = rng().normal(size=(rows, groups)).astype(np.float32)
    if kind == 'int8':
        words = rng().integers(-127, 128, (rows, columns)).astype(np.int8)
        wide = words.astype(np.float32)
    else:
        words = rng().integers(0, 256, (rows, columns // 2)).astype(np.uint8)
        wide = unpacked(words)
    return words, scales, wide * np.repeat(scales, columns // groups, 1)


def assert_same(got, wanted, kind='float32'):
    """Integers, and many rows of bfloat16, are multiplied by activations of 16 bits."""
    tolerance = 4e-5 if kind.startswith('int') else 1e-5
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=tolerance * np.abs(wanted).max())


@needs_kernels
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('m', 'd', 'f', 'groups'),
    [
        (1, 128, 64, 2),
        (3, 280, 51, 4),
        (16, 96, 203, 2),
        (5, 44, 3, 2),
        (2, 40, 2000, 2),
        (1, 5000, 40, 2),
        (70, 256, 5, 4),
    ],
)
def test_row_products(kind, m, d, f, groups):
    words, scales, wide = matrix(kind, f, d, groups)
    x = rng().normal(size=(m, d)).astype(np.float32)
    rounded = 'int' if m > 16 and kind == 'bfloat16' else kind
    assert_same(jax.jit(kernels.row_products)(x, words, scales), x @ wide.T, rounded)


@needs_kernels
@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('m', 'd', 'f'),
    [
        (17, 1, 1),
        (33, 7, 50),
        (512, 130, 49),
        (24, 1155, 64),  # deeper than a panel, by no whole vector
        (23, 2048, 97),
        (40, 768, 384),
    ],
)
def test_products_of_many_rows(kind, m, d, f):
    words, none, wide = matrix(kind, f, d)
    x = rng().normal(size=(m, d)).astype(np.float32)
    exact = x.astype(np.float64) @ wide.astype(np.float64).T
    y = np.asarray(kernels.row_products(x, words, none))
    assert np.linalg.norm(y - exact) < 3e-5 * np.linalg.norm(exact)
    np.testing.assert_array_equal(kernels.row_products(x[:17], words, none), y[:17])
    roughly = kernels.row_products(x, words, none, 1)
    assert np.linalg.norm(roughly - exact) < 4e-3 * np.linalg.norm(exact)


@needs_kernels
@pytest.mark.parametrize('n_bytes', [1, 2])
@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_among_many_rows_each_stays_what_it_is(kind, n_bytes):
    """What is not finite, tiny or huge changes its own row, or its own output, and no other."""
    words, none, wide = matrix(kind, 50, 300)
    x = rng().normal(size=(40, 300)).astype(np.float32)
    usual = np.asarray(kernels.row_products(x, words, none, n_bytes))
    x[3, 7], x[12, 299], x[13, 0], x[20], x[21] = np.nan, np.inf, -np.inf, 0, 1e-38
    x[22, 5] = 1e30
    y = np.asarray(kernels.row_products(x, words, none, n_bytes))
    assert np.isnan(y[3]).all()
    with np.errstate(invalid='ignore'):
        np.testing.assert_array_equal(y[12:14], x[12:14] @ wide.T)
    assert (y[20] == 0).all() and (np.abs(y[21]) < 1e-35).all()
    assert np.linalg.norm(y[22] / 1e30 - wide[:, 5]) < 4e-3 * np.linalg.norm(wide[:, 5])
    others = np.setdiff1d(np.arange(40), [3, 12, 13, 20, 21, 22])
    np.testing.assert_array_equal(y[others], usual[others])
    words = words.at[0, 3].set(np.nan).at[1, 4].set(np.inf).at[2].set(1e-38).at[3, 9].set(1e30)
    y = np.asarray(kernels.row_products(x[others], words, none, n_bytes))
    assert np.isnan(y[:, 0]).all() and not np.isfinite(y[:, 1]).any()
    assert (np.abs(y[:, 2]) < 1e-35).all() and np.isfinite(y[:, 3:]).all()
    np.testing.assert_array_equal(y[:, 4:], usual[others, 4:])


@needs_kernels
@pytest.mark.parametrize('n_bytes', [1, 2])
def test_an_outlier_leaves_others_their_bits(n_bytes):
    """No activation loses more than rounding it to bfloat16 would, however large its neighbours."""
    words, none, wide = matrix('bfloat16', 16, 128)
    x = rng().normal(size=(20, 128)).astype(np.float32)
    x[:, 5] = 1024  # which bfloat16 has
    y = np.asarray(kernels.row_products(x, words, none, n_bytes)) - 1024 * wide[:, 5]
    x[:, 5] = 0
    exact = x @ wide.T
    assert np.linalg.norm(y - exact) < 4e-3 * np.linalg.norm(exact)


@needs_kernels
def test_other_counts_of_bytes_are_refused():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match='n_bytes=4: 1 or 2 bytes of an activation count'):
        kernels.row_products(x, x, np.zeros((0, 0), np.float32), 4)


def panels(bits, rows, columns, groups):
    """Words and scales in panels, laid out by loops, and the wide weights."""
    scales = rng().normal(size=(rows, groups)).astype(np.float32)
    low, high, line = {8: (-128, 128, 4), 4: (-8, 8, 8)}[bits]
    q = rng().integers(low, high, (rows, columns))
    words = np.zeros((rows * columns // line,), np.uint32)
    laid = np.zeros((rows * groups,), np.float32)
    for r in range(rows):
        first, step = (r // 16 * 16, 16) if r < rows // 16 * 16 else (r, 1)
        start = r % 16 if step == 16 else 0
        for c in range(columns // line):
            its = [int(n) - low for n in q[r, c * line : (c + 1) * line]]
            half = its[4:] or [0] * 4
            word = sum((its[k] | half[k] << 4) << 8 * k for k in range(4))
            words[first * (columns // line) + start + step * c] = word
        for g in range(groups):
            laid[first * groups + start + step * g] = scales[r, g]
    wide = q.astype(np.float32) * np.repeat(scales, columns // groups, 1)
    return words.reshape(rows, -1), laid.reshape(rows, -1), wide


@needs_kernels
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(
    ('m', 'd', 'f', 'groups'),
    [
        (1, 128, 64, 2),
        (1, 64, 3, 2),  # no panel
        (2, 24, 16, 1),  # no whole vector
        (3, 280, 51, 5),
        (5, 1024, 33, 2),  # groups of several pieces
        (16, 96, 203, 3),
        (7, 2720, 40, 2),  # 1360 is cut into pieces of 8 · 17
        (70, 256, 100, 4),
    ],
)
def test_panel_products(bits, m, d, f, groups):
    words, scales, wide = panels(bits, f, d, groups)
    x = rng().normal(size=(m, d)).astype(np.float32)
    multiply = jax.jit(kernels.panel_products, static_argnums=3)
    assert_same(multiply(x, words, scales, 2), x @ wide.T, 'int')
    roughly, exact = multiply(x, words, scales, 1), x @ wide.T
    assert np.linalg.norm(roughly - exact) < 0.012 * np.linalg.norm(exact)
    # A row does not depend on the others, nor on how many there are.
    assert_same(multiply(x[-1:], words, scales, 2), multiply(x, words, scales, 2)[-1:], 'float32')


@needs_kernels
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(('m', 'd', 'f', 'groups'), [(1, 128, 64, 2), (6, 96, 51, 3)])
def test_panels_with_minima(bits, m, d, f, groups):
    words, scales, wide = panels(bits, f, d, groups)
    _, least, _ = panels(bits, f, d, groups)
    least = least[::-1].copy()
    # What `panels` laid out for groups stands behind the scales of each panel, or of each row.
    whole = f // 16 * 16
    parts = [x[:whole].reshape(-1, groups * 16) for x in (scales, least)]
    laid = np.concatenate(parts, -1).reshape(whole, 2 * groups)
    laid = np.concatenate([laid, np.concatenate([scales[whole:], least[whole:]], -1)])
    rows = [
        x[:whole].reshape(-1, groups, 16).swapaxes(1, 2).reshape(whole, groups)
        for x in (scales, least)
    ]
    rows = [np.concatenate([x, y[whole:]]) for x, y in zip(rows, (scales, least), strict=True)]
    first, its = (np.repeat(x, d // groups, -1) for x in rows)
    exact = wide + first * (128 if bits == 8 else 8) + its
    x = rng().normal(size=(m, d)).astype(np.float32)
    y = kernels.panel_products(x, words, laid, minima=True)
    assert_same(y, x @ exact.T, 'int')


@needs_kernels
@pytest.mark.parametrize('m', [1, 6])
def test_scales_of_16_bits_are_read_as_they_are(m):
    words, _, _ = panels(8, 51, 64, 4)
    any_bits = rng().integers(0, 2**16, (51, 4)).astype(np.uint16).view(np.float16)
    small = np.where(np.isfinite(any_bits), any_bits, np.float16(6e-8))  # the least of all
    x = rng().normal(size=(m, 64)).astype(np.float32)
    for scales in (small, small[:, :1]):  # one scale a row: sums of small ones are not hidden
        y = kernels.panel_products(x, words, scales)
        exact = kernels.panel_products(x, words, scales.astype(np.float32))
        np.testing.assert_allclose(y, exact, rtol=1e-6, atol=2e-7 * np.abs(exact).max())
    for wrong in (np.inf, -np.inf, np.nan):
        y = kernels.panel_products(x, words, np.full_like(small, wrong))
        assert not np.isfinite(y).any()
    with pytest.raises(TypeError, match='scales of panels are float32 or float16, got int8'):
        kernels.panel_products(x, words, small.astype(np.int8))


@needs_kernels
@pytest.mark.parametrize('bits', [8, 4])
def test_the_largest_integers_do_not_overflow_in_panels(bits):
    d = 4096
    words, scales, _ = panels(bits, 16, d, 1)
    for word, value in ((0xFFFFFFFF, 127 if bits == 8 else 7), (0, -128 if bits == 8 else -8)):
        words[:] = np.uint32(word)
        for sign in (1, -1):
            x = np.full((5, d), sign, np.float32)
            y = kernels.panel_products(x, words, np.ones_like(scales))
            np.testing.assert_allclose(y, sign * value * d, rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize('m', [1, 6])
def test_what_is_not_finite_or_all_zero_stays_so_in_panels(m):
    words, scales, _ = panels(8, 20, 128, 2)
    x = np.zeros((3 * m, 128), np.float32)
    x[1::3, 100], x[2::3, 0] = np.nan, np.inf
    for part in (x, x[:1], x[1:2], x[2:3]):
        y = np.asarray(kernels.panel_products(part, words, scales))
        for its, row in zip(part, y, strict=True):
            assert (row == 0).all() if (its == 0).all() else not np.isfinite(row).any()


@needs_kernels
def test_panels_that_do_not_fit_are_refused():
    words, scales, _ = panels(8, 20, 128, 2)
    x = np.zeros((1, 128), np.float32)
    with pytest.raises(ValueError, match='do not fit together'):
        kernels.panel_products(x[:, :64], words[:, :20], scales)
    with pytest.raises(ValueError, match='do not fit together'):
        kernels.panel_products(x, words, scales[:10])
    with pytest.raises(ValueError, match='n_bytes=3: 1 or 2 bytes'):
        kernels.panel_products(x, words, scales, 3)
    with pytest.raises(TypeError, match='weights in panels are uint32, got int32'):
        kernels.panel_products(x, words.astype(np.int32), scales)


@needs_kernels
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('m', 'd', 'k', 'groups'), [(1, 128, 9, 4), (3, 44, 5, 2), (2, 300, 1, 6)])
def test_gathered_rows_are_those_asked_for(kind, m, d, k, groups):
    words, scales, wide = matrix(kind, 23, d, groups)
    at = rng().integers(0, 23, (m, k)).astype(np.int32)
    at[:, -1] = at[:, 0]  # again
    at[0, 0] = 1000  # outside: the nearest is taken
    at[-1, 0] = -5
    rows = wide[np.clip(at, 0, 22)]  # (M, K, D)
    x = rng().normal(size=(m, d)).astype(np.float32)
    h = rng().normal(size=(m, k)).astype(np.float32)
    y = jax.jit(kernels.gathered_products)(x, at, words, scales)
    assert_same(y, np.einsum('md,mkd->mk', x, rows), kind)
    y = jax.jit(kernels.gathered_sums)(h, at, words, scales)
    assert_same(y, np.einsum('mk,mkd->md', h, rows))


@needs_kernels
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_what_is_not_finite_or_all_zero_stays_so(kind):
    words, scales, _ = matrix(kind, 4, 128, 2)
    x = np.zeros((3, 128), np.float32)
    x[1, 100], x[2, 0] = np.nan, np.inf
    y = np.asarray(kernels.row_products(x, words, scales))
    assert (y[0] == 0).all() and not np.isfinite(y[1:]).any()


@needs_kernels
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('m', 's', 'f', 'd', 'groups'),
    [(1, 16, 64, 256, 2), (2, 3, 5, 44, 2), (1, 4, 300, 96, 4), (3, 1, 1, 8, 1), (1, 6, 7, 600, 6)],
)
def test_factored_products(kind, m, s, f, d, groups):
    words, scales, wide = matrix(kind, f, d, groups * (kind == 'int4') + groups)
    x, modules = (rng().normal(size=(n, d)).astype(np.float32) for n in (m, s))
    y = jax.jit(kernels.factored_products)(x, modules, words, scales)
    assert_same(y, np.einsum('md,sd,fd->msf', x, modules, wide))


@needs_kernels
@pytest.mark.parametrize(
    ('m', 'p', 's', 'j', 'd', 'f'),
    [(1, 3, 16, 3, 16, 192), (2, 2, 5, 4, 6, 35), (1, 1, 3, 1, 5, 7), (1, 3, 18, 3, 2, 64)],
)
def test_module_convolution(m, p, s, j, d, f):
    x = rng().normal(size=(m, p, s + j - 1, d)).astype(np.float32)
    kernel = rng().normal(size=(p, j, d, f)).astype(np.float32)
    wanted = sum(np.einsum('mpsd,pdf->msf', x[:, :, i : i + s], kernel[:, i]) for i in range(j))
    assert_same(jax.jit(kernels.module_convolution)(x, kernel), wanted)


@needs_kernels
@pytest.mark.parametrize(
    ('m', 'd', 'rank', 'blocks', 'size'),
    [(1, 128, 16, 64, 64), (3, 21, 5, 3, 7), (2, 8, 1, 1, 2), (1, 40, 19, 5, 16)],
)
def test_chosen_units(m, d, rank, blocks, size):
    x = rng().normal(size=(m, d)).astype(np.float32)
    first = rng().normal(size=(d, rank)).astype(np.float32)
    second = rng().normal(size=(rank, blocks * size)).astype(np.float32)
    wanted = (x @ first @ second).reshape(m, blocks, size).argmax(-1) + size * np.arange(blocks)
    units = jax.jit(kernels.chosen_units, static_argnums=3)(x, first, second, size)
    assert units.dtype == jnp.int32
    np.testing.assert_array_equal(units, wanted)


@needs_kernels
def test_of_equal_units_the_first_is_chosen_and_of_unknown_ones_the_last():
    second = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [5, np.nan, 1, 7]], np.float32).reshape(1, 12)
    x, first = np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(kernels.chosen_units(x, first, second, 4), [[1, 4, 11]])


@needs_kernels
@pytest.mark.parametrize(('m', 'd'), [(1, 1024), (3, 21), (2, 1)])
def test_norms(m, d):
    x = 3 + rng().normal(size=(m, d)).astype(np.float32)
    scale, bias = rng().normal(size=(2, d)).astype(np.float32)
    centred = x - x.mean(-1, keepdims=True)
    wanted = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 0.1) * scale + bias
    assert_same(jax.jit(kernels.layer_norm)(x, scale, bias, 0.1), wanted)
    wanted = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 0.1) * scale
    assert_same(jax.jit(kernels.rms_norm)(x, scale, 0.1), wanted)


def softmax(scores, seen):
    scores = np.where(seen, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@needs_kernels
@pytest.mark.parametrize(
    ('m', 'h', 'c', 'k', 'v'),
    [(1, 12, 200, 64, 64), (3, 2, 17, 5, 21), (2, 1, 1, 1, 1), (8, 3, 40, 24, 12)],
)
@pytest.mark.parametrize('group', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('softcap', [None, 2.5])
@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_query_attention(m, h, c, k, v, group, softcap, kind):
    query = 3 * rng().normal(size=(m * h * group, k)).astype(np.float32)
    keys, values = (rng().normal(size=(m * h, c, n)).astype(np.float32) for n in (k, v))
    given, scales = (keys, values), None
    if kind == 'bfloat16':
        given = tuple(jnp.asarray(x, jnp.bfloat16) for x in given)
        keys, values = (np.asarray(x, np.float32) for x in given)
    if kind == 'int8':
        scales = tuple(rng().random((m * h, c, 1), np.float32) for _ in given)
        given = tuple(rng().integers(-127, 128, x.shape).astype(np.int8) for x in given)
        keys, values = (x * scale for x, scale in zip(given, scales, strict=True))
        query = query / 127
    seen = rng().random((m, c)) < 0.5
    seen[:, 0], seen[:, 2 * c // 3 + 1 :] = True, False
    scores = np.einsum('nk,nck->nc', query, keys.repeat(group, 0))
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    p = softmax(scores, seen.repeat(h * group, 0))
    attend = jax.jit(kernels.query_attention, static_argnums=4)
    y = attend(query, *given, seen, softcap, scales)
    assert_same(y, np.einsum('nc,ncv->nv', p, values.repeat(group, 0)))


@needs_kernels
@pytest.mark.parametrize(('n', 'k', 'd'), [(1, 256, 64), (12, 90, 64), (3, 1, 21)])
@pytest.mark.parametrize('group', [1, 3])
def test_attention_to_some(n, k, d, group):
    n *= group
    x, p = rng().normal(size=(n, d)).astype(np.float32), rng().random((n, k), np.float32)
    words = rng().normal(size=(n // group, 50, d)).astype(np.float32)
    at = rng().integers(0, 50, (n, k)).astype(np.int32)
    at[0, 0] = -3  # outside: the nearest is taken
    rows = np.take_along_axis(words.repeat(group, 0), np.clip(at, 0, 49)[..., None], 1)  # (N, K, D)
    wanted = np.einsum('nd,nkd->nk', x, rows) / np.sqrt(np.square(rows).sum(-1) + 0.1)
    assert_same(jax.jit(kernels.gathered_cosines)(x, at, words, 0.1), wanted)
    y = jax.jit(kernels.gathered_means)(p, at, words)
    assert_same(y, np.einsum('nk,nkd->nd', p, rows))


@needs_kernels
def test_attention_far_from_what_is_usual():
    query, values = np.ones((4, 1), np.float32), np.arange(12, dtype=np.float32).reshape(4, 3, 1)
    keys = np.zeros((4, 3, 1), np.float32)
    keys[0, :, 0] = -2e4, 3e4, 0  # far apart
    keys[2, 1] = np.nan
    keys[3] = -np.inf
    seen = np.array([[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    y = np.asarray(kernels.query_attention(query, keys, values, seen))
    np.testing.assert_array_equal(y[:, 0], [1, 0, np.nan, 0])
    y = np.asarray(kernels.query_attention(query, keys, values, seen, 100.0))
    np.testing.assert_array_equal(y[:, 0], [1, 0, np.nan, 0])
    keys[:, :, 0] = 1e-6 * np.arange(3)  # a cap changes nothing that is small
    y = np.asarray(kernels.query_attention(query, keys, values, seen, 100.0))
    np.testing.assert_allclose(y, kernels.query_attention(query, keys, values, seen), rtol=1e-6)


@needs_kernels
def test_large_products_on_several_threads_in_a_loop():
    words, scales, wide = matrix('int8', 4096, 512, 8)
    x = rng().normal(size=(1, 512)).astype(np.float32)

    @jax.jit
    def run(x):
        def step(i, total):
            y = kernels.row_products(x * (1 + 0 * total[:, :512]), words, scales)
            return total + y

        return jax.lax.fori_loop(0, 50, step, jnp.zeros((1, 4096)))

    assert_same(run(x), 50 * (x @ wide.T), 'int8')


def test_shapes_are_checked():
    words, scales, _ = matrix('int8', 8, 16, 2)
    with pytest.raises(ValueError, match=r'shapes do not fit together: \(2, 15\), \(8, 16\)'):
        kernels.row_products(np.ones((2, 15), np.float32), words, scales)
    x, none = np.ones((2, 16), np.float32), np.zeros((0, 0), np.float32)
    for its_words, its_scales in (
        (words, none),
        (words, scales[:, :1].repeat(3, 1)),
        (words[:0], scales[:0]),
        (np.ones((8, 8), np.uint8), np.ones((8, 1), np.float32)),
        (np.ones((8, 8), np.uint8), np.ones((8, 3), np.float32)),
        (np.ones((8, 16), np.float32), scales),
        (np.ones((8, 16), np.float32), np.ones((0, 5), np.float32)),
    ):
        with pytest.raises(ValueError, match='shapes do not fit together'):
            kernels.row_products(x, its_words, its_scales)
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.module_convolution(np.ones((1, 2, 5, 3)), np.ones((2, 3, 4, 3)))
    x = np.ones((2, 16), np.float32)
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.chosen_units(x, np.ones((16, 3), np.float32), np.ones((3, 8), np.float32), 3)
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.layer_norm(x, x[0], x[0, 1:], 0.1)
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.query_attention(x, np.ones((2, 3, 16)), np.ones((2, 3, 1)), np.ones((3, 3), bool))
    for call in (
        lambda: kernels.gathered_cosines(x, np.zeros(2, int), x[:, None], 0.1),
        lambda: kernels.gathered_means(x, np.zeros((2, 16), int), x),
        lambda: kernels.layer_norm(x[None], x, x, 0.1),
        lambda: kernels.row_products(x[0], x, none),
        lambda: kernels.row_products(x, x, none.reshape(0)),
        lambda: kernels.gathered_sums(x, np.zeros((2, 16), int), words, scales[:, 0]),
        lambda: kernels.query_attention(x, x[:, None], x[:, None, None], np.ones((2, 1), bool)),
    ):
        with pytest.raises(ValueError, match=r'\w+ must have \d axes, got \('):
            call()
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.nearest_rotations((4, 2), np.ones((1, 2, 8), np.float32), np.ones((2, 3, 4, 8)))
    with pytest.raises(TypeError, match='seen must be bool, got float32'):
        kernels.query_attention(x, x[:, None], x[:, None], np.ones((2, 1), np.float32))
    eight, seen = np.ones((2, 1, 16), np.int8), np.ones((2, 1), bool)
    for given in (
        (eight, eight),
        (eight, x[:, None]),
        (x[:, None], x[:, None], None, (x[:, None, :1], x[:, None, :1])),
        (x[:, None].astype(np.float16),) * 2,
    ):
        with pytest.raises(TypeError, match=r'are both float32|int8 has scales, and nothing'):
            kernels.query_attention(x, *given[:2], seen, *given[2:])
    with pytest.raises(ValueError, match='shapes do not fit together'):
        kernels.query_attention(x, eight, eight, seen, None, (x[:, :1], x[:, :1]))
    with pytest.raises(TypeError, match='the kernels take float32, got float16'):
        kernels.row_products(np.ones((2, 16), np.float16), words, scales)
    with pytest.raises(TypeError, match='weights must be float32, bfloat16, int8 or uint8, got'):
        kernels.row_products(np.ones((2, 16), np.float32), words.astype(np.int16), scales)


@needs_kernels
def test_vmap_goes_one_by_one():
    words, scales, wide = matrix('int8', 8, 16, 2)
    x = rng().normal(size=(3, 2, 16)).astype(np.float32)
    y = jax.vmap(lambda x: kernels.row_products(x, words, scales))(x)
    assert_same(y, x @ wide.T, 'int8')


def test_off_is_seen_by_what_is_traced():
    seen = []

    @jax.jit
    def look(x):
        seen.append(kernels.available())
        return x

    look(1.0)
    with kernels.off():
        look(1.0)
        assert kernels.why_not() == 'switched off by layercomb_kernels.off()'
    look(1.0)
    assert seen == [kernels.available(), False]


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv(build.SWITCH, '0')
    with pytest.raises(build.Unavailable, match='switched off by LAYERCOMB_KERNELS=0'):
        build.load()


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(build, '_COMPILERS', ('no-such-compiler',))
    with pytest.raises(build.Unavailable, match=r'no C\+\+ compiler: none of no-such-compiler is'):
        build.load()


def compiler(tmp_path, monkeypatch, script):
    """A compiler that runs a shell script, and a cache of its own."""
    fake = tmp_path / 'compiler'
    fake.write_text(f'#!/bin/sh\n{script}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(build, '_COMPILERS', (str(fake),))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'echo "x.cc:1: error: no such thing" >&2; exit 1')
    with pytest.raises(build.Unavailable, match=r'cannot compile the kernels: x.cc:1: error: '):
        build.load()
    assert not list((tmp_path / 'cache' / 'layercomb').iterdir())  # nothing is left behind


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'exit 0')
    (tmp_path / 'cache').write_text('a file in the way')
    with pytest.raises(build.Unavailable, match='the kernels cannot be compiled'):
        build.load()


@needs_kernels
def test_a_damaged_library_is_made_anew_once(tmp_path, monkeypatch):
    good = build.library_path()
    real = 'for last; do :; done; case "$last" in *.so) echo made >> "$0.log";; esac; '
    compiler(tmp_path, monkeypatch, f'{real} cp {good} "$last"')
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(good.read_bytes()[:1000])
    build._seal(path).write_bytes(build._seal(good).read_bytes())
    assert build.load() is not None
    assert path.read_bytes() == good.read_bytes()
    build.load()
    compiler(tmp_path, monkeypatch, f'{real} echo nonsense > "$last"')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'another'))
    with pytest.raises(build.Unavailable, match='the compiled kernels cannot be loaded'):
        build.load()
    assert (tmp_path / 'compiler.log').read_text().split() == ['made', 'made']


@pytest.mark.parametrize('switch', ['0', '1'])
def test_the_module_says_whether_it_works(switch):
    env = {**os.environ, build.SWITCH: switch, 'PYTHONPATH': str(Path(kernels.__file__).parents[1])}
    command = [sys.executable, '-m', 'layercomb_kernels']
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    works = switch == '1' and kernels.available()
    assert done.returncode == (0 if works else 1)
    assert done.stdout.startswith('kernels ready: ' if works else 'no kernels, products are XLA')
    assert len(done.stdout.splitlines()) == 1
