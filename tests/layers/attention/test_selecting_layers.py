"""Layers that select their keys: choice of blocks, decoding, causality, documents, memory."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, models, shape_dtype, tl, transforms
from layercomb.layers.attention.selected import cache, choice, core
from layercomb.layers.attention.selected.cache import once
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import take_decisions

B, L, D = 2, 37, 16
HASHED = tl.HashedSelfAttention(4, n_hashes=3, n_buckets=4, chunk_len=6, local_len=4, n_sinks=2)
BLOCKS = tl.BlockSelfAttention(4, n_chosen=2, block_len=4, local_len=3, n_sinks=1)
MIXED = tl.MixedSelfAttention(
    4, n_hashes=2, n_chosen=2, n_buckets=4, chunk_len=5, local_len=3, n_sinks=1
)
LAYERS = {
    'hashed': HASHED,
    'hashed, shared heads': HASHED.replace(n_kv_heads=2, rotary=tl.RotaryPositions()),
    'hashed, counted': HASHED.replace(duplicates='count', local_len=0, key_kernel=1, softcap=3.0),
    'hashed, centred': HASHED.replace(n_kv_heads=2, centred=True),
    'blocks': BLOCKS,
    'blocks, wide window': BLOCKS.replace(local_len=9, n_kv_heads=1, rotary=tl.RotaryPositions()),
    'both': MIXED,
    'both, counted': MIXED.replace(duplicates='count', n_kv_heads=2, local_len=0),
    'both, wide window': MIXED.replace(local_len=7, rotary=tl.RotaryPositions(), centred=True),
    'blocks, counted': BLOCKS.replace(duplicates='count', n_kv_heads=2, scale=0.7, n_sinks=0),
}
over_layers = pytest.mark.parametrize('net', LAYERS.values(), ids=LAYERS.keys())


def stream(seed=0, length=L):
    return jax.random.normal(jax.random.key(seed), (B, length, D))


def weights_of(net, *inputs):
    """Initial weights, away from the identity of the convolution."""
    weights, _ = net.init(tuple(shape_dtype(x.shape, x.dtype) for x in inputs), jax.random.key(1))

    def moved(w):
        return w + 0.1 * jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)

    return jax.tree.map(moved, weights)


def whole(net, weights, *inputs, **more):
    return jax.jit(lambda weights, inputs: net.apply(weights, {}, inputs, **more)[0][0])(
        weights, inputs
    )


def wanted_blocks(q, k, size, n, causal, real, ids):
    """The definition of `chosen_blocks`, as sets: query → numbers of blocks in its document."""
    (b, h, length, _), group = q.shape, q.shape[1] // k.shape[1]
    made = {}
    for row, head, t in np.ndindex(b, h, length):
        if not real[row, t]:
            continue
        there = [j for j in range(length) if real[row, j] and ids[row, j] == ids[row, t]]
        cut = [there[i : i + size] for i in range(0, len(there), size)]
        own = next(i for i, block in enumerate(cut) if t in block)
        others = [i for i in range(len(cut)) if (i < own if causal else i != own)]
        mean = {i: k[row, head // group, cut[i]].mean(0) for i in others if len(cut[i]) == size}
        liked = sorted(mean, key=lambda i: -(q[row, head, t] @ mean[i]))
        made[row, head, t] = own, liked[:n]
    return made


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('kind', ['plain', 'masked', 'packed', 'both', 'short'])
def test_blocks_are_those_with_the_best_mean(kind, causal):
    g = np.random.default_rng(0)
    length, size, n = (3, 4, 2) if kind == 'short' else (37, 4, 3)
    q, k = g.normal(size=(2, 4, length, 8)), g.normal(size=(2, 2, length, 8))
    real, ids = np.ones((2, length), bool), np.zeros((2, length), np.int32)
    if kind in ('masked', 'both'):
        real = g.random((2, length)) < 0.7
    if kind in ('packed', 'both'):
        ids = np.sort(g.integers(0, 4, (2, length)), 1).astype(np.int32)
    got = tl.chosen_blocks(
        jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), block_len=size, n_chosen=n,
        causal=causal,
        mask=None if real.all() else jnp.asarray(real),
        segments=jnp.asarray(ids) if ids.any() else None,
    )  # fmt: skip
    nothing = -(-length // size)
    for (row, head, t), (_, liked) in wanted_blocks(q, k, size, n, causal, real, ids).items():
        found = [int(i) for i in got[row, head, :, t] if i != nothing]
        assert found == liked


def test_many_queries_are_compared_some_at_a_time(monkeypatch):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 2, 50, 8))
    find = functools.partial(tl.chosen_blocks, block_len=4, n_chosen=3)
    wanted = find(q, k)
    monkeypatch.setattr(choice, '_SCORES_AT_A_TIME', 7 * 2 * 12)
    np.testing.assert_array_equal(find(q, k), wanted)


@pytest.mark.parametrize(
    ('net', 'masked'), [(net, i % 2 == 1) for i, net in enumerate(LAYERS.values())], ids=LAYERS
)
def test_a_prompt_and_single_positions_see_what_the_whole_sees(net, masked):
    net = net.replace(masked=masked)
    inputs = (stream(),)
    if masked:
        inputs += (jax.random.bernoulli(jax.random.key(5), 0.8, (B, L)),)
    weights = weights_of(net, *inputs)
    signature = tuple(shape_dtype(x.shape, x.dtype) for x in inputs)
    state, outs, start = init_state(net, signature, Mode.PREDICT), [], 0
    step = jax.jit(functools.partial(net.apply, mode=Mode.PREDICT))
    for n in (7, 1, 1, 5, *[1] * (L - 14)):
        (y,), state = step(weights, state, tuple(x[:, start : start + n] for x in inputs))
        outs.append(y)
        start += n
    real = inputs[1][..., None] if masked else True
    got, wanted = jnp.concatenate(outs, 1), whole(net, weights, *inputs)
    np.testing.assert_allclose(jnp.where(real, got, 0), jnp.where(real, wanted, 0), atol=2e-6)


@pytest.mark.parametrize('name', ['hashed, centred', 'blocks', 'blocks, wide window'])
def test_padding_behind_a_short_prompt_is_as_if_it_had_never_been(name):
    net = LAYERS[name]
    x = stream()
    weights = weights_of(net, x)
    state = init_state(net, (shape_dtype(x.shape),), Mode.PREDICT)
    _, state = net.apply(weights, state, (x[:, :20],), mode=Mode.PREDICT)
    lengths = jnp.array([13, 18])
    state = tl.seek(state, lengths)
    row = jnp.arange(B)
    outs = []
    for i in range(6):
        (y,), state = net.apply(weights, state, (x[row, lengths + i][:, None],), mode=Mode.PREDICT)
        outs.append(y[:, 0])
    wanted = whole(net, weights, x)
    for i, y in enumerate(outs):
        np.testing.assert_allclose(y, wanted[row, lengths + i], atol=2e-6)


@over_layers
def test_no_later_position_matters(net):
    x, t = stream(), 11
    weights = weights_of(net, x)
    f = jax.jit(lambda x: net.apply(weights, {}, (x,))[0][0][:, t])
    y, pull = jax.vjp(f, x)
    (d_x,) = pull(jax.random.normal(jax.random.key(3), y.shape))
    assert not d_x[:, t + 1 :].any()
    other = x.at[:, t + 1 :].set(stream(7)[:, t + 1 :])
    np.testing.assert_allclose(f(other), y, atol=2e-6)


@over_layers
def test_what_is_chosen_does_not_depend_on_later_positions(net):
    x, t = stream(), 30
    weights = weights_of(net, x)

    def chosen(x):
        _, state = net.apply(weights, {}, (x,), rng=jax.random.key(2), mode=Mode.RECORD)
        return jax.tree.leaves(take_decisions(state)[1])

    other = x.at[:, t + 1 :].set(stream(7)[:, t + 1 :])
    for a, b in zip(chosen(x), chosen(other), strict=True):
        np.testing.assert_array_equal(a[..., : t + 1], b[..., : t + 1])


@pytest.mark.parametrize(
    ('net', 'causal'), [(net, i % 2 == 1) for i, net in enumerate(LAYERS.values())], ids=LAYERS
)
def test_documents_in_one_row_are_as_if_alone(net, causal):
    net = net.replace(causal=causal, rotary=None)
    x, ends = stream(), (0, 19, 30, L)
    weights = weights_of(net, x)
    ids = np.repeat(np.arange(3), np.diff(ends)).astype(np.int32)
    ids = jnp.asarray(np.stack([ids, ids]))

    got = whole(transforms.Segmented(net), weights, x, ids)
    for first, last in itertools.pairwise(ends):
        wanted = whole(net, weights, x[:, first:last])
        np.testing.assert_allclose(got[:, first:last], wanted, atol=2e-6)


def test_one_block_of_everything_is_full_attention():
    x = stream()
    net = tl.BlockSelfAttention(4, n_chosen=1, block_len=L)
    full = net.replace(core=tl.DotProductAttention(scale=1.0))
    weights = weights_of(net, x)
    np.testing.assert_allclose(whole(net, weights, x), whole(full, weights, x), atol=2e-6)


def test_all_buckets_in_one_is_a_window():
    x = stream()
    net = tl.HashedSelfAttention(4, n_hashes=2, n_buckets=1, chunk_len=5, local_len=0)
    window = net.replace(core=tl.DotProductAttention(scale=1.0, window=5))
    weights = weights_of(net, x)
    np.testing.assert_allclose(whole(net, weights, x), whole(window, weights, x), atol=2e-6)


def test_keys_are_convolved_from_the_identity():
    x = jax.random.normal(jax.random.key(0), (B, 2, 9, 4))
    conv = tl.KeyConv(3)
    weights, _ = conv.init((shape_dtype(x.shape),), jax.random.key(1))
    np.testing.assert_array_equal(conv.apply(weights, {}, (x,))[0][0], x)
    kernel = jax.random.normal(jax.random.key(2), weights['kernel'].shape)
    (y,), _ = conv.apply({'kernel': kernel}, {}, (x,))
    t = 5
    wanted = x[:, :, t] + kernel[None, :, 0] * x[:, :, t - 1] + kernel[None, :, 1] * x[:, :, t - 2]
    np.testing.assert_allclose(y[:, :, t], wanted, atol=1e-6)
    np.testing.assert_allclose(y[:, :, 0], x[:, :, 0], atol=1e-6)


def test_a_learned_scale_starts_at_the_root_of_the_depth():
    x = jax.random.normal(jax.random.key(0), (B, 2, 9, 16))
    norm = tl.UnitNorm(scaled=True)
    weights, _ = norm.init((shape_dtype(x.shape),), jax.random.key(1))
    (y,), _ = norm.apply(weights, {}, (x,))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 4, rtol=1e-5)


@pytest.mark.parametrize('net', [HASHED, BLOCKS], ids=['hashed', 'blocks'])
def test_temporaries_grow_with_the_length_alone(net):
    def loss(q, k, v):
        (y,), _ = net.core.apply({}, {}, (q, k, v), rng=jax.random.key(0), mode=Mode.TRAIN)
        return y.sum()

    def temporaries(length):
        x = shape_dtype((1, 2, length, 16))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2048), temporaries(8192)
    assert many < 4.4 * few
    assert many < 8192 * 2 * 16 * 4 * 40  # forty arrays of the size of q


def test_reversible_stacks_decide_once():
    for attention in (HASHED.replace(n_buckets=None), BLOCKS):
        net = models.ReformerLM(
            11, D, 32, 2, 4, max_len=64, attention=attention, positions='rotary', ff_chunk_len=None
        )
        ids = jax.random.randint(jax.random.key(0), (B, 40), 0, 11)
        weights, _ = net.init((shape_dtype(ids.shape, 'int32'),), jax.random.key(1))

        def loss(weights, mode, net=net, ids=ids):
            (y,), _ = net.apply(weights, {}, (ids,), rng=jax.random.key(2), mode=mode)
            return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

        got = jax.jit(jax.grad(lambda w: loss(w, Mode.TRAIN)))(weights)
        wanted = jax.jit(jax.grad(lambda w: loss(w, Mode.RECORD)))(weights)  # runs plainly
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * jnp.abs(b).max())


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: tl.HashedSelfAttention(4, n_buckets=7), 'n_buckets'),
        (lambda: tl.MixedSelfAttention(4, chunk_len=1, causal=False), 'chunk_len=1 leaves no key'),
        (lambda: tl.HashedSelfAttention(4, n_kv_heads=3), 'does not divide n_heads'),
        (lambda: tl.HashedSelfAttention(4, local_len=-1), 'local_len=-1'),
        (lambda: tl.BlockSelfAttention(4, n_sinks=-2), 'n_sinks=-2'),
        (lambda: tl.BlockSelfAttention(4, block_len=0), 'block_len'),
        (lambda: tl.BlockSelfAttention(4, n_chosen=0), 'n_chosen'),
    ],
)
def test_bad_fields_are_refused_when_a_layer_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_decoding_without_a_number_of_buckets_is_refused():
    signature = (shape_dtype((1, 8, D)),)
    with pytest.raises(ValueError, match='decoding needs the number of buckets'):
        tl.HashedSelfAttention(2).init(signature, jax.random.key(0), Mode.PREDICT)
    with pytest.raises(ValueError, match='max_len'):
        tl.BlockSelfAttention(2, max_len=4).init(signature, jax.random.key(0))


@over_layers
def test_a_prompt_in_pieces_in_a_large_room(net, monkeypatch):
    """Each piece reads as short a part of the cache as holds it."""
    monkeypatch.setattr(cache, 'SHORTEST', 8)
    monkeypatch.setattr(cache, 'STEP', 2)
    x = stream(length=29)
    weights = weights_of(net, x)
    wanted = whole(net, weights, x)
    outs, state = [], init_state(net, (shape_dtype((B, 200, D)),), Mode.PREDICT)
    step = jax.jit(functools.partial(net.apply, mode=Mode.PREDICT))
    for begin, end in ((0, 3), (3, 12), (12, 15), (15, 16), (16, 29)):
        (y,), state = step(weights, state, (x[:, begin:end],))
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ('starts', 'length', 'part'),
    [((0, 0), 16, 512), ((496, 3), 16, 512), ((0, 497), 16, 4096), ((4000, 0), 97, 9000)],
)
def test_a_short_prompt_does_not_pay_for_the_room(monkeypatch, starts, length, part):
    def told(self, n, cache, q, position):
        return jnp.full(q.shape, float(n))

    monkeypatch.setattr(core.Selecting, '_among', told)
    net = tl.BlockAttention()
    q = shape_dtype((2, 1, 9000, 8))
    _, state = net.init((q, q, q), jax.random.key(0), Mode.PREDICT)
    state = state.seek(jnp.asarray(starts, jnp.int32))
    new = jnp.zeros((2, 1, length, 8))
    (y,), _ = jax.jit(functools.partial(net.apply, {}, mode=Mode.PREDICT))(state, (new,) * 3)
    assert (y == part).all()


def test_training_without_a_key_is_refused():
    x = stream()
    with pytest.raises(ValueError, match='draws rotations in training'):
        HASHED.apply(weights_of(HASHED, x), {}, (x,), mode=Mode.TRAIN)


def test_sparse_projections_keep_what_makes_keys_easy_to_find():
    x = stream()
    for net in (HASHED, BLOCKS):
        sparse = tl.sparse_qkv(net, 4)
        assert (sparse.core, sparse.key_norm) == (net.core, net.key_norm)
        weights = weights_of(sparse, x)
        assert weights['key_conv'] and weights['query_norm']
        state = init_state(sparse, (shape_dtype(x.shape),), Mode.PREDICT)
        outs = []
        for part in (x[:, :9], x[:, 9:10], x[:, 10:]):
            (y,), state = sparse.apply(weights, state, (part,), mode=Mode.PREDICT)
            outs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outs, 1), whole(sparse, weights, x), atol=2e-6)


@pytest.mark.parametrize('net', [HASHED, BLOCKS], ids=['hashed', 'blocks'])
def test_padding_reaches_nothing_real(net):
    """Keys are convolved with those before them: padding in front counts as zeros."""
    net = net.replace(masked=True)
    x, mask = stream(), jnp.arange(L)[None] >= jnp.array([[9], [4]])
    weights = weights_of(net, x, mask)
    other = jnp.where(mask[..., None], x, stream(7))
    got, wanted = (whole(net, weights, y, mask) for y in (other, x))
    np.testing.assert_array_equal(jnp.where(mask[..., None], got - wanted, 0), 0)


@pytest.mark.parametrize('net', [HASHED, BLOCKS], ids=['hashed', 'blocks'])
def test_one_position_is_a_document_too(net):
    x = stream(length=1)
    weights = weights_of(net, x)
    packed = whole(transforms.Segmented(net), weights, x, jnp.zeros((B, 1), jnp.int32))
    np.testing.assert_allclose(packed, whole(net, weights, x), atol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('net', [HASHED, BLOCKS], ids=['hashed', 'blocks'])
def test_narrow_floats_decode_as_they_evaluate(net, dtype):
    core = net.core
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, 4, 9, 16)).astype(dtype)
    (wanted,), _ = core.apply({}, {}, (q, k, v))
    state = init_state(core, (shape_dtype(q.shape, dtype),) * 3, Mode.PREDICT)
    for t in range(9):
        now = tuple(x[:, :, t : t + 1] for x in (q, k, v))
        (y,), state = core.apply({}, state, now, mode=Mode.PREDICT)
        got, whole = (z.astype(jnp.float32) for z in (y[:, :, 0], wanted[:, :, t]))
        np.testing.assert_allclose(got, whole, atol=0.03)


def test_many_found_keys_count_once_as_few_do():
    at = jax.random.randint(jax.random.key(0), (3, 300), -5, 60)
    few = jnp.concatenate([at[:, :250], jnp.full((3, 50), -1)], 1)
    wanted = jnp.pad(once(at[:, :250]), ((0, 0), (0, 50)))
    np.testing.assert_array_equal(once(few), wanted)


def test_the_scale_is_one_where_queries_have_one():
    net = tl.HashedSelfAttention(2)
    assert net.core.scale == 1 and net.replace(chunk_len=4).core.scale == 1
    assert tl.HashedSelfAttention(2, query_norm=tl.RMSNorm()).core.scale is None


@pytest.mark.parametrize('net', [HASHED, BLOCKS], ids=['hashed', 'blocks'])
def test_a_layer_is_as_causal_as_its_core(net):
    ahead = tl.DotProductAttention(causal=False)
    made = net.replace(core=ahead)
    assert made.causal is False and made.replace(n_kv_heads=2).causal is False
    assert made.replace(core=tl.DotProductAttention()).causal is True
    assert net.replace(causal=False).core.causal is False
    assert tl.sparse_qkv(made, 4).causal is False
    assert transforms.cast(made).causal is False and made == eval(repr(made), vars(tl))
    with pytest.raises(ValueError, match='sees the tokens that it should predict'):
        models.Reformer(11, D, 16, 1, 1, 4, 16, decoder_attention=made)


HEADS = jnp.ones((2, 4, 8, 16))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: blocks_of(mask=jnp.ones((1, 8), bool)), 'mask'),
        (lambda: blocks_of(mask=jnp.ones((2, 8), jnp.int32)), 'mask'),
        (lambda: blocks_of(k=HEADS[:, :, :5]), 'selected attention takes q'),
        (lambda: blocks_of(k=HEADS[:, :3]), 'heads'),
        (lambda: blocks_of(block_len=0), 'block_len=0 and n_chosen=2 are at least 1'),
        (lambda: applied(BLOCKS.core, HEADS[:, :, :5], HEADS, HEADS), 'selected attention takes q'),
        (lambda: applied(HASHED.core, HEADS, HEADS[..., :8], HEADS), 'selected attention takes q'),
        (lambda: of_other_heads(tl.UnitNorm(scaled=True)), 'weights of 4 heads'),
        (lambda: of_other_heads(tl.KeyConv()), 'weights of 4 heads'),
        (lambda: convolved(jnp.ones((1, 8), bool)), r'mask must be bool\(2, 8\)'),
        (lambda: convolved(jnp.ones((2, 5), bool)), r'mask must be bool\(2, 8\)'),
        (lambda: convolved(jnp.ones((2, 8), jnp.int32)), 'mask must be bool'),
    ],
)
def test_nothing_broadcasts_in_silence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def blocks_of(k=HEADS, **options):
    return tl.chosen_blocks(HEADS, k, **{'block_len': 4, 'n_chosen': 2, **options})


def applied(core, *qkv):
    return core.apply({}, {}, qkv)


def convolved(mask):
    layer = tl.KeyConv(masked=True)
    signature = shape_dtype(HEADS.shape), shape_dtype((2, 8), bool)
    return layer.apply(layer.init(signature, jax.random.key(0))[0], {}, (HEADS, mask))


def of_other_heads(layer):
    weights, _ = layer.init((shape_dtype(HEADS.shape),), jax.random.key(0))
    return layer.apply(weights, {}, (HEADS[:, :1],))
