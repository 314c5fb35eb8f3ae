"""What layers inside a model put out, against a model that is computed layer by layer by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl, transforms
from layercomb.layers.core.mode import Mode

X = jax.random.normal(jax.random.key(5), (2, 6, 4))


def init(net, *inputs, mode=Mode.TRAIN):
    return net.init(lc.signature_of(inputs or X), jax.random.key(0), mode)


def run(net, pattern, *inputs, mode=Mode.EVAL, rng=None):
    weights, state = init(net, *(inputs or (X,)), mode=mode)
    inputs = inputs or (X,)
    outputs, found = jax.jit(lambda w, s, x: lc.capture(net, w, s, x, pattern, rng=rng, mode=mode))(
        weights, state, inputs
    )
    wanted, _ = net.apply(weights, state, inputs, rng=rng, mode=mode)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), outputs, wanted)
    return weights, outputs, found


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def dense(weights, x):
    return x @ weights['kernel'] + weights['bias']


def test_outputs_of_layers_in_series():
    net = tl.Serial(tl.Dense(5), tl.Relu(), tl.Residual(tl.Dense(5)), tl.Dense(3, name='head'))
    weights, (y,), found = run(net, '*')
    hidden = dense(weights['dense'], X)
    inner = dense(weights['residual']['dense'], jnp.maximum(hidden, 0))
    close(found['dense'], hidden)
    close(found['residual/dense'], inner)
    close(found['residual'], jnp.maximum(hidden, 0) + inner)
    close(found['head'], y)
    close(found[''], y)
    inside = {'residual', 'residual/dense', 'residual/add'}
    assert found.keys() == {'', 'dense', 'relu', 'head', *inside}
    assert set(run(net, 'residual/*')[2]) == {'residual/dense', 'residual/add'}
    assert list(run(net, 'head')[2]) == ['head']


@pytest.mark.parametrize('around', [lambda x: x, tl.Remat], ids=['plain', 'remat'])
@pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
def test_blocks_are_stacked(around, mode):
    net = tl.Repeat(around(tl.Serial(tl.Dense(4), tl.Tanh(), name='block')), 3)
    weights, (y,), found = run(tl.Serial(net), '*', mode=mode)
    x, hidden, ends = X, [], []
    for i in range(3):
        hidden.append(dense(jax.tree.map(lambda w, i=i: w[i], weights['block']['dense']), x))
        x = jnp.tanh(hidden[-1])
        ends.append(x)
    close(found['block/dense'], jnp.stack(hidden))
    close(found['block'], jnp.stack(ends))
    close(found['block'][-1], y)


@pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
@pytest.mark.parametrize('n', [2, 11])
def test_loops_in_loops_have_their_axes_in_order(mode, n):
    inner = tl.Map(tl.Repeat(tl.Dense(4), 3), 2)
    net = tl.Serial(tl.Repeat(tl.Serial(inner, name='outer'), n), name='net')
    pair = (X, X + 1)
    weights, _, found = run(net, '*dense', *pair, mode=mode)
    (kept,) = found.values()
    assert kept.shape == (n, 2, 3, *X.shape)
    values = list(pair)
    for i in range(n):
        for j in range(2):
            for k in range(3):
                kernel = weights['outer']['dense']['kernel'][i, k]
                values[j] = values[j] @ kernel + weights['outer']['dense']['bias'][i, k]
                close(kept[i, j, k], values[j])


def test_map_gives_each_group_and_several_outputs_are_a_tuple():
    net = tl.Serial(tl.Map(tl.Serial(tl.Dup(), tl.Tanh(), name='pair'), 2))
    _, _, found = run(net, 'pair', X, X + 1)
    both = jnp.stack([X, X + 1])
    close(found['pair'][0], jnp.tanh(both))
    close(found['pair'][1], both)


def test_pieces_come_as_a_whole():
    net = tl.Serial(tl.Chunk(tl.Serial(tl.Dense(5), tl.Tanh(), name='feed'), 4))
    weights, _, found = run(net, 'feed/*')
    close(found['feed/dense'], dense(weights['feed']['dense'], X))
    close(found['feed/tanh'], jnp.tanh(found['feed/dense']))
    assert list(run(tl.Serial(tl.Chunk(tl.Dense(5, name='wide'), 4)), 'wide')[2]) == ['wide']


def test_casts_ties_and_quantized_leaves_are_layers_as_others():
    net = transforms.cast(tl.Serial(tl.Dense(4, name='a'), tl.Dense(4, name='b')))
    weights, _, found = run(transforms.Tied(net, 'a', 'b'), '[ab]')
    assert list(weights) == ['a'] and all(x.dtype == jnp.bfloat16 for x in found.values())
    net = tl.Serial(tl.Dense(64, name='a'))
    x = jnp.ones((2, 64))
    weights, _ = init(net, x)
    narrow, weights = transforms.quantize(net, weights, smallest=1)
    (y,), found = lc.capture(narrow, weights, {}, (x,), 'a')
    close(found['a'], y)


def stack(repeat, serial):
    half = tl.ReversibleHalfResidual(tl.LayerNorm(), tl.SelfAttention(2), tl.Dropout(0.1))
    feed = tl.ReversibleHalfResidual(tl.Serial(tl.Dense(4), tl.Tanh(), name='feed'))
    swap = tl.ReversibleSwap()
    block = serial(half, swap, feed, swap, name='block')
    return tl.Serial(tl.Dup(), repeat(block, 2), tl.Add(), tl.Dense(3, name='head'))


@pytest.mark.parametrize('pattern', ['*', 'block', 'block/*/feed', '*core', '*residual'])
def test_reversible_stacks_keep_and_their_gradients_are_those_of_plain_ones(pattern):
    made = []
    rng = jax.random.key(3)
    kinds = (tl.ReversibleRepeat, tl.ReversibleSerial), (tl.Repeat, tl.Serial)
    for net in (stack(*kind) for kind in kinds):
        weights, state = init(net)

        def loss(weights, x, net=net, state=state):
            (y,), found = lc.capture(net, weights, state, (x,), pattern, rng=rng, mode=Mode.TRAIN)
            total = jnp.sin(y).sum()
            for path, kept in sorted(found.items()):
                total += sum(jnp.cos(k * len(path)).sum() for k in jax.tree.leaves(kept))
            return total

        made.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, X))
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_gradients_of_what_is_kept_are_those_of_hand():
    net = tl.Serial(tl.Repeat(tl.Serial(tl.Dense(4), tl.Tanh(), name='block'), 2))
    weights, state = init(net)

    def kept(weights):
        return (lc.capture(net, weights, state, (X,), 'block/dense')[1]['block/dense'] ** 2).sum()

    def by_hand(weights):
        x, total = X, 0.0
        for i in range(2):
            y = dense(jax.tree.map(lambda w, i=i: w[i], weights['block']['dense']), x)
            x, total = jnp.tanh(y), total + (y**2).sum()
        return total

    jax.tree.map(close, jax.grad(kept)(weights), jax.grad(by_hand)(weights))


@pytest.mark.parametrize('name', [pytest.param('Reformer', marks=pytest.mark.slow), 'Terraformer'])
@pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
def test_encoders_and_decoders(name, mode):
    sizes = {'max_len': 8, 'ff_chunk_len': 2}
    more = {'ff_block_size': 4, 'qkv_modules': 2} if name == 'Terraformer' else {}
    net = getattr(models, name)(11, 8, 8, 2, 2, 2, **sizes, **more)
    source, said = jnp.ones((2, 5), jnp.int32), jnp.full((2, 3), 2, jnp.int32)
    _, (logits,), found = run(net, '*', source, said, mode=mode)
    _, _, wanted = run(net, '*', source, said)
    close(found['head'], logits)
    assert found['encoder/block'][0].shape == (2, 2, 5, 8)
    assert found.keys() == wanted.keys()
    assert found['decoder/block'][0].shape[2] in (3, 8)
    if name == 'Reformer':
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_what_matches_nothing_is_refused_with_the_nearest_paths():
    net = tl.Serial(tl.Repeat(tl.Serial(tl.Dense(4), tl.Relu(), name='block'), 2))
    with pytest.raises(
        ValueError, match=r"no layer at 'blok/dense'; the nearest are 'block/dense'"
    ):
        run(net, 'blok/dense')
    with pytest.raises(ValueError, match=r"no layer at 'dense'.*such as '\*dense'"):
        run(net, 'dense')


class Dropping(tl.Wrapper):
    """A layer of somebody's own that hands on no state."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)[0], state


class Holding(lc.Layer):
    """A layer of somebody's own that says where its layers' weights are."""

    inner: lc.Layer

    @property
    def children(self):
        return (('inside', self.inner),)

    def with_sublayers(self, sublayers):
        return self.replace(inner=sublayers[0])

    def init(self, signature, rng, mode=Mode.TRAIN):
        weights, state = self.inner.init(signature, rng, mode)
        return {'inside': weights}, {'inside': state}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        outputs, new = self.inner.apply(
            weights['inside'], state['inside'], inputs, rng=rng, mode=mode
        )
        return outputs, {'inside': new}


def test_classes_of_ones_own():
    assert run(Dropping(tl.Serial(tl.Dense(3))), '')[2][''].shape == (2, 6, 3)
    with pytest.raises(
        ValueError, match="'dense' leaves does not come out: a class around it must"
    ):
        run(tl.Serial(Dropping(tl.Serial(tl.Dense(3), name='in'))).layers[0], 'dense')
    _, (y,), found = run(tl.Serial(Holding(tl.Serial(tl.Dense(3)))), 'holding/inside/dense')
    close(found['holding/inside/dense'], y)
