"""GPT-2: its structure, and that decoding and training work on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import Model, losses, models, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.testing import check_layer

SMALL = {'vocab_size': 40, 'd_model': 16, 'n_layers': 2, 'n_heads': 2, 'max_len': 12}
IDS = np.arange(18, dtype=np.int32).reshape(2, 9)


def small(**more):
    return models.GPT2(**{**SMALL, **more})


def test_it_keeps_what_every_layer_promises():
    check_layer(small(), jax.ShapeDtypeStruct((2, 8), jnp.int32))


def test_against_an_obvious_reference():
    """The formula of the paper, in NumPy, one head at a time."""
    model = Model(small(d_ff=24)).init(IDS)
    w = jax.tree.map(np.asarray, model.weights)

    def norm(x, p):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = w['embedding']['table'][IDS] + w['positions']['table'][: IDS.shape[1]]
    for i in range(2):
        p = jax.tree.map(lambda y, i=i: y[i], w['block'])
        a, h = p['attention']['self_attention'], norm(x, p['attention']['norm'])
        for head in range(2):
            q, k, v = (
                h @ a[part]['kernel'][:, head] + a[part]['bias'][head]
                for part in ('query', 'key', 'value')
            )
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(8)
            scores = np.exp(np.where(np.tri(IDS.shape[1], dtype=bool), scores, -1e9))
            x = x + scores / scores.sum(-1, keepdims=True) @ v @ a['output']['kernel'][head]
        x = x + a['output']['bias']
        f = p['feed_forward']
        h = gelu(norm(x, f['norm']) @ f['dense']['kernel'] + f['dense']['bias'])
        x = x + h @ f['dense_1']['kernel'] + f['dense_1']['bias']
    logits = norm(x, w['norm']) @ w['embedding']['table'].T
    np.testing.assert_allclose(model(IDS), logits, atol=1e-5)


def test_decoding_gives_what_evaluation_gives():
    net = small()
    weights, _ = net.init((jax.ShapeDtypeStruct((2, 9), jnp.int32),), jax.random.key(0))
    whole = Model(net, weights)(IDS)
    state = net.init((jax.ShapeDtypeStruct((2, 9), jnp.int32),), jax.random.key(0), Mode.PREDICT)[1]
    made = []
    for t in range(9):
        (y,), state = net.apply(weights, state, (IDS[:, t : t + 1],), mode=Mode.PREDICT)
        made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), whole, atol=1e-5)


def test_options():
    assert small() == small() and small() != small(dropout=0.1)
    assert isinstance(small(), transforms.Tied) and isinstance(small(tied=False), tl.Serial)
    weights, _ = small().init((jax.ShapeDtypeStruct((2, 9), jnp.int32),), jax.random.key(0))
    assert 'head' not in weights
    assert trees.get(weights, 'block/feed_forward/dense/kernel').shape == (2, 16, 64)
    plain, again = Model(small()).init(IDS), Model(small(remat=True)).init(IDS)
    np.testing.assert_allclose(plain(IDS), again(IDS), atol=1e-6)
    with pytest.raises(ValueError, match='n_layers'):
        small(n_layers=0)


def test_it_learns():
    net = losses.attach(small(dropout=0.1), tl.CrossEntropyLoss())
    inputs = (IDS, IDS, np.ones(IDS.shape, np.float32))
    weights, state = net.init(tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs),
                              jax.random.key(0))  # fmt: skip

    def loss(weights):
        (y, _), _ = net.apply(weights, state, inputs, rng=jax.random.key(1), mode=Mode.TRAIN)
        return y.sum()

    before, slopes = jax.value_and_grad(loss)(weights)
    assert loss(jax.tree.map(lambda w, s: w - 1e-3 * s, weights, slopes)) < before
