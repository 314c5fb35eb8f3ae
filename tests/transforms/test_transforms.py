"""Rewrites: precision, ties, and one subtree a layer for decoding."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels
from layercomb import Model, init_state, losses, models, summary, tl, transforms, trees, walk
from layercomb.layers.basic.dense import contract
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.axes import Axes
from layercomb.layers.quantized.matrix import Narrow
from layercomb.shapes import describe, shape_dtype, signature_of
from layercomb.supervised import decoding
from layercomb.supervised.decoding.reading.ingesting import at_one_position
from layercomb.transforms.fusing.layer import Fused
from layercomb.transforms.quantization.choosing import vocabulary

TOKENS = (shape_dtype((2, 6), 'int32'),)


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)


def init(layer, signature=TOKENS, mode=Mode.TRAIN):
    return jax.jit(functools.partial(layer.init, signature, mode=mode))(jax.random.key(0))


def lm(**changes):
    return models.TransformerLM(11, 8, 16, n_layers=2, n_heads=2, max_len=8, **changes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, inputs, mode):
    return layer.apply(weights, state, inputs, mode=mode)


def assert_close(got, wanted, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# rewrite.


def test_rewrite_goes_from_the_leaves_up():
    seen = []
    net = tl.Serial(tl.Dense(4), tl.Residual(tl.Repeat(tl.Remat(tl.Relu()), 2)))
    transforms.rewrite(net, lambda layer: seen.append(type(layer).__name__) or layer)
    assert seen == ['Dense', 'Relu', 'Remat', 'Repeat', 'Add', 'Residual', 'Serial']


def test_rewrite_may_ask_for_paths():
    seen = []
    net = tl.Serial(tl.Dense(4), tl.Residual(tl.Repeat(tl.Remat(tl.Relu()), 2)))
    transforms.rewrite(net, lambda path, layer: seen.append(path) or layer, paths=True)
    assert seen == ['dense', *['residual/relu'] * 3, 'residual/add', 'residual', '']


# walk.


def test_walk_gives_the_paths_of_weights():
    net = nested()
    weights, _ = init(net)
    leaves = {path: layer for path, layer in walk(net) if not layer.sublayers}
    assert {path.rpartition('/')[0] for path in trees.flatten(weights)} <= leaves.keys()
    cast = walk(transforms.cast(net))
    found = [type(layer).__name__ for path, layer in cast if path == 'outer/dense']
    assert found == ['Cast', 'Dense']
    assert list(walk(net, 'model'))[1][0] == f'model/{net.keys[0]}'


def test_walk_reaches_what_rewrite_does_in_the_other_order():
    net = losses.attach(nested(), tl.CrossEntropyLoss(), 4)
    seen = []
    transforms.rewrite(net, lambda path, layer: seen.append((path, layer)) or layer, paths=True)
    key = lambda pair: (pair[0], repr(pair[1]))  # noqa: E731
    assert sorted(walk(net), key=key) == sorted(seen, key=key)
    assert [path for path, layer in walk(net) if isinstance(layer, tl.Metric)] == ['add/losses_0']


def test_walk_enters_where_it_may():
    net = tl.Serial(tl.Once(tl.Serial(tl.Dense(4), name='encoder')), tl.Dense(2))
    found = walk(net, enter=lambda layer: not layer.reads_memory)
    assert [path for path, _ in found] == ['', 'encoder', 'dense']


class Two(tl.Wrapper):
    """A wrapper of somebody's own with layers beside the one that it is around."""

    gate: Layer = tl.Tanh()
    more: tuple[Layer, ...] = (tl.Relu(), tl.Relu())

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


def test_layers_in_any_field_of_a_wrapper_are_reached():
    net = tl.Serial(Two(tl.Dense(4)))
    assert [path for path, _ in walk(net)] == [
        '', 'dense', 'dense', 'dense/gate', 'dense/more_0', 'dense/more_1',
    ]  # fmt: skip
    swap = {tl.Relu(): tl.Gelu(), tl.Tanh(): tl.Sigmoid()}
    made = transforms.rewrite(net, lambda layer: swap.get(layer, layer))
    assert made == tl.Serial(Two(tl.Dense(4), tl.Sigmoid(), (tl.Gelu(), tl.Gelu())))


# cast.


def test_cast_leaves_norms_sums_and_losses_alone():
    net = tl.Serial(
        tl.Embedding(11, 8),
        tl.Dropout(0.1),
        tl.Residual(tl.LayerNorm(), tl.Dense(8), tl.Serial()),
        tl.Softmax(),
    )
    assert repr(transforms.cast(net)) == (
        'Serial(\n    Embedding(11, 8),\n    Dropout(0.1),\n'
        '    Residual(LayerNorm(), Cast(Dense(8)), Serial()),\n    Softmax(),\n)'
    )
    assert transforms.cast(tl.CrossEntropyLoss()) == tl.CrossEntropyLoss()
    assert transforms.cast(transforms.cast(net, 'float16')) == transforms.cast(net)


