"""Attention of packed rows beside attention of each document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.attention import documents
from layercomb.layers.state import segments

LENGTHS = [37, 1, 22, 40, 3, 17]  # not multiples of anything
L = sum(LENGTHS)
IDS = jnp.asarray(np.repeat(np.arange(6), LENGTHS), jnp.int32)[None]


def qkv(seed=0, heads=(4, 2)):
    keys = jax.random.split(jax.random.key(seed), 4)
    h, g = heads
    shapes = [(1, h, L, 4), (1, g, L, 4), (1, g, L, 4), (1, h, L, 4)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def by_hand(q, k, v, seen, bias=None):
    """Softmax over the keys that `seen` (L, L) allows, by NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = np.einsum('bhqk,bhck->bhqc', q, k) / 2
    s = np.where(seen, s if bias is None else s + bias, -np.inf)
    with np.errstate(invalid='ignore'):
        p = np.nan_to_num(np.exp(s - s.max(-1, keepdims=True)))
    total = p.sum(-1, keepdims=True)
    return np.einsum('bhqc,bhcd->bhqd', p / np.where(total, total, 1), v)


T = np.arange(L)
SAME = np.asarray(IDS[0])[:, None] == np.asarray(IDS[0])[None]
CAUSAL = T[:, None] >= T[None]
OPTIONS = {
    'both ways': ({}, True),
    'causal': ({'causal': True}, CAUSAL),
    'window': ({'causal': True, 'window': 9}, CAUSAL & (T[:, None] - T[None] < 9)),
    'masked': ({'mask': jnp.asarray(T % 3 != 1)[None]}, (T % 3 != 1)[None]),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_a_query_sees_its_own_document(name):
    """Block by block, where most blocks are not computed."""
    options, seen = OPTIONS[name]
    q, k, v, _ = qkv()
    y = tl.dot_product_attention(q, k, v, segments=IDS, block_len=16, **options)
    np.testing.assert_allclose(y, by_hand(q, k, v, SAME & seen), rtol=1e-5, atol=1e-6)
    nothing = ~(SAME & seen).any(-1)
    assert name != 'masked' or nothing.any()
    assert not np.asarray(y)[:, :, nothing].any()


def test_gradients_of_blocks_are_those_of_one_block():
    """The one with dropout, shared heads and a bias; blocks of the other skip nothing."""
    q, k, v, ct = qkv()
    bias = jax.random.normal(jax.random.key(5), (11, 4))

    def loss(q, k, v, bias, **options):
        y = tl.dot_product_attention(
            q, k, v, causal=True, segments=IDS, bias=bias, softcap=3.0, **options
        )
        return jnp.sum(y * ct)

    got = jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias, block_len=16)
    one = jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias, block_len=L)
    for a, b in zip(got, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_leaves_out_other_documents_and_keeps_means():
    q, k, _, _ = qkv()
    v = jnp.ones_like(k)
    y = tl.dot_product_attention(
        q, k, v, segments=IDS, dropout_rate=0.3, rng=jax.random.key(1), block_len=16
    )
    alone = np.asarray(y)[:, :, 37]  # a document of one position
    assert set(np.round(alone, 4).ravel()) <= {0.0, np.float32(1.4286)}
    assert abs(float(y.mean()) - 1) < 0.05


def test_blocks_that_hold_no_document_of_each_other_do_not_meet():
    rows = jnp.asarray([[0] * 16 + [1] * 16 + [2] * 16 + [2] * 4, [3] * 8 + [4] * 40 + [5] * 4])
    meets = documents.meeting(rows.astype(jnp.int32), 16, 16)
    assert [x.tolist() for x in meets.of_queries] == [[0, 0, 0, 2], [3, 3, 4, 4]]
    one = documents.meeting(rows[:1].astype(jnp.int32), 16, 16)
    assert [x.tolist() for x in one.of_queries] == [[0, 1, 2, 2], [1, 2, 4, 4]]
    assert documents.meeting(rows[:, :16].astype(jnp.int32), 16, 16) is None


def test_no_pair_is_left_out_also_where_numbers_fall():
    ids = jax.random.randint(jax.random.key(0), (1, 48), 0, 20, jnp.int32)
    (first, after), (first_q, after_q) = documents.meeting(ids, 16, 16)
    blocks = np.asarray(ids[0]).reshape(3, 16)
    for i in range(3):
        for j in range(3):
            if set(blocks[i]) & set(blocks[j]):
                assert first[i] <= j < after[i] and first_q[j] <= i < after_q[j]


def test_skipped_blocks_are_not_read():
    """NaN in a block that is skipped would show."""
    q, k, v, _ = qkv()
    ids = jnp.asarray(np.repeat([0, 1], [64, L - 64]), jnp.int32)[None]
    poisoned = k.at[:, :, :48].set(jnp.nan)
    y = tl.dot_product_attention(q, poisoned, v, segments=ids, block_len=16)
    assert jnp.isfinite(y[:, :, 64:]).all()


def test_places_and_lengths_in_documents():
    ids = jnp.asarray([[4, 4, 4, 7, 9, 9], [0, 0, 0, 0, 0, 0]], jnp.int32)
    assert segments.places(ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert segments.lengths(ids).tolist() == [[3, 3, 3, 1, 2, 2], [6] * 6]


def test_segments_that_do_not_fit_are_refused():
    q, k, v, _ = qkv()
    with pytest.raises(ValueError, match=r'int32\[1, 120\], the document of each pos.*float32'):
        tl.dot_product_attention(q, k, v, segments=IDS.astype(jnp.float32))
    with pytest.raises(ValueError, match='segments are of a sequence to itself, got q'):
        tl.dot_product_attention(q[:, :, :8], k, v, segments=IDS[:, :8])
    with pytest.raises(ValueError, match='and an offset: leave them out in decoding'):
        tl.dot_product_attention(q, k, v, segments=IDS, offset=jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match='segments must be int32'):
        tl.local_attention(q, k, v, chunk_len=4, segments=IDS[:, 1:])
    buckets = tl.lsh_buckets(q, jax.random.key(0), n_buckets=2, n_hashes=1)
    with pytest.raises(ValueError, match='segments must be int32'):
        tl.lsh_attention(q, v, buckets, n_buckets=2, chunk_len=4, segments=IDS[:, 1:])


@pytest.mark.parametrize('causal', [True, False])
def test_chunks_begin_where_documents_do(causal):
    q, k, v, _ = qkv()
    place = np.asarray(segments.places(IDS)[0])
    apart = place[:, None] // 5 - place[None] // 5
    seen = SAME & (apart <= 1) & (CAUSAL if causal else apart >= -1)
    y = tl.local_attention(
        q, k, v, chunk_len=5, causal=causal, look_ahead=int(not causal), segments=IDS
    )
    np.testing.assert_allclose(y, by_hand(q, k, v, seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('neighbourhood', ['bucket', 'chunk'])
def test_lsh_meets_what_it_meets_in_the_document_alone(neighbourhood):
    q, _, v, _ = qkv()
    buckets = tl.lsh_buckets(q, jax.random.key(0), n_buckets=4, n_hashes=2)
    options = {'n_buckets': 4, 'chunk_len': 5, 'neighbourhood': neighbourhood}
    y = tl.lsh_attention(q, v, buckets, segments=IDS, duplicates='once', **options)
    some = slice(60, 100)  # a document
    alone = tl.lsh_attention(
        q[:, :, some], v[:, :, some], buckets[..., some], duplicates='once', **options
    )
    np.testing.assert_allclose(y[:, :, some], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('neighbourhood', ['chunk', 'circle'])
def test_lsh_keeps_to_the_document(neighbourhood):
    """Gradients of a document are zero for all others, in all of its forms."""
    q, _, v, _ = qkv()
    buckets = tl.lsh_buckets(q, jax.random.key(0), n_buckets=4, n_hashes=2)

    def total(q, v):
        y = tl.lsh_attention(
            q, v, buckets, n_buckets=4, chunk_len=8, neighbourhood=neighbourhood, segments=IDS
        )
        return y[:, :, 38:60].sum()

    for d in jax.grad(total, (0, 1))(q, v):
        assert not d[:, :, :38].any() and not d[:, :, 60:].any()
        assert d[:, :, 38:60].any()
