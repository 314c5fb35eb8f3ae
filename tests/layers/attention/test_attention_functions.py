"""dot_product_attention and local_attention against full matrices in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels
from layercomb.layers.attention import flash as blockwise
from layercomb.layers.attention import functions as attention_functions
from layercomb.layers.attention import tiles
from layercomb.layers.attention.functions import dot_product_attention, local_attention


class Case(NamedTuple):
    """What is computed, of which sizes: q (B, H, Lq, K), k (B, G, Lk, K), v (B, G, Lk, D)."""

    B: int = 2
    H: int = 3
    Lq: int = 24
    Lk: int = 24
    K: int = 8
    D: int = 8
    masked: bool = False
    options: dict = {}
    G: int | None = None  # None for H


def arrays(case, dtype=jnp.float32):
    """q, k, v, the gradient of the output, and the mask: row 0 of it has no real key."""
    keys = jax.random.split(jax.random.key(3), 5)
    h, g = case.H, case.G or case.H
    shapes = [
        (h, case.Lq, case.K),
        (g, case.Lk, case.K),
        (g, case.Lk, case.D),
        (h, case.Lq, case.D),
    ]
    made = [
        jax.random.normal(key, (case.B, *shape), dtype)
        for key, shape in zip(keys[:4], shapes, strict=True)
    ]
    mask = jax.random.bernoulli(keys[4], 0.7, (case.B, case.Lk)).at[0].set(False)
    return *made, mask if case.masked else None


def seen(
    case,
    mask,
    causal=False,
    offset=None,
    window=None,
    chunk_len=None,
    look_back=1,
    look_ahead=0,
    **_,
):
    """Which keys each query sees, (B, 1, Lq, Lk), by the definition."""
    start = np.zeros(case.B, int) if offset is None else np.asarray(offset)
    query = (start[:, None] + np.arange(case.Lq))[:, None, :, None]
    key = np.arange(case.Lk)
    see = np.broadcast_to(key >= 0, (case.B, 1, case.Lq, case.Lk))
    if mask is not None:
        see = see & np.asarray(mask)[:, None, None]
    if causal:
        see = see & (key <= query)
    if window:
        see = see & (key > query - window)
    if chunk_len:
        chunk = query // chunk_len
        see = see & (key >= (chunk - look_back) * chunk_len)
        see = see & (key < (chunk + 1 + look_ahead) * chunk_len)
    return see


def reference(q, k, v, d_out, see, scale=None, softcap=None, keep=1.0):
    """The output and the three gradients; `keep` multiplies the probabilities."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    (b, h), g = q.shape[:2], k.shape[1]
    k, v = k.repeat(h // g, 1), v.repeat(h // g, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.swapaxes(2, 3)
    slope = 1.0 if softcap is None else 1 / np.cosh(scores / softcap) ** 2
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    scores = np.where(see, scores, -1e300)
    p = np.exp(scores - scores.max(-1, keepdims=True)) * see
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    d_p = d_out @ v.swapaxes(2, 3) * keep
    d_s = slope * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    out, d_v = (p * keep) @ v, (p * keep).swapaxes(2, 3) @ d_out
    d_k = scale * d_s.swapaxes(2, 3) @ q
    d_k, d_v = (x.reshape(b, g, h // g, *x.shape[2:]).sum(2) for x in (d_k, d_v))
    return out, scale * d_s @ k, d_k, d_v


def with_gradients(f, q, k, v, d_out):
    """The output of f and the gradients of q, k and v, as one compiled program."""

    # Tests compile more than they compute: the least optimization is the quickest.
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def both(q, k, v, d_out):
        out, pull_back = jax.vjp(f, q, k, v)
        return out, *pull_back(d_out)

    return both(q, k, v, d_out)


def close(got, expected, atol=2e-5):
    """All of them agree, and none is NaN."""
    for name, x, y in zip(('output', 'q', 'k', 'v'), got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=1e-4, atol=atol, err_msg=name)


DENSE = {
    'one block': Case(options={'causal': True}),
    'ragged': Case(Lq=53, Lk=53, options={'causal': True, 'block_len': 16}),
    'ragged, bidirectional': Case(Lq=53, Lk=53, options={'block_len': 16}),
    'even, bidirectional': Case(Lq=32, Lk=32, options={'block_len': 16}),
    'masked, causal': Case(Lq=37, Lk=37, masked=True, options={'causal': True, 'block_len': 16}),
    'cross': Case(Lq=20, Lk=53, D=4, masked=True, options={'block_len': 16}),
    'more queries than keys': Case(Lq=53, Lk=20, D=4, options={'causal': True, 'block_len': 16}),
    'one query': Case(Lq=1, Lk=20, D=4, masked=True),
    'one query, causal': Case(Lq=1, Lk=20, D=4, options={'causal': True}),
    'scaled, one head': Case(B=1, H=1, Lq=9, Lk=9, K=5, D=3, options={'scale': 0.5}),
    'prompt in a cache': Case(
        Lq=20, Lk=70, options={'causal': True, 'block_len': 16, 'offset': [0, 37]}
    ),
    'masked prompt in a cache': Case(
        Lq=20, Lk=70, masked=True, options={'causal': True, 'block_len': 16, 'offset': [5, 50]}
    ),
    'window': Case(Lq=53, Lk=53, options={'causal': True, 'block_len': 16, 'window': 9}),
    'window of many blocks, masked': Case(
        Lq=85, Lk=85, masked=True, options={'causal': True, 'block_len': 16, 'window': 40}
    ),
    'window of one': Case(Lq=37, Lk=37, options={'causal': True, 'block_len': 16, 'window': 1}),
    'window of whole blocks': Case(
        Lq=64, Lk=64, options={'causal': True, 'block_len': 16, 'window': 16}
    ),
    'window longer than the keys': Case(
        Lq=53, Lk=20, D=4, options={'causal': True, 'block_len': 16, 'window': 30}
    ),
    'window on a prompt in a cache': Case(
        Lq=20,
        Lk=90,
        masked=True,
        options={'causal': True, 'block_len': 16, 'window': 10, 'offset': [5, 62]},
    ),
    'window on a token in a cache': Case(
        Lq=1, Lk=70, options={'causal': True, 'offset': [3, 37], 'window': 5}
    ),
    'token in a cache': Case(Lq=1, Lk=70, options={'causal': True, 'offset': [0, 37]}),
    'grouped': Case(H=6, G=2, Lq=53, Lk=53, options={'causal': True, 'block_len': 16}),
    'grouped window, capped': Case(
        H=6,
        G=2,
        Lq=53,
        Lk=53,
        masked=True,
        options={'causal': True, 'block_len': 16, 'window': 9, 'softcap': 0.5},
    ),
    'grouped, masked': Case(
        H=4, G=2, Lq=37, Lk=53, D=4, masked=True, options={'block_len': 16, 'softcap': 0.5}
    ),
    'one head of keys': Case(H=5, G=1, Lq=24, Lk=24, options={'causal': True}),
    'grouped prompt in a cache': Case(
        H=6, G=3, Lq=20, Lk=70, options={'causal': True, 'block_len': 16, 'offset': [0, 37]}
    ),
    'grouped token in a cache': Case(
        H=6, G=2, Lq=1, Lk=70, options={'causal': True, 'offset': [0, 37]}
    ),
    'grouped token, masked and capped': Case(
        H=7, G=1, Lq=1, Lk=20, D=4, masked=True, options={'softcap': 0.7}
    ),
    'capped': Case(Lq=53, Lk=53, options={'causal': True, 'block_len': 16, 'softcap': 0.8}),
}
LOCAL = {
    'whole chunks': Case(Lq=32, Lk=32, options={'chunk_len': 8}),
    'ragged': Case(Lq=37, Lk=37, D=4, options={'chunk_len': 8, 'look_back': 2}),
    'both ways': Case(
        Lq=37, Lk=37, masked=True, options={'chunk_len': 4, 'look_ahead': 2, 'causal': False}
    ),
    'masked': Case(Lq=37, Lk=37, masked=True, options={'chunk_len': 8}),
    'grouped': Case(H=6, G=2, Lq=37, Lk=37, D=4, options={'chunk_len': 8, 'softcap': 0.5}),
    'grouped, masked': Case(
        H=4,
        G=1,
        Lq=37,
        Lk=37,
        masked=True,
        options={'chunk_len': 4, 'look_ahead': 1, 'causal': False},
    ),
    'shorter than a chunk': Case(
        Lq=5, Lk=5, options={'chunk_len': 8, 'look_ahead': 1, 'causal': False}
    ),
}


@pytest.mark.parametrize('case', DENSE.values(), ids=DENSE)
def test_dense_is_the_full_softmax(case):
    *qkvg, mask = arrays(case)
    options = dict(case.options)
    if 'offset' in options:
        options['offset'] = jnp.array(options['offset'], jnp.int32)
    got = with_gradients(functools.partial(dot_product_attention, mask=mask, **options), *qkvg)
    close(got, reference(*qkvg, seen(case, mask, **options), **score_options(options)))


def score_options(options):
    return {name: options[name] for name in ('scale', 'softcap') if name in options}


@pytest.mark.parametrize('window', [1, 7, 16, 17, 40])
def test_a_window_visits_no_more_blocks_than_it_sees(window):
    """Blocks of 16 by 16: the bounds of both loops, for rows that start at 3 and at 20."""
    plan = blockwise.Plan(70, 96, 16, 16, 1.0, causal=True, window=window)
    starts = 3, 20
    query, key = np.arange(5 * 16)[:, None], np.arange(96)
    see = np.zeros((5, 6), bool)
    for start in starts:
        at = (key <= query + start) & (key > query + start - window)
        see |= at.reshape(5, 16, 6, 16).any((1, 3))
    most = 0
    for i in range(5):
        low, middle, high = blockwise.key_blocks(plan, False, starts, i)
        assert middle == low and set(np.flatnonzero(see[i])) <= set(range(low, high))
        most = max(most, high - low)
    for j in range(6):
        low, middle, high = blockwise.query_blocks(plan, False, starts, j)
        assert middle == high and set(np.flatnonzero(see[:, j])) <= set(range(low, high))
        most = max(most, high - low)
    assert most <= (16 + window + 17) // 16 + 2  # nothing that grows with the length


def test_a_window_over_everything_is_no_window():
    q, k, v, *_ = arrays(Case(Lq=37, Lk=37))
    f = functools.partial(dot_product_attention, q, k, v, causal=True, block_len=16)
    np.testing.assert_array_equal(f(window=37), f())


@pytest.mark.parametrize('case', LOCAL.values(), ids=LOCAL)
def test_local_is_the_full_softmax_of_its_windows(case, monkeypatch):
    monkeypatch.setattr(tiles, 'CPU_PAIRS_IN_TILE', 256)  # several tiles, one ragged
    *qkvg, mask = arrays(case)
    got = with_gradients(functools.partial(local_attention, mask=mask, **case.options), *qkvg)
    see = seen(case, mask, **{'causal': True, **case.options})
    close(got, reference(*qkvg, see, **score_options(case.options)))


@pytest.mark.parametrize('length', [1, 37])
def test_dropout_of_shared_keys_is_that_of_repeated_ones(length, key, monkeypatch):
    """Head by head and whole must drop the same, or a reversible stack would be wrong."""
    monkeypatch.setattr(tiles, 'CPU_PAIRS_IN_TILE', 256)
    case = Case(H=6, G=2, Lq=length, Lk=37)
    q, k, v, d_out, _ = arrays(case)
    dense = functools.partial(dot_product_attention, block_len=16)
    local = functools.partial(local_attention, chunk_len=4)
    for f in (dense, local) if length > 1 else (dense,):

        def dropped(q, k, v, f=f):
            return f(q, k, v, dropout_rate=0.25, rng=key)

        got = with_gradients(dropped, q, k, v, d_out)
        repeated = with_gradients(
            lambda q, k, v, f=dropped: f(q, jnp.repeat(k, 3, 1), jnp.repeat(v, 3, 1)),
            *(q, k, v, d_out),
        )
        close(got, repeated)


def test_keys_are_not_repeated():
    def temporaries(g):
        q = jax.ShapeDtypeStruct((1, 8, 1024, 16), jnp.float32)
        k = jax.ShapeDtypeStruct((1, g, 1024, 16), jnp.float32)
        step = jax.jit(jax.grad(lambda *x: dot_product_attention(*x).sum(), (0, 1, 2)))
        return step.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1) <= temporaries(8)
    with layercomb_kernels.off():
        assert temporaries(1) < temporaries(8)


@pytest.mark.parametrize('pairs', [1, 2 * 16 * 16])
def test_heads_taken_together_or_one_by_one_give_the_same(pairs, monkeypatch):
    monkeypatch.setattr(tiles, 'CPU_PAIRS', pairs)
    case = Case(H=2, Lq=37, Lk=37, masked=True)
    *qkvg, mask = arrays(case)
    plan = blockwise.Plan(37, 37, 16, 16, 0.25, causal=True)
    jax.clear_caches()  # else the program compiled for another number is run again
    got = with_gradients(lambda *x: blockwise.attend(plan, *x, mask, None, None, None), *qkvg)
    close(got, reference(*qkvg, seen(case, mask, causal=True), scale=0.25))


def test_large_scores_do_not_overflow():
    case = Case(Lq=40, Lk=40)
    q, k, v, d_out, _ = arrays(case)
    q = 300 * q
    f = functools.partial(dot_product_attention, causal=True, block_len=16)
    got = with_gradients(f, q, k, v, d_out)
    expected = reference(q, k, v, d_out, seen(case, None, causal=True))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    assert all(bool(jnp.isfinite(x).all()) for x in got)


def test_rows_without_a_real_key_are_zero_and_so_are_their_gradients():
    case = Case(Lq=37, Lk=37, masked=True)
    *qkvg, mask = arrays(case)
    for f in (
        functools.partial(dot_product_attention, mask=mask, block_len=16),
        functools.partial(local_attention, mask=mask, chunk_len=8),
    ):
        for x in with_gradients(f, *qkvg):
            assert not np.asarray(x[0]).any() and np.isfinite(x).all()


@pytest.mark.parametrize('length', [1, 37])
def test_dropout_multiplies_the_probabilities(length, key):
    case = Case(B=1, H=2, Lq=length, Lk=48, K=4, D=48)
    q, k, _, d_out, _ = arrays(case)
    v = jnp.broadcast_to(jnp.eye(48), (1, 2, 48, 48))  # the output is then P itself
    f = functools.partial(dot_product_attention, dropout_rate=0.25, rng=key, block_len=16)
    got = with_gradients(f, q, k, v, d_out)
    see = seen(case, None)
    undropped = reference(q, k, v, d_out, see)[0]
    keep = np.asarray(got[0]) / undropped
    kept = keep > 0.5
    np.testing.assert_allclose(keep[kept], 4 / 3, rtol=1e-3)
    assert not keep[~kept].any()
    if length > 1:
        assert abs(kept.mean() - 0.75) < 0.03
        assert 0 < (kept[0, 0] != kept[0, 1]).mean() < 1  # another choice in every head
    close(got, reference(q, k, v, d_out, see, keep=kept * 4 / 3))


def test_local_dropout_multiplies_the_probabilities(key, monkeypatch):
    monkeypatch.setattr(tiles, 'CPU_PAIRS_IN_TILE', 256)
    case = Case(B=1, H=2, Lq=37, Lk=37, K=4, D=37)
    q, k, _, d_out, _ = arrays(case)
    v = jnp.broadcast_to(jnp.eye(37), (1, 2, 37, 37))
    f = functools.partial(local_attention, chunk_len=8, dropout_rate=0.25, rng=key)
    got = with_gradients(f, q, k, v, d_out)
    see = seen(case, None, causal=True, chunk_len=8)
    kept = np.asarray(got[0]) > 0
    assert abs(kept.sum() / see.sum() / case.H - 0.75) < 0.05
    close(got, reference(q, k, v, d_out, see, keep=kept * 4 / 3))


def test_dropout_at_rate_zero_is_none(key):
    q, k, v, *_ = arrays(Case())
    dropped = dot_product_attention(q, k, v, dropout_rate=0.0, rng=key)
    np.testing.assert_array_equal(dropped, dot_product_attention(q, k, v))


@pytest.mark.parametrize('length, dtype', [(1, jnp.bfloat16), (37, jnp.bfloat16), (1, jnp.float16)])
def test_narrow_inputs_are_summed_in_float32(length, dtype):
    case = Case(Lq=length, Lk=37)
    q, k, v, d_out, _ = arrays(case, dtype)
    got = with_gradients(functools.partial(dot_product_attention, block_len=16), q, k, v, d_out)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    # One rounding of the result is all that may be seen.
    for x, y in zip(got, reference(q, k, v, d_out, seen(case, None)), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=1e-2, atol=1e-2)


def test_narrow_local_attention():
    case = Case(Lq=37, Lk=37)
    q, k, v, d_out, _ = arrays(case, jnp.bfloat16)
    got = with_gradients(functools.partial(local_attention, chunk_len=8), q, k, v, d_out)
    see = seen(case, None, causal=True, chunk_len=8)
    for x, y in zip(got, reference(q, k, v, d_out, see), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=1e-2, atol=1e-2)


def test_eager_and_mapped_are_the_same_as_jitted():
    q, k, v, *_ = arrays(Case(Lq=37, Lk=37))
    for f in (
        functools.partial(dot_product_attention, causal=True, block_len=16),
        functools.partial(local_attention, chunk_len=8),
    ):
        expected = jax.jit(f)(q, k, v)
        np.testing.assert_allclose(f(q, k, v), expected, atol=1e-6)
        mapped = jax.vmap(f)(q[:, None], k[:, None], v[:, None])[:, 0]
        np.testing.assert_allclose(mapped, expected, atol=1e-6)


def test_decoding_by_prompt_and_tokens_is_the_whole_sequence():
    q, k, v, *_ = arrays(Case(Lq=24, Lk=24))
    whole = dot_product_attention(q, k, v, causal=True)
    room = [(0, 0), (0, 0), (0, 16), (0, 0)]
    k, v = jnp.pad(k, room, constant_values=7.0), jnp.pad(v, room, constant_values=7.0)
    at = functools.partial(dot_product_attention, causal=True, block_len=16)
    zero = jnp.zeros(2, jnp.int32)
    np.testing.assert_allclose(at(q[:, :, :20], k, v, offset=zero), whole[:, :, :20], atol=1e-5)
    for t in range(20, 24):
        token = at(q[:, :, t : t + 1], k, v, offset=zero + t)
        np.testing.assert_allclose(token, whole[:, :, t : t + 1], atol=1e-5)


@pytest.mark.parametrize(
    'f',
    [
        functools.partial(dot_product_attention, causal=True, block_len=128),
        functools.partial(dot_product_attention, block_len=128),
        functools.partial(dot_product_attention, causal=True, window=100, block_len=128),
        functools.partial(local_attention, chunk_len=64),
    ],
    ids=['causal', 'bidirectional', 'window', 'local'],
)
def test_memory_is_linear_in_the_length(f):
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        step = jax.jit(jax.grad(lambda q, k, v: f(q, k, v).sum(), (0, 1, 2)))
        return step.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert long < 2.2 * short
    assert long < 8192 * 8192  # a quarter of one (L, L) matrix of one head


def test_cudnn_is_asked_for_where_it_applies(monkeypatch):
    asked = []

    def cudnn(q, k, v, **options):
        asked.append((q.shape, options))
        return v

    monkeypatch.setattr(attention_functions, 'has_cudnn', lambda: True)
    monkeypatch.setattr(jax.nn, 'dot_product_attention', cudnn)
    q, k, v, _, mask = arrays(Case(Lq=16, Lk=16, masked=True), jnp.bfloat16)
    y = dot_product_attention(q, k, v, causal=True)
    np.testing.assert_array_equal(y, v)
    options = {'scale': 8**-0.5, 'is_causal': True, 'implementation': 'cudnn'}
    assert asked == [((2, 16, 3, 8), options)]
    dot_product_attention(q, k, v, mask=mask)
    dot_product_attention(q, k, v, causal=True, window=3)
    dot_product_attention(q[..., :7], k[..., :7], v)
    dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    dot_product_attention(q, k, v, dropout_rate=0.5, rng=jax.random.key(0))
    dot_product_attention(q, k, v, softcap=30.0)
    assert len(asked) == 1


def test_the_cpu_has_no_cudnn():
    assert not attention_functions.has_cudnn()


@pytest.mark.parametrize(
    'change, message',
    [
        ({'q': jnp.ones((2, 6, 4))}, 'takes arrays .batch, heads, length, depth.'),
        ({'q': jnp.ones((1, 3, 6, 4))}, 'must agree in batch, k and v in heads'),
        ({'v': jnp.ones((2, 1, 6, 4))}, 'must agree in batch, k and v in heads'),
        (
            {'q': jnp.ones((2, 10, 6, 4))},
            '3 heads of keys and values do not divide 10 heads of queries: use 2',
        ),
        ({'softcap': 0.0}, 'softcap must be positive, got 0.0: None is for no cap'),
        ({'q': jnp.ones((2, 3, 6, 5))}, 'q and k must have the same depth'),
        ({'v': jnp.ones((2, 3, 7, 4))}, 'k and v must have the same length'),
        ({'v': jnp.ones((2, 3, 6, 4), jnp.int32)}, 'attention takes floats'),
        ({'mask': jnp.ones((2, 6))}, r'mask must be bool\(2, 6\), got float32'),
        ({'mask': jnp.ones((2, 5), bool)}, r'mask must be bool\(2, 6\), got bool\(2, 5\)'),
        ({'offset': jnp.ones(2)}, r'offset must be int32\(2,\), got float32'),
        ({'dropout_rate': 1.0}, r'dropout_rate must be in \[0, 1\), got 1.0'),
        ({'dropout_rate': 0.1}, 'needs a random key: pass rng='),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, message):
    x = jnp.ones((2, 3, 6, 4))
    with pytest.raises(ValueError, match=message) as e:
        dot_product_attention(**{'q': x, 'k': x, 'v': x, **change})
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'chunk_len': 0}, 'chunk_len must be positive'),
        ({'look_back': -1}, 'look_back and look_ahead not negative'),
        ({'look_ahead': 1}, 'looks into the future: pass causal=False'),
        ({'q': jnp.ones((2, 3, 5, 4))}, 'is of a sequence to itself'),
    ],
)
def test_wrong_chunks_are_refused_in_one_line(change, message):
    x = jnp.ones((2, 3, 6, 4))
    with pytest.raises(ValueError, match=message):
        local_attention(**{'q': x, 'k': x, 'v': x, 'chunk_len': 2, **change})


def test_a_single_query_of_no_rows():
    q = jnp.ones((0, 2, 1, 4))
    assert dot_product_attention(q, q, q, causal=True).shape == q.shape