@pytest.fixture(scope='module')
def narrow():
    net = lm(dropout=0.1)
    return net, transforms.cast(net), *init(net)


def test_cast_keeps_weights_and_their_gradients_in_float32(narrow):
    _, cast, weights, _ = narrow
    abstract = jax.eval_shape(functools.partial(cast.init, TOKENS), jax.random.key(0))[0]
    assert describe(jax.tree.leaves(abstract)) == describe(jax.tree.leaves(weights))
    assert jax.tree.structure(abstract) == jax.tree.structure(weights)

    def loss(weights):
        rng = jax.random.key(0)
        (y,), _ = cast.apply(weights, {}, (tokens(),), rng=rng, mode=Mode.TRAIN)
        return y.astype(jnp.float32).sum()

    grads = jax.eval_shape(jax.grad(loss), weights)
    assert describe(jax.tree.leaves(grads)) == describe(jax.tree.leaves(weights))


def with_projection(eqn):
    """An equation, and those of a projection or norm, which has a gradient of its own."""
    inside = eqn.params.get('call_jaxpr') or eqn.params.get('jaxpr')
    return [eqn, *getattr(inside, 'eqns', ())]


def test_cast_multiplies_in_bfloat16_and_adds_streams_in_float32(narrow):
    _, cast, weights, _ = narrow
    streams, products = [], []
    block = cast.layers[-3].layer

    def run(weights, x):
        return block.apply(weights, {}, (x,))[0]

    x = shape_dtype((2, 6, 8))
    its_weights = jax.tree.map(lambda w: shape_dtype(w.shape[1:]), weights['block'])
    jaxpr = jax.make_jaxpr(run)(its_weights, x)
    for eqn in itertools.chain.from_iterable(map(with_projection, jaxpr.eqns)):
        dtypes = {v.aval.dtype.name for v in eqn.invars}
        if eqn.primitive.name == 'dot_general':
            products.append(dtypes)
        if eqn.primitive.name == 'rsqrt':
            streams.append(dtypes)
    assert len(products) == 6 and all(d == {'bfloat16'} for d in products)
    assert len(streams) == 2 and all(d == {'float32'} for d in streams)
    assert [y.dtype for y in jaxpr.out_avals] == [jnp.float32]


def test_cast_is_close_and_decodes(narrow):
    net, cast, weights, _ = narrow
    (wanted,), _ = apply(net, weights, {}, (tokens(),), Mode.EVAL)
    (y,), _ = apply(cast, weights, {}, (tokens(),), Mode.EVAL)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=0.1, atol=0.05)
    state = init_state(cast, TOKENS)
    assert state['block']['0']['residual']['self_attention']['core'].k.dtype == jnp.bfloat16
    (z,), _ = apply(cast, weights, state, (tokens(),), Mode.PREDICT)
    np.testing.assert_allclose(np.asarray(z, np.float32), wanted, rtol=0.1, atol=0.05)


def test_cast_says_what_it_takes():
    with pytest.raises(
        TypeError, match=r'Cast computes a leaf, not a Serial: transforms.cast\(net\)'
    ):
        transforms.Cast(tl.Serial(tl.Dense(4)))
    for wrapped in (tl.Remat(tl.LayerNorm()), tl.Map(tl.Chunk(tl.RMSNorm(), 4), 2)):
        assert transforms.cast(wrapped) == wrapped
        with pytest.raises(TypeError, match=r'not a (Layer|RMS)Norm: .* stays in float32'):
            transforms.Cast(wrapped)
    with pytest.raises(TypeError, match='Cast computes a leaf, not a Serial'):
        transforms.Cast(tl.Remat(tl.Serial(tl.LayerNorm(), tl.Dense(4))))
    with pytest.raises(ValueError, match="dtype must be floating-point, got 'int8'"):
        transforms.Cast(tl.Dense(4), 'int8')
    assert transforms.Cast(tl.Dense(4), jnp.float16) == transforms.Cast(tl.Dense(4), 'float16')


# Tied.


def tied(via=jnp.transpose, source='embedding/table', target='head/kernel'):
    net = tl.Serial(tl.Embedding(11, 8), tl.Dense(8), tl.Dense(11, name='head'))
    return net, transforms.Tied(net, source, target, via)


def test_tied_is_one_weight_in_two_places():
    net, layer = tied()
    weights, _ = init(layer)
    assert list(trees.flatten(weights)) == [
        'dense/bias', 'dense/kernel', 'embedding/table', 'head/bias',
    ]  # fmt: skip
    full = trees.put(weights, 'head/kernel', weights['embedding']['table'].T)
    wanted = apply(net, full, {}, (tokens(),), Mode.EVAL)
    assert_close(apply(layer, weights, {}, (tokens(),), Mode.EVAL), wanted)

    def loss(layer, weights):
        return jnp.sin(layer.apply(weights, {}, (tokens(),))[0][0]).sum()

    grads, apart = (
        jax.grad(functools.partial(loss, m))(w) for m, w in ((layer, weights), (net, full))
    )
    both = apart['embedding']['table'] + apart['head']['kernel'].T
    assert_close(grads['embedding']['table'], both)


