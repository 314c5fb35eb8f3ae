"""The encoder-decoder Transformer, beside a slow reference in NumPy: what it computes and keeps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import losses, models, tl, trees
from layercomb.layers.core.layer import init_state
from layercomb.layers.core.mode import Mode
from layercomb.shapes import describe
from layercomb.supervised import Loop, TrainTask, decoding
from layercomb.transforms import Tied

B, M, L, V, W, D, F, H, MAX = 2, 9, 6, 11, 7, 8, 12, 2, 16


def build(n_encoder=2, n_decoder=2, **changes):
    settings = {'masked': True, 'target_vocab_size': W, 'activation': 'relu'}
    return models.Transformer(V, D, F, n_encoder, n_decoder, H, MAX, **{**settings, **changes})


def values(masked=True):
    """Source, inputs and mask: the second row's source is 5 long."""
    rng = np.random.default_rng(0)
    source, inputs = rng.integers(0, V, (B, M)), rng.integers(0, W, (B, L))
    mask = np.arange(M) < np.array([[M], [5]])
    return tuple(map(jnp.asarray, (source, inputs, mask)[: 2 + masked]))


@functools.lru_cache
def model_of(net):
    """The model with weights all of which matter, biases too."""
    model = lc.Model(net).init(values(net.n_in == 3))
    leaves, tree = jax.tree.flatten(model.weights)
    rng = np.random.default_rng(1)
    noisy = [w + jnp.asarray(0.3 * rng.standard_normal(w.shape), w.dtype) for w in leaves]
    return lc.Model(net, jax.tree.unflatten(tree, noisy))


@functools.partial(jax.jit, static_argnums=0, static_argnames='mode')
def apply(net, weights, state, inputs, mode=Mode.EVAL):
    return net.apply(weights, state, inputs, mode=mode)


def norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w['scale'] + w['bias']


def attention(x, memory, w, seen):
    """One row, one head and one position at a time; `seen` says which keys position t sees."""
    y = np.tile(w['output']['bias'], (len(x), 1))
    for h in range(H):
        q, k, v = (
            of @ w[part]['kernel'][:, h] + w[part]['bias'][h]
            for part, of in (('query', x), ('key', memory), ('value', memory))
        )
        for t in range(len(x)):
            s = np.where(seen(t), k @ q[t] / np.sqrt(D / H), -np.inf)
            p = np.exp(s - s.max())
            y[t] += p / p.sum() @ v @ w['output']['kernel'][h]
    return y


def feed(x, w):
    h = np.maximum(x @ w['dense']['kernel'] + w['dense']['bias'], 0)
    return h @ w['dense_1']['kernel'] + w['dense_1']['bias']


def blocks(stacked):
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)]


def slow(weights, source, inputs, mask):
    """Logits of one row, (L, W)."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    w = weights['encoder']
    x = w['embedding']['table'][source] + w['learned_positions']['table'][: len(source)]
    for b in blocks(w['block']):
        h = norm(x, b['residual']['layer_norm'])
        x = x + attention(h, h, b['residual']['self_attention'], lambda t: mask)
        x = x + feed(norm(x, b['residual_1']['layer_norm']), b['residual_1']['feed_forward'])
    memory = norm(x, w['norm'])
    w = weights['decoder']
    x = w['embedding']['table'][inputs] + w['learned_positions']['table'][: len(inputs)]
    for b in blocks(w['block']):
        h = norm(x, b['residual']['layer_norm'])
        x = x + attention(h, h, b['residual']['self_attention'], lambda t: np.arange(L) <= t)
        h = norm(x, b['residual_1']['layer_norm'])
        x = x + attention(h, memory, b['residual_1']['cross_attention'], lambda t: mask)
        x = x + feed(norm(x, b['residual_2']['layer_norm']), b['residual_2']['feed_forward'])
    return norm(x, w['norm']) @ weights['head']['kernel'] + weights['head']['bias']


def test_it_computes_what_a_slow_reference_computes():
    source, inputs, mask = values()
    model = model_of(build())
    expected = [
        slow(model.weights, *map(np.asarray, row)) for row in zip(source, inputs, mask, strict=True)
    ]
    np.testing.assert_allclose(model(source, inputs, mask), expected, atol=1e-4)
    open_eyed = lc.Model(build(masked=False), model.weights)
    every = jnp.ones_like(mask)
    np.testing.assert_allclose(open_eyed(source, inputs), model(source, inputs, every), atol=1e-5)


def test_a_model_built_twice_is_one_model():
    assert build() == build() and hash(build()) == hash(build())
    assert eval(repr(build(dropout=0.1)), vars(tl)) == build(dropout=0.1)


@pytest.mark.parametrize('positions', ['learned', 'rotary', 'sinusoidal', 'none'])
@pytest.mark.parametrize('masked', [True, False])
def test_shapes(positions, masked):
    net = build(positions=positions, masked=masked)
    assert net.n_in == 2 + masked
    assert (
        describe(net.output_signature(lc.signature_of(values(masked)))) == f'float32[{B},{L},{W}]'
    )
    same = build(target_vocab_size=None, positions=positions, masked=masked)
    assert same.output_signature(lc.signature_of(values(masked)))[0].shape == (B, L, V)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'positions': 'rotary', 'masked': False},
        {'decoder_attention': (tl.LocalSelfAttention(H, 2), tl.SelfAttention(H))},
    ],
    ids=['default', 'rotary', 'mixed'],
)
def test_decoding_gives_what_evaluation_gives(changes):
    net = build(**changes)
    source, said, *mask = values(net.n_in == 3)
    model = model_of(net)
    net, weights = lc.unstack(net, model.weights)
    made, state = [], init_state(net, lc.signature_of((source, said, *mask)))
    for span in (slice(0, 4), slice(4, 5), slice(5, 6)):
        step = (source, said[:, span], *mask)
        (y,), state = apply(net, weights, state, step, mode=Mode.PREDICT)
        made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), model(source, said, *mask), atol=1e-5)


def test_generate_is_greedy_evaluation_and_shared_embeddings_decode():
    """The encoder's attention is equal to that of the memory, as a description."""
    net = build(target_vocab_size=None)
    tied = Tied(net, 'encoder/embedding/table', 'decoder/embedding/table')
    model = model_of(tied)
    assert 'embedding' not in model.weights['decoder']
    source, _, mask = values()
    tokens = np.zeros((B, 1), np.int32)
    for _ in range(L):
        logits = model(source, jnp.asarray(tokens), mask)[:, -1]
        tokens = np.concatenate([tokens, np.asarray(logits.argmax(-1))[:, None]], 1)
    ragged = [np.asarray(row[keep]) for row, keep in zip(source, mask, strict=True)]
    made = decoding.generate(model, [[0], [0]], L, inputs=ragged, temperature=0)
    np.testing.assert_array_equal(made, tokens[:, 1:])


