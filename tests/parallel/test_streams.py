"""Training whose residual streams live in host memory: losses and gradients are the plain ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import losses, tl, transforms, trees
from layercomb.parallel.streams import streamed
from layercomb.parallel.streams.reaching import reach

V, D, B = 16, 8, 2
EMBEDDING = tl.Embedding(V, D, table_init=tl.Normal(1.0))


def model(*attentions, positions=tl.AxialPositions((4, 8)), ff=None, drop=None):
    """A Reformer of one block for each attention, repeated twice."""
    norm = tl.LayerNorm()
    ff = ff or tl.Chunk(tl.Serial(norm, tl.Dense(12), tl.Gelu(), tl.Dense(D), drop), 4)
    halves = [half for attention in attentions for half in ([tl.Chunk(norm, 4), attention], [ff])]
    layers = [x for half in halves for x in (tl.ReversibleHalfResidual(*half), tl.ReversibleSwap())]
    return tl.Serial(
        EMBEDDING,
        positions,
        tl.Dup(),
        tl.ReversibleRepeat(tl.ReversibleSerial(*layers, name='block'), 2, name='blocks'),
        tl.Serial(tl.Concatenate(), norm, tl.Dense(V), name='head'),
    )


def batch(length):
    x = np.random.default_rng(0).integers(0, V, (B, length + 1)).astype(np.int32)
    return x[:, :-1], x[:, 1:], np.ones((B, length), np.float32)


@functools.cache
def compiled(net):
    def mean(weights, given):
        key = jax.random.key(3)
        (values, counts), _ = net.apply(weights, {}, given, rng=key, mode=tl.Mode.TRAIN)
        return tl.weighted_mean(values, counts)

    return jax.jit(jax.value_and_grad(mean))


def gradient(net, weights, given):
    """The loss of a batch and its gradient."""
    return compiled(net)(weights, given)


def same(net, length=12, piece_len=6, chunk_len=4, tolerance=1e-6):
    """Loss and gradients in pieces are those without, relative to the largest."""
    plain = losses.attach(net, tl.CrossEntropyLoss(), chunk_len)
    given = batch(length)
    weights, state = plain.init(given, jax.random.key(0))
    assert state == {}
    made = streamed(plain, piece_len)
    (loss, grads), (found, ours) = (gradient(n, weights, given) for n in (plain, made))
    np.testing.assert_allclose(found, loss, rtol=tolerance)
    assert jax.tree.structure(ours) == jax.tree.structure(grads)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for path, x in trees.flatten(grads).items():
        ct = trees.get(ours, path)
        assert ct.dtype == x.dtype
        np.testing.assert_allclose(ct, x, atol=tolerance * largest, err_msg=path)


LOCAL, LSH = (
    tl.LocalSelfAttention(2, 2),
    tl.LSHSelfAttention(2, n_hashes=2, chunk_len=4, max_len=32),
)
NETS = {
    'local': model(LOCAL),
    'lsh': model(LSH),
    'all positions, turned': model(
        tl.SelfAttention(2, n_kv_heads=1, rotary=tl.RotaryPositions(), query_norm=tl.RMSNorm()),
        positions=None,
    ),
    'a window, learned positions, dropout in slices': model(
        tl.SelfAttention(2, window=3, rotary=tl.RotaryPositions()),
        positions=tl.LearnedPositions(32),
        drop=tl.Dropout(0.3),
    ),
    'both ways, sparse': model(
        tl.LocalSelfAttention(2, 2, causal=False, look_ahead=1),
        ff=tl.Chunk(tl.SparseFF(8, 4), 4),
    ),
}


@pytest.mark.parametrize('name', NETS)
def test_losses_and_gradients_are_the_plain_ones(name):
    same(NETS[name])


def test_a_model_cast_to_bfloat16():
    same(transforms.cast(NETS['all positions, turned']), tolerance=3e-2)


@pytest.mark.parametrize('name', ['local', 'lsh'])
def test_the_last_piece_may_be_shorter(name):
    same(NETS[name], 23)


def test_less_than_a_piece_and_a_tied_head_behind_the_sum_of_the_streams():
    *front, _ = NETS['local'].layers
    net = tl.Serial(*front, tl.Add(), tl.Dense(V, name='head'))
    same(transforms.Tied(net, 'embedding/table', 'head/kernel', jnp.transpose), 3)


def test_dropout_behind_attention_is_the_same_for_all_heads_and_passes():
    half = tl.ReversibleHalfResidual(tl.SelfAttention(2), tl.Dropout(0.5))
    net = tl.Serial(
        EMBEDDING, tl.Dup(), tl.ReversibleSerial(half, tl.ReversibleSwap()), tl.Add(), tl.Dense(V)
    )
    plain = losses.attach(net, tl.CrossEntropyLoss(), 4)
    given = batch(7)
    weights, _ = plain.init(given, jax.random.key(0))
    net = streamed(plain, 3)
    found = inner(gradient(net, weights, given)[1], weights)
    np.testing.assert_allclose(found, finite_difference(net, weights, given), rtol=1e-2)


def inner(a, b):
    return sum(float((x * y).sum()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def finite_difference(net, weights, given, step=1e-2):
    """The slope of the loss along the weights."""
    ends = (jax.tree.map(lambda x, s=s: x * (1 + s * step), weights) for s in (1, -1))
    high, low = (gradient(net, each, given)[0] for each in ends)
    return float(high - low) / (2 * step)


def test_only_the_piece_at_hand_is_on_the_device():
    """Of a model of local attention, nothing as long as the sequence but ids and losses."""
    net = losses.attach(NETS['local'], tl.CrossEntropyLoss(), 4)
    given = batch(24)
    weights, _ = net.init(given, jax.random.key(0))

    def longest(net):
        made = jax.make_jaxpr(lambda weights: gradient(net, weights, given))(weights)
        return max(x.size for x in arrays(made.jaxpr) if x.shape[:1] != (V,))

    assert longest(net) >= 24 * B * D
    assert longest(streamed(net, 6)) < 24 * B * D


def arrays(jaxpr):
    """The types of all values on the device, those inside of loops included."""
    for eqn in jaxpr.eqns:
        for v in eqn.outvars:
            if v.aval.memory_space != jax.memory.Space.Host and hasattr(v.aval, 'shape'):
                yield v.aval
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from arrays(getattr(value, 'jaxpr', value))


def is_program(x):
    return hasattr(getattr(x, 'jaxpr', x), 'eqns')


def half(*layers, behind=tl.ReversibleSwap()):
    """A model of one half residual."""
    stack = tl.ReversibleSerial(tl.ReversibleHalfResidual(*layers), behind)
    return tl.Serial(EMBEDDING, tl.Dup(), stack, tl.Add(), tl.Dense(V))


REFUSED = {
    'it takes one reversible stack in series with the rest, and there are 0': tl.Serial(
        EMBEDDING, tl.Dense(V)
    ),
    'FourierMixing needs all positions at once, and is no attention by heads': half(
        tl.FourierMixing()
    ),
    'Dense behind SelfAttention needs the sum of heads': half(tl.SelfAttention(2), tl.Dense()),
    'Conv1D before SelfAttention needs all positions': half(tl.Conv1D(D, 3), tl.SelfAttention(2)),
    'ReversibleConcatenatePair has no rule that computes it in pieces': half(
        tl.Dense(), behind=tl.ReversibleConcatenatePair()
    ),
}


@pytest.mark.parametrize('why', REFUSED)
def test_what_is_refused(why):
    net = losses.attach(REFUSED[why], tl.CrossEntropyLoss(), 4)
    with pytest.raises(ValueError, match=rf"offload='streams': {why}: leave offload out"):
        streamed(net)


def test_reach_of_layers_in_series():
    local = tl.LocalSelfAttention(2, 4, causal=False, look_ahead=1)
    found = reach(tl.Serial(tl.LayerNorm(), local, tl.Residual(tl.SelfAttention(2, window=3))))
    assert found == (6, 4, 4)
    assert reach(tl.Remat(tl.Repeat(LOCAL, 2))) is None
    scaled = tl.RotaryPositions(scaling=tl.DynamicScaling(2.0, 8))
    assert reach(LOCAL.replace(rotary=scaled)) is None