def test_tied_says_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"'embedding/table' gives \(11, 8\) and 'head/kernel' is \(8,"
    ):
        init(tied(via=None)[1])
    with pytest.raises(
        KeyError, match="no 'tail/kernel' in the tree: at the root there is dense, emb"
    ):
        init(tied(target='tail/kernel')[1])
    with pytest.raises(
        KeyError, match="no 'embedding/kernel' in the tree: at embedding there is table"
    ):
        init(tied(source='embedding/kernel')[1])


def blocks():
    """Two blocks of one structure, with something between them."""
    block = tl.Residual(tl.LayerNorm(), tl.Dense(8), tl.Repeat(tl.Serial(tl.Dense(8)), 2))
    named = [block.replace(name=name) for name in ('first', 'last')]
    return tl.Serial(tl.Embedding(11, 8), named[0], tl.Tanh(), named[1], tl.Dense(11, name='head'))


def test_tied_layers_share_all_their_weights(tmp_path):
    net, layer = blocks(), transforms.Tied(blocks(), 'first', 'last')
    weights, _ = init(layer)
    assert 'last' not in weights and 'first' in weights
    full = {**weights, 'last': weights['first']}
    wanted = apply(net, full, {}, (tokens(),), Mode.EVAL)
    assert_close(apply(layer, weights, {}, (tokens(),), Mode.EVAL), wanted)

    def loss(layer, weights):
        return jnp.sin(layer.apply(weights, {}, (tokens(),))[0][0]).sum()

    grads, apart = (
        jax.grad(functools.partial(loss, m))(w) for m, w in ((layer, weights), (net, full))
    )
    assert_close(grads['first'], jax.tree.map(jnp.add, apart['first'], apart['last']))
    assert_close(grads['head'], apart['head'])

    model = Model(layer).init(TOKENS)
    model.save(tmp_path / 'saved')
    again = Model(layer).init(TOKENS, 1).load(tmp_path / 'saved')
    assert_close(again(tokens()), model(tokens()))
    counted = [line.split()[-2:] for line in summary(layer, TOKENS).splitlines()]
    assert counted[-1][0] == str(trees.count(weights))


@pytest.mark.parametrize('how', ['cast', 'quantize', 'unstack'])
def test_tied_layers_are_rewritten_as_others(how):
    layer = transforms.Tied(blocks(), 'first', 'last')
    weights, _ = init(layer)
    wanted = apply(layer, weights, {}, (tokens(),), Mode.EVAL)[0]
    if how == 'cast':
        made = transforms.cast(layer), weights
    elif how == 'quantize':
        made = transforms.quantize(layer, weights, smallest=1)
    else:
        made = transforms.unstack(layer, weights)
        assert isinstance(made[0], transforms.Tied) and 'last' not in made[1]
        assert '0' in made[1]['first']['serial']
    net, weights = made
    got = apply(net, weights, {}, (tokens(),), Mode.EVAL)[0]
    tolerance = 1e-5 if how == 'unstack' else 0.2
    np.testing.assert_allclose(np.float32(got[0]), wanted[0], atol=tolerance)


def test_a_tie_that_unstacking_moves_is_untied():
    body = tl.Serial(tl.Embedding(11, 8), tl.Repeat(tl.Serial(tl.Dense(8), tl.Dense(8)), 2))
    layer = transforms.Tied(body, 'serial/dense', 'serial/dense_1')
    weights, _ = init(layer)
    flat_net, flat = transforms.unstack(layer, weights)
    assert not isinstance(flat_net, transforms.Tied)
    wanted = apply(layer, weights, {}, (tokens(),), Mode.EVAL)
    assert_close(apply(flat_net, flat, {}, (tokens(),), Mode.EVAL), wanted)


@pytest.mark.parametrize(
    ('ends', 'via', 'error'),
    [
        (('first', 'first'), None, 'are the same, or one is inside the other'),
        (('first/dense', 'first'), None, 'one is inside the other: tie two places that lie beside'),
        (('first', 'first/dense'), None, 'one is inside the other'),
        (('first', 'last'), jnp.transpose, "via= makes one weight of another, and 'first' or 'l"),
        (
            ('first', 'head'),
            None,
            r"'first' has nothing at 'bias', and 'head' has \(11,\): tie lay",
        ),
        (('first/dense', 'head'), None, r"'first/dense' has \(8,\) at 'bias', and 'head' has \(11"),
        (
            ('first/dense/bias', 'head'),
            None,
            "'first/dense/bias' is one weight and 'head' those of",
        ),
        (
            ('head', 'first/dense/bias'),
            None,
            "'first/dense/bias' is one weight and 'head' those of",
        ),
    ],
)
def test_tied_layers_say_what_does_not_fit(ends, via, error):
    with pytest.raises(ValueError, match=error):
        init(transforms.Tied(blocks(), *ends, via))
    with pytest.raises(KeyError, match="no 'second' in the tree: at the root there is embedding"):
        init(transforms.Tied(blocks(), 'first', 'second'))


