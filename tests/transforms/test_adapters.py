"""Several adapters on one base: each row beside the model with its adapter merged."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, transforms, trees
from layercomb.transforms.low_rank.many import Adapter, put_adapters

NET = tl.Serial(
    tl.Repeat(tl.Residual(tl.SelfAttention(2, causal=True)), 2, name='mixing'),
    tl.Residual(tl.GatedDense(6, use_bias=True), tl.Dense(8)),
    tl.Dense(5, name='head'),
)
MODEL = lc.Model(NET).init(lc.shape_dtype((2, 3, 8)))


def adapted(seed, **options):
    """The model with a random adapter."""
    net, weights = transforms.lora(NET, MODEL.weights, **options)
    flat = trees.flatten(weights)
    for i, (path, x) in enumerate(sorted(flat.items())):
        if transforms.is_lora(path):
            drawn = np.random.default_rng((seed, i)).normal(size=x.shape) / 4
            flat[path] = jnp.asarray(drawn.astype(np.float32))
    return net, trees.unflatten(flat)


ONE = adapted(1, rank=2, alpha=3.0, where='**')
TWO = adapted(2, rank=3, alpha=2.0, rank_stabilized=True, where='*mixing*')
NAMED = {'one': ONE, 'two': TWO}


@functools.partial(jax.jit, static_argnames=('net', 'mode'))
def apply(net, weights, x, state=None, mode=tl.Mode.EVAL):
    return net.apply(weights, state or {}, (x,), mode=mode)[0][0]


def decoded(net, weights, x, rows):
    state = put_adapters(lc.init_state(net, lc.shape_dtype(x.shape)), jnp.asarray(rows, jnp.int32))
    return apply(net, weights, x, state, mode=tl.Mode.PREDICT)


@pytest.mark.parametrize('kind', ['wide', 'narrow', 'unstacked', 'cast'])
def test_each_row_has_its_own(kind):
    base, near = (NET, MODEL.weights), 3e-5
    if kind == 'narrow':
        base, near = transforms.quantize(*base, smallest=16), 1e-3
    if kind == 'cast':
        base, near = (transforms.cast(NET), MODEL.weights), 0.1
    net, weights = transforms.adapters(*base, NAMED)
    dtypes = {x.dtype.name for x in trees.flatten(weights).values()}
    assert ('int8' in dtypes) == (kind == 'narrow')
    if kind == 'unstacked':
        net, weights = transforms.unstack(net, weights)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32))
    made = decoded(net, weights, x, [2, 0, 1])
    for i, (name, one) in enumerate((('two', TWO), (None, None), ('one', ONE))):
        its = transforms.merge(*one) if one else (NET, MODEL.weights)
        if kind == 'narrow':  # whose base is not quite the same
            its = transforms.with_adapter(net, weights, name)
        wanted = apply(*its, x)[i]
        np.testing.assert_allclose(made[i].astype(jnp.float32), wanted, rtol=near, atol=near)


def test_a_row_keeps_its_adapter_wherever_it_stands():
    net, _ = transforms.adapters(NET, MODEL.weights, NAMED)
    state = lc.init_state(net, lc.shape_dtype((2, 4, 8)))
    state = tl.seek(put_adapters(state, jnp.array([1, 2], jnp.int32)), jnp.array([0, 1]))
    assert state['head'].rows.tolist() == [1, 2]
    assert put_adapters({'a': jnp.zeros(2)}, jnp.zeros(1, jnp.int32))['a'].shape == (2,)
    assert isinstance(state['mixing']['0']['self_attention']['query'], Adapter)


def test_without_a_choice_it_is_the_base():
    net, weights = transforms.adapters(NET, MODEL.weights, NAMED)
    x = jnp.ones((3, 4, 8))
    wanted = apply(NET, MODEL.weights, x)
    for made in (decoded(net, weights, x, [0, 0, 0]), apply(net, weights, x)):
        np.testing.assert_allclose(made, wanted, rtol=1e-6)
    assert transforms.with_adapter(net, weights, None)[0] == NET
    assert transforms.adapter_names(net) == ('one', 'two') and not transforms.adapter_names(NET)
    axes = lc.axes(net, weights)
    assert axes['mixing/self_attention/query/kernel_lora_b'].spec == 'N|R->HK'
    assert all(each.is_declared for each in axes.values())


def test_what_cannot_share_a_base_is_refused():
    base = NET, MODEL.weights
    dora = transforms.lora(*base, dora=True, where='head')
    head = tl.Serial(tl.Dense(5, name='head'))
    wide = transforms.lora(
        head, {'head': {'kernel': jnp.zeros((16, 5)), 'bias': jnp.zeros(5)}}, where='head'
    )
    first = tl.Serial(tl.Dense(8, name='first'))
    first = transforms.lora(first, {'first': {'kernel': jnp.zeros((8, 8)), 'bias': jnp.zeros(8)}})
    for given, said in {
        'plain': ({'a': base}, "'a' has no adapter: give a model that transforms.lora made"),
        'dora': ({'a': dora}, "'a' is DoRA, whose magnitudes"),
        'shape': ({'a': wide}, "'a' is for a matrix of 16×5 at 'head/kernel', and this model has"),
        'path': ({'a': first}, "'a' is for 'first', which this model does not have"),
        'none': ({}, 'give at least one'),
    }.values():
        with pytest.raises(ValueError, match=said):
            transforms.adapters(*base, given)
    many = transforms.adapters(*base, NAMED)
    with pytest.raises(ValueError, match='the base has adapters already'):
        transforms.adapters(*many, NAMED)
    with pytest.raises(ValueError, match="no adapter 'x': choose one of one, two"):
        transforms.with_adapter(*many, 'x')
    with pytest.raises(TypeError, match='holds Dense, SplitHeads, MergeHeads, GatedDense, not a'):
        transforms.ManyLowRank(tl.Relu(), ('a',), 2)


def test_a_layer_of_ones_own_has_no_adapter_for_each_row():
    class Mine(tl.Layer):
        weight_axes = {'kernel': 'D->F'}

        def init(self, signature, rng, mode=tl.Mode.TRAIN):
            return {'kernel': jnp.ones((signature[0].shape[-1], 2))}, {}

    transforms.lora_paths.register(Mine, lambda layer: ('kernel',))
    net = tl.Serial(Mine())
    weights = {'mine': {'kernel': jnp.ones((8, 2))}}
    one = transforms.lora(net, weights, rank=1)
    with pytest.raises(ValueError, match=r"'one' is for 'mine', a Mine, .* on Dense, .*merge it"):
        transforms.adapters(net, weights, {'one': one})


def test_wide_weights_of_few_bits_are_refused():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.weights)
    with pytest.raises(ValueError, match="kernel' is bfloat16, and wide weights are float32"):
        transforms.lora(NET, half)
