"""Relative position bias: buckets, gradients beside full matrices, decoding, a T5 stack."""

from __future__ import annotations

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import layercomb as lc
from layercomb import init_state, shape_dtype, tl
from layercomb.layers.attention import distances
from layercomb.layers.attention.heads import goes_by_head
from layercomb.layers.attention.relative import relative_buckets
from layercomb.layers.core.mode import Mode
from layercomb.shapes import signature_of
from layercomb.supervised import decoding

B, L, D = 2, 7, 8

# The least distance of each bucket, by transformers 5: T5Attention._relative_position_bucket(…).
BACK = [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
BOTH = [*range(9), 12, 16, 23, 32, 46, 64, 91]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_buckets_are_those_of_t5():
    far = np.arange(0, 1000)
    back = np.searchsorted(BACK, far, 'right') - 1
    both = np.searchsorted(BOTH, far, 'right') - 1
    np.testing.assert_array_equal(relative_buckets(-far, 32, 128, False), back)
    np.testing.assert_array_equal(relative_buckets(far, 32, 128, False), 0)
    np.testing.assert_array_equal(relative_buckets(-far, 32, 128, True), both)
    np.testing.assert_array_equal(relative_buckets(far[1:], 32, 128, True), 16 + both[1:])


@pytest.mark.parametrize('bidirectional', [True, False])
def test_the_bias_is_looked_up_by_distance(bidirectional):
    layer = tl.RelativeBias(3, 8, 20, bidirectional)
    x = values(B, L, D)
    weights, state = layer.init(signature_of(x), jax.random.key(0))
    assert weights['table'].shape == (8, 3) and state == {}
    (y, bias), _ = layer.apply(weights, {}, (x,))
    assert y is x and bias.shape == (41, 3)
    for d in range(-20, 21):
        row = relative_buckets(np.array(d), 8, 20, bidirectional)
        np.testing.assert_array_equal(bias[d + 20], weights['table'][row])


@pytest.mark.parametrize('first', [-300, -47, -12, -3, 0, 5, 13, 200])
@pytest.mark.parametrize('q, c', [(1, 1), (4, 7), (16, 16), (9, 2)])
def test_blocks_of_biases(first, q, c):
    """Each entry is the bias of its distance, and the gradient is its transpose."""
    reach = 11
    bias = values(2 * reach + 1)
    wide = distances.padded(jnp.asarray(bias), q + c)
    distance = first + np.arange(c)[None] - np.arange(q)[:, None]
    entry = np.clip(distance, -reach, reach) + reach
    np.testing.assert_array_equal(distances.of_block(wide, first, q, c), bias[entry])
    d_scores = values(q, c, seed=1)
    wanted = np.zeros(2 * reach + 1)
    np.add.at(wanted, entry, d_scores)
    got = distances.add_of_block(jnp.zeros_like(wide), jnp.asarray(d_scores), first)
    np.testing.assert_allclose(distances.unpadded(got, q + c), wanted, atol=1e-5)


def dense(q, k, v, bias, see, offset=None, keep=1.0, softcap=None, scale=None):
    """The whole matrix of scores, in the plainest way; `see` is (B, Lq, Lk) of booleans."""
    b, h, lq, depth = q.shape
    lk = k.shape[2]
    k, v = (jnp.repeat(x, h // x.shape[1], 1) for x in (k, v))
    scores = jnp.einsum('bhqk,bhck->bhqc', q, k) * (depth**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        start = np.zeros(b, int) if offset is None else np.asarray(offset)
        reach = len(bias) // 2
        distance = np.arange(lk) - (start[:, None] + np.arange(lq))[..., None]  # (B, Lq, Lk)
        scores = scores + jnp.moveaxis(bias[np.clip(distance, -reach, reach) + reach], 3, 1)
    see = see[:, None]
    scores = jnp.where(see, scores, -1e4)  # finite, or gradients of queries that see none are NaN
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    p = jnp.where(see, p, 0.0)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30) * keep
    return jnp.einsum('bhqc,bhcd->bhqd', p, v)


def with_gradients(f, *args):
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def both(*args):
        y, pull = jax.vjp(f, *args)
        ct = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, *pull(ct.astype(y.dtype))

    return both(*args)


@hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate]
)
@hypothesis.given(st.data())
def test_windows_and_biases_are_those_of_the_whole_matrix(data):
    """At any lengths, with masks, offsets, shared heads, caps: outputs and every gradient."""
    draw = data.draw
    lq = draw(st.integers(1, 40), 'queries')
    lk = draw(st.integers(1, 40), 'keys')
    causal = draw(st.booleans(), 'causal')
    window = draw(st.none() | st.integers(1, 45), 'window') if causal else None
    reach = draw(st.none() | st.integers(0, 50), 'reach')
    offset = draw(st.none() | st.tuples(*[st.integers(0, 40)] * 2), 'offset')
    h, g = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]), 'heads')
    options = {'softcap': draw(st.none() | st.just(0.8), 'softcap'), 'scale': 1.0}
    q, k, v = values(B, h, lq, 4), values(B, g, lk, 4, seed=1), values(B, g, lk, 3, seed=2)
    bias = () if reach is None else (values(2 * reach + 1, h, seed=3),)
    mask = values(B, lk, seed=4) > -1 if draw(st.booleans(), 'masked') else None
    start = np.zeros(B, int) if offset is None else np.array(offset)
    query, key = start[:, None, None] + np.arange(lq)[:, None], np.arange(lk)
    see = np.broadcast_to(not causal, (B, lq, lk)) | (key <= query)
    see = see & (True if window is None else key > query - window)
    see = see & (True if mask is None else mask[:, None])

    def fast(q, k, v, *bias):
        return tl.dot_product_attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            mask=None if mask is None else jnp.asarray(mask),
            offset=None if offset is None else jnp.array(offset, jnp.int32),
            bias=bias[0] if bias else None,
            block_len=16,
            **options,
        )

    def slow(q, k, v, *bias):
        return dense(q, k, v, bias[0] if bias else None, see, offset, **options)

    got, wanted = with_gradients(fast, q, k, v, *bias), with_gradients(slow, q, k, v, *bias)
    for name, x, y in zip(('y', 'q', 'k', 'v', 'bias'), got, wanted, strict=False):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4, err_msg=name)


