"""Terraformers: gradients, what each side sees, decoding, which parts are sparse, and errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl, trees
from layercomb.layers.core.layer import init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import take_decisions
from layercomb.models.terraformer import AfterMemory
from layercomb.supervised.decoding import generate, prompts
from layercomb.supervised.decoding.reading import ingesting

B, M, L, V, W, D, F, H, MAX = 2, 13, 10, 11, 7, 8, 16, 2, 16
SPARSE = {'ff_block_size': 4, 'qkv_modules': 4, 'head_modules': 2}
DENSE = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}
LSH = tl.LSHSelfAttention(H, chunk_len=4, n_hashes=2)
HASHED = tl.HashedSelfAttention(H, chunk_len=2, n_hashes=2, n_buckets=4, local_len=2)


def lm(n_layers=2, dropout=0.0, attention=None, **changes):
    return models.TerraformerLM(
        V, D, F, n_layers, H, MAX, dropout, attention, **{**SPARSE, **changes}
    )


def seq2seq(n_layers=1, dropout=0.0, *attention, **changes):
    settings = {'masked': True, 'target_vocab_size': W, **SPARSE, **changes}
    return models.Terraformer(V, D, F, n_layers, n_layers, H, MAX, dropout, *attention, **settings)


def values():
    """Source, inputs and mask: the second row's source is 9 long."""
    rng = np.random.default_rng(0)
    source, inputs = rng.integers(0, V, (B, M)), rng.integers(0, W, (B, L))
    return tuple(map(jnp.asarray, (source, inputs, np.arange(M) < np.array([[M], [9]]))))


@functools.lru_cache
def weights_of(net):
    inputs = values()[: net.n_in] if net.n_in > 1 else values()[:1]
    made = jax.jit(lambda: net.init(lc.signature_of(inputs), jax.random.key(1)))()
    # Where embeddings are next to nothing, norms magnify rounding.
    return trees.map_with_path(lambda p, w: 50 * w if 'table' in p else w, made[0]), made[1]


@functools.partial(jax.jit, static_argnums=0, static_argnames='mode')
def apply(net, weights, state, inputs, rng=None, mode=Mode.EVAL):
    return net.apply(weights, state, inputs, rng=rng, mode=mode)


def logits(net, inputs):
    return apply(net, *weights_of(net), inputs)[0][0]


def decoded(net, inputs, pieces):
    """Logits, the last of `pieces` being the inputs that are taken step by step."""
    weights, _ = weights_of(net)
    state = init_state(net, inputs)
    made = []
    for start, stop in pieces:
        step = list(inputs)
        at = min(1, len(step) - 1)
        step[at] = step[at][:, start:stop]
        (y,), state = apply(net, weights, state, tuple(step), mode=Mode.PREDICT)
        made.append(y)
    return jnp.concatenate(made, 1)


def test_every_part_is_switched_by_itself():
    def kinds(net):
        found = set()

        def look(layer):
            found.add(type(layer))
            return layer

        lc.transforms.rewrite(net, look)
        return found & {tl.SparseFF, tl.SparseQKVAttention, tl.MultiplicativeHead}

    sparse = {
        'ff_block_size': tl.SparseFF,
        'qkv_modules': tl.SparseQKVAttention,
        'head_modules': tl.MultiplicativeHead,
    }
    for build in (lm, seq2seq):
        assert kinds(build()) == set(sparse.values())
        assert kinds(build(**DENSE)) == set()
        for switch, kind in sparse.items():
            assert kinds(build(**{**DENSE, switch: SPARSE[switch]})) == {kind}


def test_dense_is_the_reformer_of_the_same_shape():
    changes = {'activation': 'gelu', 'positions': 'learned', 'ff_chunk_len': 4}
    dense = lm(attention=tl.SelfAttention(H), **DENSE, **changes)
    assert dense == models.ReformerLM(V, D, F, 2, H, MAX, 0.0, tl.SelfAttention(H), **changes)


def test_a_model_built_twice_is_one_model():
    assert lm() == lm() and eval(repr(lm(dropout=0.1)), vars(tl)) == lm(dropout=0.1)
    names = {**vars(tl), 'AfterMemory': AfterMemory}
    assert eval(repr(seq2seq()), names) == seq2seq()


@pytest.mark.parametrize(
    'attention',
    [pytest.param(None, marks=pytest.mark.slow), LSH, HASHED],
    ids=['full', 'lsh', 'hashed'],
)
def test_a_language_model_decodes_what_it_evaluates(attention):
    net, (tokens, *_) = lm(attention=attention), values()
    whole = logits(net, (tokens,))
    made = decoded(net, (tokens,), ((0, 6), (6, 7), (7, 8), (8, M)))
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-5)
    edited = logits(net, (tokens.at[:, 8:].set((tokens[:, 8:] + 1) % V),))
    np.testing.assert_allclose(edited[:, :8], whole[:, :8], atol=1e-6)


