"""A loss attached to a model: the same paths and values, and no logits of a whole sequence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import losses, models, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.shapes import describe, shape_dtype

B, L, V = 2, 7, 11
SIGNATURE = (shape_dtype((B, L), 'int32'), shape_dtype((B, L), 'int32'), shape_dtype((B, L)))


def batch():
    made = np.random.default_rng(0)
    x, y = (jnp.asarray(made.integers(0, V, (B, L)), jnp.int32) for _ in range(2))
    return x, y, jnp.asarray(made.random((B, L)) < 0.7, jnp.float32)


def lm():
    return tl.Serial(
        tl.Embedding(V, 8), tl.Residual(tl.Dense(8)), tl.LayerNorm(), tl.Dense(V), name='lm'
    )


def paths(layer, signature=SIGNATURE):
    init = functools.partial(layer.init, signature)
    weights, state = jax.eval_shape(init, jax.random.key(0))
    assert state == {}
    return {path: x.shape for path, x in trees.flatten(weights).items()}


def init(layer, signature=SIGNATURE):
    return jax.jit(functools.partial(layer.init, signature))(jax.random.key(0))[0]


@functools.partial(jax.jit, static_argnums=0)
def step(layer, weights, inputs):
    def loss(weights):
        values, counts = layer.apply(weights, {}, inputs)[0][:2]
        return tl.weighted_mean(values, counts), (values, counts)

    return jax.value_and_grad(loss, has_aux=True)(weights)


def assert_close(got, wanted, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_attached_equals_unattached_whole_or_in_chunks():
    net, (x, y, w) = lm(), batch()
    weights = init(net, SIGNATURE[:1])
    whole = losses.attach(net, tl.CrossEntropyLoss())
    assert_close(init(whole), weights, 0)
    wanted = step(whole, weights, (x, y, w))
    logits = net.apply(weights, {}, (x,))[0][0]
    values, counts = tl.CrossEntropyLoss().apply({}, {}, (logits, y, w))[0]
    assert_close(wanted[0][1], (values, counts))
    chunked = losses.attach(net, tl.CrossEntropyLoss(), 3)
    assert_close(step(chunked, weights, (x, y, w)), wanted)


@pytest.mark.parametrize('chunk_len', [None, 4])
@pytest.mark.parametrize(
    'net',
    [
        lm(),
        tl.Serial(
            tl.Embedding(V, 8), tl.Dense(8), tl.Dense(8), tl.Serial(tl.LayerNorm(), tl.Dense(V))
        ),
        models.TransformerLM(V, 8, 8, 2, 2, 8, dropout=0.1),
        transforms.cast(models.TransformerLM(V, 8, 8, 2, 2, 8)),
        tl.Embedding(V, V),
    ],
    ids=['named', 'nested', 'transformer', 'cast', 'one layer'],
)
def test_attaching_keeps_every_path(net, chunk_len):
    layer = losses.attach(net, tl.CrossEntropyLoss(), chunk_len)
    assert (layer.n_in, layer.n_out, layer.name) == (3, 2, net.name)
    assert paths(layer) == paths(net, SIGNATURE[:1])
    assert describe(layer.output_signature(SIGNATURE)) == 'float32[2,7], float32[2,7]'
    assert losses.attach(net, tl.CrossEntropyLoss(), chunk_len) == layer


def test_attaching_to_a_model_whose_weights_are_tied():
    net = transforms.Tied(
        tl.Serial(tl.Embedding(V, 8), tl.Dense(V, name='head')),
        'embedding/table',
        'head/kernel',
        jnp.transpose,
    )
    layer = losses.attach(net, tl.CrossEntropyLoss(), 4)
    assert paths(layer) == paths(net, SIGNATURE[:1])
    weights, (x, y, w) = init(layer), batch()
    values, _ = layer.apply(weights, {}, (x, y, w))[0]
    logits = net.apply(weights, {}, (x,))[0][0]
    assert_close(values, tl.cross_entropy(logits, y))


def test_several_metrics_give_two_outputs_each():
    net, inputs = lm(), batch()
    metrics = (tl.CrossEntropyLoss(label_smoothing=0.1), tl.Accuracy())
    layer = losses.attach(net, metrics, 4)
    assert losses.attach(net, list(metrics), 4) == layer and layer.n_out == 4
    weights = init(net, SIGNATURE[:1])
    got = layer.apply(weights, {}, inputs)[0]
    for i, metric in enumerate(metrics):
        one = losses.attach(net, metric).apply(weights, {}, inputs)[0]
        assert_close(got[2 * i : 2 * i + 2], one)


def test_a_head_of_several_layers_is_chunked_whole():
    head = tl.Serial(tl.Concatenate(), tl.LayerNorm(), tl.Dense(V), name='head')
    layer = losses.attach(tl.Serial(tl.Embedding(V, 8), tl.Dup(), head), tl.CrossEntropyLoss(), 4)
    assert isinstance(layer.layers[-1], tl.Chunk) and layer.layers[-1].layer.layer == head
    for first in (tl.SelfAttention(2), tl.Fn('Shift', lambda x: jnp.roll(x, 1, 1))):
        check_only_the_last_is_chunked(tl.Serial(first, tl.Dense(V)))


def check_only_the_last_is_chunked(body):
    layer = losses.attach(tl.Serial(tl.Embedding(V, 8), body), tl.CrossEntropyLoss(), 4)
    assert isinstance(layer.layers[-1], tl.Serial)
    assert isinstance(layer.layers[-1].layers[-1], tl.Chunk)


def test_logits_of_a_whole_sequence_never_exist(optimized):
    vocabulary, length = 4096, 256
    net = tl.Serial(tl.Embedding(vocabulary, 4), tl.Dense(vocabulary))
    ids, floats = shape_dtype((1, length), 'int32'), shape_dtype((1, length))

    def temporaries(chunk_len):
        layer = losses.attach(net, tl.CrossEntropyLoss(), chunk_len)
        weights = jax.eval_shape(lambda: init(layer, (ids, ids, floats)))
        compiled = step.lower(layer, weights, (ids, ids, floats)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * length * vocabulary
    assert temporaries(None) >= logits
    assert temporaries(16) < logits / 2


def test_dropout_before_the_head_draws_as_without_a_loss():
    net = tl.Serial(tl.Embedding(V, 8), tl.Dropout(0.5), tl.Dense(V))
    weights, (x, y, w) = init(net, SIGNATURE[:1]), batch()
    layer = losses.attach(net, tl.CrossEntropyLoss())
    values, _ = layer.apply(weights, {}, (x, y, w), rng=jax.random.key(3), mode=Mode.TRAIN)[0]
    logits = net.apply(weights, {}, (x,), rng=jax.random.key(3), mode=Mode.TRAIN)[0][0]
    assert_close(values, tl.cross_entropy(logits, y))


def test_what_is_no_loss_or_no_model_of_logits():
    with pytest.raises(
        TypeError, match=r'a loss is a metric such as tl.CrossEntropyLoss\(\), got Re'
    ):
        losses.attach(lm(), tl.Relu())
    with pytest.raises(TypeError, match=r'got <class .*CrossEntropyLoss'):
        losses.attach(lm(), tl.CrossEntropyLoss)
    with pytest.raises(TypeError, match='must give logits alone, it has 2 outputs'):
        losses.attach(tl.Dup(), tl.CrossEntropyLoss())
    beneath = tl.Serial(tl.Dup(), tl.Dense(4), tl.Swap(), tl.Drop())
    with pytest.raises(ValueError, match=r'last layer, Drop, puts back 0 values .* before the lay'):
        losses.attach(beneath, tl.CrossEntropyLoss())
    with pytest.raises(TypeError, match='at least one metric'):
        losses.attach(lm(), ())