def test_dropout_with_a_bias(key):
    """The forward pass shows what was dropped: v is the identity. The gradients agree with it."""
    q, k = values(1, 2, 37, 4), values(1, 2, 37, 4, seed=1)
    v = np.broadcast_to(np.eye(37, dtype=np.float32), (1, 2, 37, 37))
    bias, see = values(9, 2, seed=3), np.ones((1, 37, 37), bool)
    f = functools.partial(tl.dot_product_attention, dropout_rate=0.25, rng=key, block_len=16)
    got = with_gradients(lambda q, k, v, bias: f(q, k, v, bias=bias), q, k, v, bias)
    kept = np.asarray(got[0]) > 0
    assert abs(kept.mean() - 0.75) < 0.03
    wanted = with_gradients(
        lambda q, k, v, bias: dense(q, k, v, bias, see, keep=kept * 4 / 3), q, k, v, bias
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('length', [1, 37])
def test_narrow_queries_and_a_narrow_bias(length):
    q, k = (jnp.asarray(values(B, 2, n, 4), jnp.bfloat16) for n in (length, 37))
    bias = jnp.asarray(values(9, 2, seed=3), jnp.bfloat16)
    got = with_gradients(
        lambda q, k, bias: tl.dot_product_attention(q, k, k, bias=bias, block_len=16), q, k, bias
    )
    wide = [x.astype(jnp.float32) for x in (q, k, bias)]
    see = np.ones((B, length, 37), bool)
    wanted = with_gradients(lambda q, k, bias: dense(q, k, k, bias, see), *wide)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=2e-2, atol=4e-2)


def test_memory_is_linear_in_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        bias = jax.ShapeDtypeStruct((257, 2), jnp.float32)

        def total(q, k, v, bias):
            return tl.dot_product_attention(q, k, v, bias=bias, block_len=128).sum()

        step = jax.jit(jax.grad(total, (0, 1, 2, 3)))
        return step.lower(x, x, x, bias).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert long < 2.2 * short and long < 8192 * 8192


# Layers.


def block(causal: bool, masked: bool) -> tl.Serial:
    attention = tl.SelfAttention(
        2, causal, relative=True, masked=masked, scale=1.0, qkv_bias=False, out_bias=False
    )
    return tl.Serial(
        tl.Select((0, 1, 2, 1, 2) if masked else (0, 1, 1)),
        tl.Residual(tl.RMSNorm(), attention),
        tl.Residual(tl.RMSNorm(), tl.Dense(12, use_bias=False), tl.Relu(), tl.Dense(D)),
    )


def stack(causal: bool = True, masked: bool = False) -> tl.Serial:
    return tl.Serial(
        tl.RelativeBias(2, 8, 6, bidirectional=not causal),
        tl.Repeat(block(causal, masked), 2),
        tl.Select((0,), n_in=2 + masked),
    )


def test_a_mask_comes_after_the_bias():
    net, x = stack(causal=False, masked=True), values(B, L, D)
    assert (net.n_in, net.n_out) == (2, 1)
    mask = np.arange(L) < np.array([[L], [4]])
    weights, _ = net.init(signature_of((x, mask)), jax.random.key(0))
    (y,), _ = net.apply(weights, {}, (x, mask))
    plain = stack(causal=False)
    (short,), _ = plain.apply(weights, {}, (x[1:, :4],))
    np.testing.assert_allclose(y[1:, :4], short, atol=1e-5)