@pytest.mark.slow
def test_a_language_model_generates():
    model = lc.Model(lm(), *weights_of(lm()))
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    made = generate(model, prompts, 4, temperature=0.0)
    alone = generate(model, prompts[1:], 4, temperature=0.0)
    np.testing.assert_array_equal(made[1], alone[0])
    (y,), _ = apply(lm(), *weights_of(lm()), (jnp.asarray(prompts[:1]),))
    assert made[0][0] == int(jnp.argmax(y[0, -1]))


@pytest.mark.parametrize(
    'net',
    [
        lm(3, 0.1, LSH),
        pytest.param(lm(2, 0.1, HASHED), marks=pytest.mark.slow),
        pytest.param(seq2seq(2, 0.1), marks=pytest.mark.slow),
        pytest.param(
            seq2seq(2, 0.1, HASHED.replace(causal=False, masked=True), HASHED.replace(masked=True)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=['language model', 'hashed', 'encoder and decoder', 'hashed encoder and decoder'],
)
def test_the_gradient_is_that_of_plain_autodiff(net):
    """TRAIN runs backwards, RECORD keeps everything."""
    inputs = values()[: net.n_in] if net.n_in > 1 else values()[:1]
    weights, state = weights_of(net)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(weights, mode):
        (y,), new = net.apply(weights, state, inputs, rng=jax.random.key(3), mode=mode)
        return (y * jnp.cos(y)).sum(), take_decisions(new)[1]

    (ours, kept), found = gradient(weights, Mode.TRAIN)
    (plain, decisions), expected = gradient(weights, Mode.RECORD)
    assert not kept and decisions
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    for path, want in trees.flatten(expected).items():
        got, scale = trees.get(found, path), float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * scale + 1e-6, err_msg=path)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        pytest.param({**DENSE, 'positions': 'learned'}, marks=pytest.mark.slow),
        pytest.param({'masked': False}, marks=pytest.mark.slow),
    ],
)
def test_a_decoder_decodes_what_it_evaluates_and_is_causal(changes):
    net = seq2seq(**changes)
    inputs = values()[: net.n_in]
    whole = logits(net, inputs)
    assert whole.shape == (B, L, W)
    made = decoded(net, inputs, ((0, 4), (4, 5), (5, 6), (6, L)))
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-5)
    source, said, *mask = inputs
    edited = logits(net, (source, said.at[:, 4:].set((said[:, 4:] + 1) % W), *mask))
    np.testing.assert_allclose(edited[:, :4], whole[:, :4], atol=1e-6)
    assert (jnp.abs(edited - whole)[:, 4:].max((0, 2)) > 1e-5).all()


@pytest.mark.slow
def test_padded_source_tokens_move_nothing_and_real_ones_do():
    net, (source, inputs, mask) = seq2seq(2), values()
    y = logits(net, (source, inputs, mask))
    padded = logits(net, (jnp.where(mask, source, (source + 1) % V), inputs, mask))
    np.testing.assert_allclose(padded, y, atol=1e-6)
    real = logits(net, (source.at[:, 8].set((source[:, 8] + 1) % V), inputs, mask))
    assert (jnp.abs(real - y).max((1, 2)) > 1e-5).all()


@pytest.mark.slow
def test_how_much_padding_a_source_has_changes_nothing():
    """But for the convolution of sparse projections, which sees what lies before the source."""
    net, (source, inputs, mask) = seq2seq(qkv_modules=None), values()
    padded = logits(net, (source[1:], inputs[1:], mask[1:]))
    bare = logits(net, (source[1:, :9], inputs[1:], mask[1:, :9]))
    np.testing.assert_allclose(padded, bare, atol=1e-5)


@pytest.mark.slow
def test_rows_go_back_to_where_their_inputs_end():
    net, (source, said, mask) = seq2seq(**{**DENSE, 'positions': 'learned'}), values()
    weights, _ = weights_of(net)
    state = init_state(net, (source, said, mask))
    _, state = apply(net, weights, state, (source, said[:, :4], mask), mode=Mode.PREDICT)
    state = tl.seek(state, jnp.array([4, 2]))
    new = jnp.stack([said[0, 4:5], said[1, 2:3]])
    (y,), _ = apply(net, weights, state, (source, new, mask), mode=Mode.PREDICT)
    whole = logits(net, (source, said, mask))
    np.testing.assert_allclose(y[:, 0], jnp.stack([whole[0, 4], whole[1, 2]]), atol=1e-5)


def test_the_source_is_read_once():
    net, (source, said, mask) = seq2seq(), values()
    weights, _ = weights_of(net)
    state = init_state(net, (source, said, mask))
    _, state = apply(net, weights, state, (source, said[:, :4], mask), mode=Mode.PREDICT)
    step = functools.partial(apply, net, weights, state, mode=Mode.PREDICT)
    (y,), _ = step((source, said[:, 4:5], mask))
    (other,), _ = step((source * 0, said[:, 4:5], mask))
    np.testing.assert_array_equal(other, y)