def test_a_loss_is_attached_and_trained():
    net, (source, inputs, mask) = build(1, 1), values()
    assert losses.attach(net, tl.CrossEntropyLoss(), chunk_len=4).n_in == 5
    batch = (source, inputs, mask, jnp.roll(inputs, -1, 1), jnp.ones((B, L)))
    model = lc.Model(net).init((source, inputs, mask))
    task = TrainTask(
        [tuple(map(np.asarray, batch))] * 30,
        tl.CrossEntropyLoss(),
        optax.adam(3e-2),
        loss_chunk_len=4,
    )
    loop = Loop(model, task, progress=False)
    first = loop.run(1)['train/loss']
    assert loop.run(29)['train/loss'] < 0.6 * first


def test_dropout_is_drawn_in_training_alone():
    net, inputs = build(1, 1, dropout=0.5), values()
    model = model_of(net)
    plain = lc.Model(build(1, 1), model.weights)
    np.testing.assert_array_equal(model(*inputs), plain(*inputs))
    trained = model(*inputs, mode=Mode.TRAIN, rng=0)
    assert jnp.abs(trained - plain(*inputs)).max() > 0.1


def test_paths():
    weights = jax.eval_shape(lambda: build().init(lc.signature_of(values()), jax.random.key(0))[0])
    shapes = {path: x.shape for path, x in trees.flatten(weights).items()}
    assert list(weights) == ['decoder', 'encoder', 'head']
    assert shapes['decoder/block/residual_1/cross_attention/key/kernel'] == (2, D, H, D // H)
    assert shapes['encoder/block/residual/self_attention/query/kernel'] == (2, D, H, D // H)
    assert shapes['encoder/embedding/table'] == (V, D)
    assert shapes['decoder/embedding/table'] == (W, D) and shapes['head/kernel'] == (D, W)


def test_what_is_refused():
    local = tl.LocalSelfAttention(H, 4, causal=False)
    with pytest.raises(ValueError, match=r'encoder_attention: .* make it with masked=True'):
        build(encoder_attention=local)
    with pytest.raises(ValueError, match=r'decoder_attention: .* make it with masked=False'):
        build(decoder_attention=tl.SelfAttention(H, masked=True))
    with pytest.raises(ValueError, match=r'cross_attention: .* make it with masked=True'):
        build(cross_attention=tl.CrossAttention(H))
    with pytest.raises(ValueError, match='causal=False sees the tokens that it should predict'):
        build(decoder_attention=local)
    with pytest.raises(ValueError, match=r'n_layers=3 is no multiple of the 2 attention .*: use 4'):
        build(3, encoder_attention=[local.replace(masked=True)] * 2)
    with pytest.raises(ValueError, match='attention is empty: give a layer, or several'):
        build(encoder_attention=[])
    with pytest.raises(TypeError, match='takes 3 values off the stack, only 2 were there'):
        build().output_signature(lc.signature_of(values(False)))