def test_blocks_share_one_table_and_all_of_them_teach_it():
    net, x = stack(), values(B, L, D)
    weights, _ = net.init(signature_of(x), jax.random.key(0))
    assert [p for p in lc.trees.flatten(weights) if 'table' in p] == ['relative_bias/table']

    def total(weights):
        return jnp.sin(net.apply(weights, {}, (x,), mode=Mode.TRAIN)[0][0]).sum()

    gradient = jax.jit(jax.grad(total))(weights)['relative_bias']['table']
    step = 1e-2 * jnp.asarray(values(8, 2, seed=5))

    def moved(sign):
        table = weights['relative_bias']['table'] + sign * step
        return jax.jit(total)({**weights, 'relative_bias': {'table': table}})

    change = (moved(1) - moved(-1)) / 2
    np.testing.assert_allclose(change, (gradient * step).sum(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize('prompt', [1, 3, 6])
@pytest.mark.parametrize('window', [None, 3])
def test_decoding_equals_evaluation(prompt, window):
    layer = tl.Serial(
        tl.RelativeBias(2, 8, 6, bidirectional=False),
        tl.SelfAttention(2, relative=True, window=window, rotary=tl.RotaryPositions()),
    )
    x = values(B, L, D)
    weights, _ = layer.init(signature_of(x), jax.random.key(0))
    weights['relative_bias']['table'] = jnp.asarray(values(8, 2))
    (wanted,), _ = layer.apply(weights, {}, (x,))
    state = init_state(layer, signature_of(x))
    step = jax.jit(functools.partial(layer.apply, mode=Mode.PREDICT))
    for first, last in [(0, prompt), *((t, t + 1) for t in range(prompt, L))]:
        (y,), state = step(weights, state, (x[:, first:last],))
        np.testing.assert_allclose(y, wanted[:, first:last], atol=1e-5)
    state = tl.seek(state, jnp.array([2, 5]))
    (y,), _ = step(weights, state, (x[[0, 1], [2, 5]][:, None],))
    np.testing.assert_allclose(y[:, 0], wanted[[0, 1], [2, 5]], atol=1e-5)


def test_a_stack_with_a_bias_generates():
    """Prompts of two lengths, each of which goes on as the whole sequence says."""
    net = tl.Serial(tl.Embedding(11, D), stack(), tl.Dense(11, name='head'))
    weights, _ = net.init((shape_dtype((1, 3), 'int32'),), jax.random.key(0))
    weights = jax.tree.map(lambda w: w + 0.3 * values(*w.shape), weights)
    prompts = [[1, 2, 3], [7, 4, 0, 5, 2]]
    made = decoding.generate(lc.Model(net, weights, {}), prompts, 4, temperature=0)
    for prompt, row in zip(prompts, made, strict=True):
        whole = np.array([[*prompt, *row]], np.int32)
        (logits,), _ = net.apply(weights, {}, (jnp.asarray(whole),))
        np.testing.assert_array_equal(logits[0].argmax(-1)[len(prompt) - 1 : -1], row)


def test_reversible_blocks_carry_the_bias_as_context():
    half = tl.ReversibleHalfResidual(tl.SelfAttention(2, relative=True, dropout=0.3))
    net = tl.ReversibleSerial(half)
    x, bias = (jnp.asarray(values(B, L, D)),) * 2, jnp.asarray(values(9, 2))
    signature = signature_of((*x, bias))
    weights, _ = net.init(signature, jax.random.key(0))
    own = weights['reversible_half_residual']['self_attention']
    assert not goes_by_head(tl.SelfAttention(2, relative=True), own, (x[0], bias))

    def total(apply, bias):
        outputs, _ = apply(weights, {}, (*x, bias), rng=jax.random.key(1), mode=Mode.TRAIN)
        return sum(jnp.sin(y).sum() for y in outputs[:1])

    got = jax.grad(functools.partial(total, net.apply))(bias)
    assert np.abs(got).max() > 0.01
    step = 1e-2 * jnp.asarray(values(9, 2, seed=7))
    change = (total(net.apply, bias + step) - total(net.apply, bias - step)) / 2
    np.testing.assert_allclose(change, (got * step).sum(), rtol=2e-2)


def test_descriptions():
    layer = tl.SelfAttention(4, False, relative=True, masked=True)
    assert repr(layer) == 'SelfAttention(4, False, relative=True, masked=True)'
    assert eval(repr(layer), vars(tl)) == layer and (layer.n_in, layer.core.n_in) == (3, 5)
    assert repr(tl.RelativeBias(8)) == 'RelativeBias(8)'


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: tl.RelativeBias(2, 7), 'n_buckets must be even, and 4 at least, got 7'),
        (lambda: tl.RelativeBias(2, 1, bidirectional=False), 'n_buckets must be 2 at least, got 1'),
        (
            lambda: tl.RelativeBias(2, 32, 8),
            'max_distance=8 must be more than 8, the distances that have one of 32 buckets alone',
        ),
        (
            lambda: tl.SelfAttention(2, relative=True).output_signature(
                (shape_dtype((B, L, D)), shape_dtype((9, 4)))
            ),
            r'bias must be floats \(2·reach \+ 1, 2 heads\), .* as RelativeBias\(2\) makes them, '
            r'got float32\[9, 4\]',
        ),
        (
            lambda: tl.SelfAttention(2, relative=True).output_signature(
                (shape_dtype((B, L, D)), shape_dtype((8, 2)))
            ),
            r'got float32\[8, 2\]',
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