def test_models_are_cast():
    for net in (seq2seq(), lm()):
        narrow = lc.transforms.cast(net)
        assert narrow.n_in == net.n_in
        inputs = values()[: net.n_in] if net.n_in > 1 else values()[:1]
        (y,), _ = apply(narrow, *weights_of(net), inputs)
        error = jnp.abs(y.astype(jnp.float32) - logits(net, inputs))
        assert jnp.median(error) < 0.03  # at a few positions another unit is chosen
    refused = lc.transforms.cast(tl.sparse_qkv(tl.SelfAttention(H, causal=False), 4))
    assert refused.causal is False


@pytest.mark.parametrize('kind', [pytest.param(LSH, marks=pytest.mark.slow), HASHED])
def test_attention_may_be_hashed_on_both_sides(kind):
    net = seq2seq(1, 0.0, kind.replace(causal=False, masked=True), kind.replace(masked=True))
    cores = [x.core for _, x in lc.walk(net) if isinstance(x, tl.SparseQKVAttention)]
    assert [(type(core), core.causal) for core in cores] == [
        (type(kind.core), False),
        (type(kind.core), True),
    ]
    source, said, mask = values()
    whole = logits(net, values())
    assert whole.shape == (B, L, W)
    made = decoded(net, values(), ((0, L - 1), (L - 1, L)))
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-5)
    edited = logits(net, (source, said.at[:, 4:].set((said[:, 4:] + 1) % W), mask))
    np.testing.assert_allclose(edited[:, :4], whole[:, :4], atol=1e-6)
    padded = logits(net, (jnp.where(mask, source, (source + 1) % V), said, mask))
    np.testing.assert_allclose(padded, whole, atol=1e-6)
    # The encoder sees both ways: its last real position reaches the memory of the first.
    encoder = net.sublayers[net.keys.index('encoder')].layer
    memory = functools.partial(apply, encoder, weights_of(net)[0]['encoder'], {})
    other = source.at[:, 8].set((source[:, 8] + 1) % V)
    (a, *_), _ = memory((source, mask))
    (b, *_), _ = memory((other, mask))
    assert (jnp.abs(a - b)[:, :8].max((1, 2)) > 1e-6).all()


@pytest.mark.slow
def test_an_sru_takes_the_place_of_feed_forwards():
    net, (tokens, *_) = lm(d_sru=4), values()
    assert 'SRU()' in repr(net) and 'SparseFF' not in repr(net)
    whole = logits(net, (tokens,))
    made = decoded(net, (tokens,), ((0, 6), (6, 7), (7, M)))
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('masked', [False, True])
def test_source_and_target_are_limited_each_by_itself(masked):
    net = seq2seq(masked=masked, target_max_len=5)
    given = [lc.shape_dtype((1, n), 'int32') for n in (MAX, 5)]
    signature = (*given, lc.shape_dtype((1, MAX), bool))[: net.n_in]
    weights = jax.eval_shape(lambda: net.init(signature, jax.random.key(0)))[0]
    model = lc.Model(net, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), weights), {})
    start = prompts.begin(model, [[1, 2]], 3, [[3] * MAX])
    assert start.room == 5 and jax.eval_shape(ingesting.ingest, start)[0].shape == (1, W)
    with pytest.raises(lc.UsageError, match=r'2 tokens and 4 new ones make 6, and the .* is 5: '):
        prompts.begin(model, [[1, 2]], 4, [[3] * MAX])
    longer = (given[0], lc.shape_dtype((1, 6), 'int32'), *signature[2:])
    for mode in (Mode.TRAIN, Mode.PREDICT):
        with pytest.raises(ValueError, match='AfterMemory: the sequence is 6 long and max_len=5'):
            net.output_signature(longer, mode)
    with pytest.raises(ValueError, match='AfterMemory: the sequence is 6 long and max_len=5'):
        jax.eval_shape(lambda w, x: net.apply(w, {}, x), weights, longer)


def test_what_is_refused():
    with pytest.raises(ValueError, match='block_size=5 does not divide d_ff=16: use block_size=4'):
        lm(ff_block_size=5)
    with pytest.raises(ValueError, match='n_modules=3 does not divide the width 8: use n_modules='):
        weights_of(lm(qkv_modules=3))
    with pytest.raises(TypeError, match='qkv_modules=4: Dense has no projections that could be'):
        lm(attention=tl.Dense(D), positions='none')
    with pytest.raises(ValueError, match='Terraformer: decoder_attention: SelfAttention has 1 in'):
        seq2seq(1, 0.0, None, tl.SelfAttention(H))
    with pytest.raises(ValueError, match='causal=False sees the tokens that it should predict'):
        seq2seq(1, 0.0, None, tl.SelfAttention(H, causal=False, masked=True))