# unstack.


class Offset(Layer):
    """Adds a running mean of what came by."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'mean': jnp.zeros(signature[0].shape[-1])}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        y = x + state['mean']
        return (y,), ({'mean': state['mean'] + x.mean((0, 1))} if mode.is_training else state)


def nested():
    inner = tl.Repeat(tl.Residual(tl.Conv1D(8, 2, padding='causal'), name='inner'), 2)
    shared = tl.Repeat(tl.Residual(tl.Dense(8), Offset(), name='same'), 2, shared=True)
    return tl.Serial(
        tl.Embedding(11, 8),
        tl.Dense(8),
        tl.Repeat(tl.Remat(tl.Serial(tl.Dense(8), inner, tl.BatchNorm(), name='outer')), 2),
        tl.Dense(8),
        tl.Chunk(shared, 4),
        tl.Dup(),
        tl.Map(tl.Serial(Offset(), tl.Dense(8), name='both'), 2),
        tl.Add(),
    )


def test_unstack_keeps_names_values_and_state():
    net = nested()
    weights, state = init(net)
    _, state = apply(net, weights, state, (tokens(),), Mode.TRAIN)
    flat_net, flat = transforms.unstack(net, weights)
    flat_state = transforms.unstack_state(net, state)
    assert flat_net.keys
    kernel = weights['outer']['inner']['conv1d']['kernel']
    assert (flat['outer']['1']['inner']['1']['conv1d']['kernel'] == kernel[1, 1]).all()
    assert flat['same']['0']['dense']['kernel'] is flat['same']['1']['dense']['kernel']
    own, own_state = jax.eval_shape(lambda: init(flat_net))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, flat)
    assert jax.tree.map(jnp.shape, own_state) == jax.tree.map(jnp.shape, flat_state)

    inputs = (tokens(),)
    wanted = apply(net, weights, state, inputs, Mode.EVAL)[0]
    assert_close(apply(flat_net, flat, flat_state, inputs, Mode.EVAL)[0], wanted)
    cache = init_state(net, TOKENS)
    flat_cache = jax.eval_shape(lambda: init_state(flat_net, TOKENS))
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, flat_cache)
    one, after = apply(net, weights, cache, inputs, Mode.PREDICT)
    two, flat_after = apply(flat_net, flat, cache, inputs, Mode.PREDICT)
    assert_close(two, one)
    assert_close(flat_after, after)


def test_unstack_of_what_has_no_repeat_is_the_same():
    net = tl.Serial(tl.Dense(4), tl.Residual(tl.Dense(4)))
    assert transforms.unstack(net, {'dense': {'kernel': 1}}) == (net, {'dense': {'kernel': 1}})
    _, layer = tied()
    assert transforms.unstack(layer, {})[0] == layer


def test_unstack_reaches_inside_wrappers():
    block = tl.Residual(tl.Dense(8), name='block')
    body = tl.Serial(tl.Embedding(11, 8), tl.Repeat(block, 2), tl.Dense(11, name='head'))
    net = transforms.cast(transforms.Tied(body, 'embedding/table', 'head/kernel', jnp.transpose))
    weights, _ = init(net)
    flat_net, flat = transforms.unstack(net, weights)
    assert list(flat['block']) == ['0', '1'] and isinstance(flat_net, transforms.Tied)
    inputs = (tokens(),)
    wanted = net.output_signature(signature_of(inputs))
    assert describe(flat_net.output_signature(signature_of(inputs))) == describe(wanted)
    got = flat_net.apply(flat, {}, inputs)[0][0]
    assert (got == net.apply(weights, {}, inputs)[0][0]).all()


# quantize.

WIDTH = 32
STREAM = (shape_dtype((2, 6, WIDTH)),)
HEADS = (shape_dtype((2, 2, 6, 16)), shape_dtype((2, 6, WIDTH)))
QUANTIZED = {
    'Dense': (tl.Dense(24), STREAM),
    'Cast': (transforms.Cast(tl.Dense(24)), STREAM),
    'SplitHeads': (tl.SplitHeads(2), STREAM),
    'MergeHeads': (tl.MergeHeads(), HEADS),
    'Embedding': (tl.Embedding(11, WIDTH), TOKENS),
    'SparseFF': (tl.SparseFF(64, 16), STREAM),
    'MixtureFF': (tl.MixtureFF(64, 8, 2, use_bias=True), STREAM),
    'MixtureFF ungated': (tl.MixtureFF(64, 8, 3, 2, gated=False, normalize=True), STREAM),
    'MultiplicativeDense': (tl.MultiplicativeDense(2), STREAM),
    'MultiplicativeHead': (tl.MultiplicativeHead(50, 2), STREAM),
}


def example(signature):
    made = np.random.default_rng(0)
    return tuple(
        tokens() if x.dtype == jnp.int32 else jnp.asarray(made.normal(size=x.shape), x.dtype)
        for x in signature
    )


def quantize(net, weights, bits, group_size=16, **options):
    return transforms.quantize(net, weights, bits, group_size, smallest=1, **options)


def widened(net, weights, like):
    """The weights of the wide model nearest to those of a quantized leaf, shaped like others."""
    return jax.tree.map(
        lambda w, wide: w.wide().reshape(wide.shape) if isinstance(w, Narrow) else w,
        net.seen(weights),
        like,
        is_leaf=lambda w: isinstance(w, Narrow),
    )


@pytest.mark.parametrize('name', QUANTIZED)
def test_quantized_leaves_compute_what_their_weights_say(name):
    net, signature = QUANTIZED[name]
    weights, state = init(net, signature)
    inputs = example(signature)
    (wanted,), _ = apply(net, weights, state, inputs, Mode.EVAL)
    for bits, limit in {16: 0.01, 8: 0.02, 4: 0.3}.items():
        layer, narrow = quantize(net, weights, bits)
        assert set(trees.flatten(weights)) <= set(trees.flatten(narrow))
        same = jax.eval_shape(functools.partial(layer.init, signature), jax.random.key(0))[0]
        assert describe(jax.tree.leaves(same)) == describe(jax.tree.leaves(narrow))
        with layercomb_kernels.off():
            (y,), _ = apply(layer, narrow, state, inputs, Mode.EVAL)
        few = tuple(x[:1, ..., :1, :] if x.ndim > 2 else x[:1, :1] for x in inputs)
        (z,), _ = apply(layer, narrow, state, few, Mode.PREDICT)
        full = widened(layer, narrow, weights)
        # Kernels multiply integers by activations of 16 bits.
        for got, x, mode, close in ((y, inputs, Mode.EVAL, 1e-5), (z, few, Mode.PREDICT, 2e-4)):
            (exact,), _ = apply(net, full, state, x, mode)
            tolerance = 0.02 if exact.dtype == jnp.bfloat16 else close
            assert got.dtype == exact.dtype
            assert_close(*(a.astype(jnp.float32) for a in (got, exact)), tolerance)
        if name != 'SparseFF':  # which may choose another unit
            error = jnp.linalg.norm((y - wanted).astype(jnp.float32))
            assert error <= limit * jnp.linalg.norm(wanted.astype(jnp.float32))


@pytest.fixture(scope='module')
def small():
    net = models.TransformerLM(11, 32, 64, n_layers=2, n_heads=2, max_len=16)
    return net, *init(net)


def test_quantize_keeps_names_stacked_and_unstacked(small):
    net, weights, state = small
    quantized, narrow = quantize(net, weights, 4)
    kept, made = trees.flatten(weights), trees.flatten(narrow)
    assert set(kept) <= set(made) and all('_scales' in path for path in set(made) - set(kept))
    kernel = 'block/residual/self_attention/query/kernel'
    assert made[kernel].dtype == jnp.uint32
    assert made[f'{kernel}_scales'].shape == (2, 2, 16, 2)
    assert made['norm/scale'] is kept['norm/scale']
    assert trees.n_bytes(narrow) < trees.n_bytes(weights) / 3

    after, after_weights = transforms.unstack(quantized, narrow)
    before, before_weights = quantize(*transforms.unstack(net, weights), 4)
    jax.tree.map(np.testing.assert_array_equal, after_weights, before_weights)
    wanted = apply(quantized, narrow, state, (tokens(),), Mode.EVAL)[0]
    # Activations that differ by a float's last bit may be rounded to other integers of 16 bits.
    for layer, w in ((after, after_weights), (before, before_weights)):
        y = apply(layer, w, state, (tokens(),), Mode.EVAL)[0]
        assert_close(y, wanted, tolerance=1e-4)
    cache = init_state(after, TOKENS)
    y = apply(after, after_weights, cache, (tokens(),), Mode.PREDICT)[0]
    assert_close(y, wanted, tolerance=1e-4)


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_narrow_weights_count_as_what_they_stand_for(small, bits):
    net, weights, state = small
    made = Model(*quantize(net, weights, bits), state)
    assert made.n_weights == Model(net, weights, state).n_weights == trees.count(weights)
    tied = transforms.Tied(
        tl.Serial(tl.Embedding(11, 32), tl.Dense(11, name='head')),
        'embedding/table',
        'head/kernel',
        jnp.transpose,
    )
    weights, _ = init(tied)
    assert Model(*quantize(tied, weights, bits)).n_weights == trees.count(weights) == 11 * 33


def test_weights_that_were_quantized_otherwise_are_refused():
    table, kernel = weights_of((96, 64)), {'kernel': weights_of((64, 96))}
    for layer, weights, x in (
        (tl.Embedding(96, 64), {'table': table}, jnp.arange(8)[None]),
        (tl.Dense(96, use_bias=False), kernel, jnp.ones((1, 64))),
    ):
        kinds = [
            transforms.Quantized(layer, bits, 32, smallest=1, minima=minima)
            for bits in (8, 4)
            for minima in (False, True)
        ]
        for made in kinds:
            for given in kinds:
                narrow = given.narrow(weights)
                if made == given:
                    made.apply(narrow, {}, (x,))
                    continue
                with pytest.raises(ValueError):
                    made.apply(narrow, {}, (x,))
    with pytest.raises(ValueError, match='rows of 32 weights have 2 scales, and 8 bits in groups'):
        kinds[0].apply(kinds[2].narrow(kernel), {}, (jnp.ones((1, 32)),))


def weights_of(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('factor', [1e9, 1e-9])
def test_scales_that_float16_cannot_hold_are_refused(factor):
    layer = transforms.Quantized(tl.Dense(64, use_bias=False), 8, 32, smallest=1, half_scales=True)
    layer.narrow({'kernel': weights_of((64, 64))})
    layer.narrow({'kernel': jnp.zeros((64, 64))})
    with pytest.raises(ValueError, match='too large or too small for float16: leave half_scales'):
        layer.narrow({'kernel': weights_of((64, 64)) * factor})


def test_quantize_rounds_inputs_to_a_byte_if_asked(small):
    net, weights, state = small
    plain, same = quantize(net, weights, 8)
    rough, narrow = quantize(net, weights, 8, activation_bits=8)
    jax.tree.map(np.testing.assert_array_equal, same, narrow)
    exact, y = (apply(each, same, state, (tokens(),), Mode.EVAL)[0] for each in (plain, rough))
    error = jnp.linalg.norm(y[0] - exact[0]) / jnp.linalg.norm(exact[0])
    assert error < 0.03
    if layercomb_kernels.available():
        assert error > 1e-4
    with pytest.raises(ValueError, match='activation_bits=7 is not to be had: inputs are rounded'):
        quantize(net, weights, 8, activation_bits=7)
    with pytest.raises(ValueError, match='activation_bits=7 is not to be had: choose 16'):
        transforms.Quantized(tl.Dense(4), activation_bits=7)


def test_quantize_leaves_what_is_small(small):
    net, weights, _ = small
    assert transforms.quantize(net, weights) == (net, weights)
    quantized, narrow = transforms.quantize(net, weights, smallest=2048)
    assert sum(w.dtype == jnp.uint32 for w in jax.tree.leaves(narrow)) == 2  # of the feed-forward
    assert repr(quantized).count('Quantized') == 2


@pytest.mark.parametrize('bits', [8, 4, 16])
def test_quantize_keeps_one_array_for_a_table_and_the_head_that_is_its_transpose(bits):
    net = tl.Serial(tl.Embedding(11, 32), tl.Dense(11, name='head'))
    net = transforms.cast(transforms.Tied(net, 'embedding/table', 'head/kernel', jnp.transpose))
    weights, _ = init(net)
    quantized, narrow = quantize(net, weights, bits)
    scales = {} if bits == 16 else {'embedding/table_scales': (11, 2)}
    shapes = {path: x.shape for path, x in trees.flatten(narrow).items()}
    assert shapes == {
        'embedding/table': (11, 32 if bits == 16 else 8),  # words of 32 bits
        'head/bias': (11,),
        **scales,
    }
    (y,), _ = quantized.apply(narrow, {}, (tokens(),))
    apart = transforms.quantize(net.layer, net.untied(weights), bits, 16, smallest=1)
    (wanted,), _ = apart[0].apply(apart[1], {}, (tokens(),))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(y), np.float32(wanted))
    assert jax.tree.map(jnp.shape, init(quantized)[0]) == jax.tree.map(jnp.shape, narrow)
    assert transforms.axes(quantized, narrow).keys() == shapes.keys()
    assert transforms.unstack(quantized, narrow)[0] == quantized


def bits_of_leaves(net):
    return {path: x.bits for path, x in walk(net) if isinstance(x, transforms.Quantized)}


def test_tables_and_heads_are_of_8_bits_in_a_model_of_4():
    body = tl.Serial(tl.Embedding(11, 32), tl.Dense(32), tl.Dense(11, name='head'))
    wanted = {'embedding': 8, 'dense': 4, 'head': 8}
    weights, _ = init(body)
    assert bits_of_leaves(quantize(body, weights, 4)[0]) == wanted
    net = transforms.Tied(body, 'embedding/table', 'head/kernel', jnp.transpose)
    made, narrow = quantize(net, init(net)[0], 4)
    assert isinstance(made, transforms.TiedRows) and 'kernel' not in narrow['head']
    assert bits_of_leaves(made) == wanted
    square = tl.Serial(tl.Embedding(32, 32), tl.Dense(), tl.Dense(name='end'))
    net = transforms.Tied(square, 'embedding/table', 'end/kernel', jnp.transpose)
    made, _ = quantize(net, init(net)[0], 4)
    assert bits_of_leaves(made) == {'embedding': 8, 'dense': 4, 'end': 8}
    layers = transforms.Tied(
        tl.Serial(tl.Embedding(11, 32, name='a'), tl.Embedding(11, 32, name='b')), 'a', 'b'
    )
    assert vocabulary(layers) == {'a', 'b'}


def test_bits_may_go_by_the_path():
    net = tl.Serial(tl.Embedding(11, 32), tl.Dense(32, name='first'), tl.Dense(32, name='last'))
    weights, _ = init(net)
    made, narrow = quantize(net, weights, {'first': 4, 'last': 16}.get)
    assert bits_of_leaves(made) == {'first': 4, 'last': 16}
    assert narrow['embedding']['table'] is weights['embedding']['table']
    assert narrow['last']['kernel'].dtype == jnp.bfloat16
    made, _ = quantize(net, weights, lambda path: 4)
    assert bits_of_leaves(made) == {'embedding': 4, 'first': 4, 'last': 4}
    rough, _ = quantize(net, weights, {'first': 4, 'last': 16}.get, activation_bits=8)
    assert bits_of_leaves(rough) == {'first': 4, 'last': 16}
    with pytest.raises(ValueError, match="bits=3 is not to be had for 'last'"):
        quantize(net, weights, {'last': 3}.get)


def test_quantize_unties_what_it_stores_otherwise():
    square = tl.Serial(tl.Embedding(32, 32), tl.Dense(32, name='head'))
    net = transforms.Tied(square, 'embedding/table', 'head/kernel')
    weights, _ = init(net)
    quantized, narrow = quantize(net, weights, 8)
    assert isinstance(quantized, tl.Serial)
    assert (narrow['embedding']['table'] != narrow['head']['kernel']).any()
    (y,), _ = quantized.apply(narrow, {}, (tokens(),))
    (wanted,), _ = net.apply(weights, {}, (tokens(),))
    np.testing.assert_allclose(y, wanted, atol=0.3)


def test_quantize_keeps_a_tie_of_layers_and_of_what_stays_wide():
    layer = transforms.Tied(blocks(), 'first', 'last')
    narrow = quantize(layer, init(layer)[0], 8)[1]
    assert 'last' not in narrow and narrow['first']['dense']['kernel'].dtype == jnp.uint32
    net = tied()[1]
    weights, _ = init(net)
    assert transforms.quantize(net, weights) == (net, weights)  # all are small


@pytest.mark.parametrize('kind', [models.TransformerLM, models.ReformerLM, models.TerraformerLM])
def test_quantized_models_decode(kind):
    net = kind(11, 32, 64, n_layers=1, n_heads=2, max_len=16)
    weights, state = init(net)
    net, weights = quantize(net, weights, 8)
    (logits,), _ = apply(net, weights, state, (tokens(),), Mode.EVAL)
    made = decoding.generate(Model(net, weights, state), np.asarray(tokens()), 2, temperature=0)
    np.testing.assert_array_equal(made[:, 0], logits[:, -1].argmax(-1))
    net, weights = transforms.unstack(net, weights)
    cache = init_state(net, TOKENS)
    for i in range(6):
        inputs = (tokens()[:, i : i + 1],)
        (y,), cache = apply(net, weights, cache, inputs, Mode.PREDICT)
        assert_close(y[:, 0], logits[:, i], 2e-4)  # activations of both are rounded


class Mine(Layer):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.ones((5, signature[0].shape[-1]), jnp.float32)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (contract('...d,fd->...f', inputs[0], weights['w']),), state


class Joined(Mine):
    weight_axes = {'w': 'F<-D'}


def test_a_layer_of_ones_own_joins_in_by_a_rule_and_its_axes():
    transforms.narrow_paths.register(Mine, lambda layer: ('w',))
    try:
        weights, _ = init(Joined(), STREAM)
        net, narrow = quantize(Joined(), weights, 8)
        assert narrow['w'].shape == (5, WIDTH // 4) and narrow['w'].dtype == jnp.uint32
        x = example(STREAM)
        assert_close(net.apply(narrow, {}, x)[0], Joined().apply(weights, {}, x)[0], 0.02)
        with pytest.raises(TypeError, match=r"Mine: 'w' is declared as '\?', and a narrow"):
            quantize(Mine(), weights, 8)
    finally:
        transforms.narrow_paths.register(Mine, lambda layer: ())


# axes.


def test_axes_are_the_same_stacked_unstacked_tied_and_cast(small):
    net, weights, _ = small
    found = transforms.axes(transforms.cast(net), weights)
    assert found == transforms.axes(net, weights)
    flat = transforms.axes(*transforms.unstack(net, weights))
    assert {axes.stacked for axes in flat.values()} == {0}
    assert {axes.stacked for axes in found.values()} == {0, 1}
    assert {axes.spec for axes in flat.values()} == {axes.spec for axes in found.values()}
    for path, x in trees.flatten(weights).items():
        assert found[path].ndim == x.ndim


def test_axes_of_narrow_weights_are_those_they_are_kept_in(small):
    net, weights, _ = small
    net, narrow = quantize(net, weights, 8)
    found = transforms.axes(net, narrow)
    by_end = {'/'.join(path.split('/')[-2:]): axes.spec for path, axes in found.items()}
    wanted = {
        'embedding/table': 'V:D',
        'embedding/table_scales': '->VG',
        'query/kernel': 'HK<-D',
        'query/kernel_scales': '->HKG',
        'query/bias': 'H|->K',
        'output/kernel': 'D<-(HK)',
        'output/kernel_scales': '->DG',
        'head/kernel': 'F<-D',
    }
    assert {path: by_end[path] for path in wanted} == wanted


def test_shared_blocks_are_not_stacked_and_nested_ones_are_twice():
    for net, stacked in (
        (tl.Repeat(tl.Dense(), 2, shared=True), 0),
        (tl.Repeat(tl.Repeat(tl.Dense(), 2), 3), 2),
        (tl.Map(tl.Repeat(tl.Dense(), 2), 1), 1),
    ):
        weights, _ = net.init(STREAM, jax.random.key(0))
        assert transforms.axes(net, weights)['kernel'] == Axes('D->F', stacked)


def test_axes_say_what_does_not_fit():
    weights = {'kernel': jnp.ones((3, 4, 4)), 'bias': None}
    assert transforms.axes(tl.Repeat(tl.Dense(), 3), weights) == {'kernel': Axes('D->F', 1)}
    said = r"'kernel' has 3 axes, \(3, 4, 4\); Dense declares 'D->F' and Repeat stacks 0"
    with pytest.raises(ValueError, match=said):
        transforms.axes(tl.Dense(), weights)
    with pytest.raises(ValueError, match="the model has no weight 'a/kernel': give the layer"):
        transforms.axes(tl.Serial(tl.Dense()), {'a': weights})
    with pytest.raises(TypeError, match=r'axes: the first argument is a layer, got .*model\.l'):
        transforms.axes(Model(tl.Dense()), weights)
    assert not transforms.axes(Mine(), {'w': jnp.ones((2, 2))})['w'].is_known


def test_quantized_weights_do_not_train(small):
    net, weights, _ = small
    net, weights = quantize(net, weights, 8)

    def loss(some, rest):
        return net.apply(trees.merge(some, rest), {}, (tokens(),))[0][0].sum()

    biases = trees.partition(weights, lambda path: path.endswith('bias'))
    assert jnp.isfinite(jax.tree.leaves(jax.jit(jax.grad(loss))(*biases))[0]).all()
    with pytest.raises(ValueError, match='quantized weights do not train: train the wide model'):
        jax.jit(jax.grad(loss))(*trees.partition(weights))


def test_quantize_says_what_it_takes(small):
    net, weights, _ = small
    with pytest.raises(
        ValueError, match="bits=5 is not to be had for 'embedding': choose 8 or 4, 16 for bfloat16"
    ):
        transforms.quantize(net, weights, 5)
    with pytest.raises(
        ValueError, match='quantized already: quantize the one that it was made from'
    ):
        quantize(*quantize(net, weights, 8), 4)
    with pytest.raises(TypeError, match='Quantized holds a leaf with matrices, not a LayerNorm'):
        transforms.Quantized(tl.LayerNorm())


def test_unstacking_again_gives_what_is_given():
    net = tl.Serial(tl.Repeat(tl.Residual(tl.SelfAttention(2), name='a'), 2), tl.Dense(4))
    weights, _ = net.init((shape_dtype((1, 4, 8)),), jax.random.key(0))
    net, weights = transforms.unstack(net, weights)
    again = transforms.unstack(net, weights)
    assert again[0] is net and again[1] is weights


def test_axes_of_layers_beside_the_one_in_a_wrapper_are_found():
    class WithGate(tl.Wrapper):
        gate: Layer

        def init(self, signature, rng, mode=Mode.TRAIN):
            first, second = jax.random.split(rng)
            weights, state = self.layer.init(signature, first, mode)
            return {**weights, 'gate': self.gate.init(signature, second, mode)[0]}, state

    net = WithGate(tl.Dense(3), tl.Dense(3))
    weights, _ = net.init(shape_dtype((2, 4)), jax.random.key(0))
    found = transforms.axes(net, weights)
    assert found['gate/kernel'] == found['kernel'] == Axes('D->F')


def test_a_holder_whose_layers_cannot_be_replaced_refuses_a_rewrite():
    class Holder(Layer):
        inner: Layer
        sublayers = property(lambda self: (self.inner,))

    holder = Holder(tl.Dense(8))
    assert transforms.rewrite(holder, lambda layer: layer) == holder
    with pytest.raises(TypeError, match='Holder holds layers and cannot be given others: write wi'):
        transforms.cast(holder)


def test_a_fused_head_is_still_one_that_prompts_need_at_one_position():
    head = transforms.Quantized(tl.Dense(64), smallest=1)
    assert Fused(head).makes_logits and not Fused(tl.LayerNorm()).makes_logits
    assert at_one_position(tl.Serial(tl.LayerNorm(), Fused(head))) is not None
