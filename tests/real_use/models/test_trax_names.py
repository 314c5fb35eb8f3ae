"""Names that users of Trax know mean here what they mean there, or are refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import losses, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import vjp
from layercomb.model import Model, embeddings
from layercomb.shapes import shape_dtype, signature_of

made = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(made.normal(size=shape), jnp.float32)


def run(layer, *inputs, mode=Mode.EVAL):
    inputs = tuple(map(jnp.asarray, inputs))
    weights, state = layer.init(signature_of(inputs), jax.random.key(0))
    outputs, _ = layer.apply(weights, state, inputs, mode=mode)
    return outputs[0] if len(outputs) == 1 else outputs


def relu(x):
    return np.maximum(x, 0)


# Branch, Parallel, Residual.


def test_nothing_beside_a_layer_is_the_identity_in_parallel():
    a, b = floats(2, 3), floats(2, 3)
    for nothing in (None, [], (), [None], [[], None]):
        net = tl.Serial(tl.Parallel(nothing, tl.Relu()), tl.Add())
        assert (net.n_in, net.n_out) == (2, 1)
        np.testing.assert_array_equal(run(net, a, b), np.asarray(a) + relu(b))


def test_nothing_beside_a_layer_is_the_identity_in_a_branch():
    x, below = floats(2, 3), floats(4)
    net = tl.Branch(None, tl.Relu(), [])
    assert (net.n_in, net.n_out) == (1, 3)
    for got, wanted in zip(run(net, x), (x, relu(x), x), strict=True):
        np.testing.assert_array_equal(got, wanted)
    *_, untouched = run(tl.Serial(net, tl.Parallel(None, None, None, tl.Tanh())), x, below)
    np.testing.assert_allclose(untouched, np.tanh(below), rtol=1e-6)


def test_nothing_alone_takes_one_value():
    x = floats(3)
    for net in (tl.Branch(None), tl.Parallel(None), tl.Branch([]), tl.Parallel(())):
        assert (net.n_in, net.n_out) == (1, 1)
        assert (run(net, x) == x).all()
    assert (tl.Parallel().n_in, tl.Branch().n_in) == (0, 0)  # no layer is not the identity


def test_a_list_beside_a_layer_is_a_series():
    x, y = floats(2, 3), floats(2, 3)
    net = tl.Parallel([tl.Relu(), None, [tl.Tanh()]], (tl.Tanh(), tl.Relu()))
    assert net == tl.Parallel(tl.Serial(tl.Relu(), tl.Tanh()), tl.Serial(tl.Tanh(), tl.Relu()))
    assert (net.n_in, net.n_out) == (2, 2)
    for got, wanted in zip(run(net, x, y), (np.tanh(relu(x)), relu(np.tanh(y))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    both = tl.Branch([tl.Add(), tl.Relu()], tl.Tanh())
    assert both.n_in == 2
    np.testing.assert_allclose(run(both, x, y)[0], relu(np.asarray(x) + y), rtol=1e-6)


def test_in_series_nothing_is_still_left_out_and_lists_flattened():
    assert tl.Serial(None, [tl.Relu(), []], None) == tl.Serial(tl.Relu())
    assert tl.Residual(None, [tl.Relu()]) == tl.Residual(tl.Relu())
    assert tl.ReversibleHalfResidual([tl.Relu()], None) == tl.ReversibleHalfResidual(tl.Relu())


@pytest.mark.parametrize('kind', [tl.Branch, tl.Parallel])
def test_what_stands_for_nothing_is_shown_as_code_that_makes_it(kind):
    net = kind(None, [tl.Dense(4), tl.Relu()], name='two')
    wanted = f"{kind.__name__}(Serial(), Serial(Dense(4), Relu()), name='two')"
    assert repr(net) == wanted
    names = {name: getattr(tl, name) for name in tl.__all__}
    assert eval(repr(net), names) == net
    assert net.with_sublayers(net.sublayers) == net
    assert transforms.rewrite(net, lambda layer: layer) == net


def test_weights_lie_where_a_series_would_have_them():
    net = tl.Branch(None, [tl.Dense(4), tl.Relu()], tl.Dense(4))
    weights, _ = net.init((shape_dtype((2, 3)),), jax.random.key(0))
    assert sorted(trees.flatten(weights)) == [
        'dense/bias',
        'dense/kernel',
        'serial_1/dense/bias',
        'serial_1/dense/kernel',
    ]


@pytest.mark.parametrize('kind', [tl.Branch, tl.Parallel])
def test_what_is_no_layer_is_refused_wherever_it_stands(kind):
    for arguments in ((jnp.tanh,), ([tl.Relu(), jnp.tanh],), ((), [[jnp.tanh]])):
        with pytest.raises(TypeError, match=f'{kind.__name__} is made of layers, got .*tanh'):
            kind(*arguments)
    with pytest.raises(TypeError, match=r'got Relu: call it, Relu\(…\)'):
        kind(None, tl.Relu)


@pytest.mark.parametrize(
    'net',
    [
        tl.Serial(tl.Branch(None, [tl.Dense(3), tl.Relu()]), tl.Add()),
        tl.Serial(tl.Dup(), tl.Parallel(None, tl.Dense(3)), tl.Multiply()),
        tl.ReversibleSerial(
            tl.ReversibleHalfResidual(tl.Branch(None, tl.Dense(3)), tl.Multiply()),
        ),
    ],
    ids=['branch', 'parallel', 'reversible'],
)
def test_gradients_pass_through_what_stands_for_nothing(net):
    inputs = tuple(floats(2, 3) for _ in range(net.n_in))
    weights, _ = net.init(signature_of(inputs), jax.random.key(0))
    cts = tuple(floats(2, 3) for _ in range(net.n_out))

    def outputs(weights, inputs):
        return net.apply(weights, {}, inputs, mode=Mode.EVAL)[0]

    _, d_inputs, d_weights = tl.one_pass(net, weights, {}, inputs, cts, rng=jax.random.key(1))
    wanted = vjp(outputs, weights, inputs)[1](cts)
    for got, should in zip(
        jax.tree.leaves((d_weights, d_inputs)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got, should, rtol=1e-5, atol=1e-6)


def test_ids_are_checked_for_the_input_that_is_embedded():
    embedding = tl.Embedding(9, 4)
    for net, wanted in (
        (tl.Parallel(None, embedding), 1),
        (tl.Parallel([], [], [embedding, tl.Dense(4)]), 2),
        (tl.Branch(None, embedding), 0),
        (tl.Serial(tl.Swap(), tl.Parallel(None, embedding)), 0),
        (tl.Serial(tl.AssertShape('bd,bl'), tl.Parallel(None, embedding)), 1),
    ):
        assert embeddings(net) == ((wanted, embedding),)


def test_a_shortcut_of_several_layers_is_a_series():
    x = floats(2, 3)
    net = tl.Residual(tl.Relu(), shortcut=[tl.Tanh(), tl.Relu()])
    assert net == tl.Residual(tl.Relu(), shortcut=tl.Serial(tl.Tanh(), tl.Relu()))
    np.testing.assert_allclose(run(net, x), relu(np.tanh(x)) + relu(x), rtol=1e-6)
    for nothing in (None, [], ()):
        assert tl.Residual(tl.Relu(), shortcut=nothing) == tl.Residual(tl.Relu())
    with pytest.raises(TypeError, match='Residual is made of layers, got 3'):
        tl.Residual(tl.Relu(), shortcut=[3])


@pytest.mark.parametrize(
    ('shortcut', 'n'), [([tl.Dup()], 2), (tl.Drop(), 0), (tl.Branch(None, None, tl.Tanh()), 3)]
)
def test_a_shortcut_of_several_values_is_refused_when_it_is_written(shortcut, n):
    text = f'Residual: its shortcut must leave the one value that is added to, it leaves {n}: end'
    with pytest.raises(ValueError, match=text):
        tl.Residual(tl.Relu(), shortcut=shortcut)
    with pytest.raises(ValueError, match=text):
        tl.Residual(tl.Relu(), shortcut=tl.Tanh()).replace(shortcut=tl.Serial(shortcut))
    x, y = floats(2, 3), floats(2, 3)
    joined = tl.Residual(tl.Relu(), shortcut=[tl.Dup(), tl.Add()])
    np.testing.assert_allclose(run(joined, x), 2 * np.asarray(x) + relu(x), rtol=1e-6)
    two = tl.Residual(tl.Relu(), shortcut=tl.Add())  # of two inputs one value
    np.testing.assert_allclose(run(two, x, y), np.asarray(x) + y + relu(x), rtol=1e-6)


# Flatten, LeakyRelu, PaddingMask, positions.


@pytest.mark.parametrize('first_axis', [2, 3])
def test_flatten_keeps_no_more_axes_than_there_are(first_axis):
    with pytest.raises(ValueError, match=rf'Flatten: there is no axis {first_axis} .* \(2, 3\)'):
        run(tl.Flatten(first_axis), floats(2, 3))
    assert run(tl.Flatten(2), floats(2, 3, 4)).shape == (2, 3, 4)
    assert run(tl.Flatten(2), floats(2, 3, 5, 7, 11)).shape == (2, 3, 385)


@pytest.mark.parametrize('first_axis', [1, 2])
@pytest.mark.parametrize('shape', [(), (2,), (2, 3)])
def test_what_flatten_proposes_can_be_done(first_axis, shape):
    x = floats(*shape)
    if first_axis < x.ndim:
        return
    with pytest.raises(ValueError, match='Flatten: there is no axis') as e:
        run(tl.Flatten(first_axis), x)
    *_, proposals = str(e.value).partition(': give ')[2].rpartition(': ')
    for proposal in proposals.removeprefix('give ').split(', or '):
        if proposal.startswith('first_axis'):
            assert x.ndim > 1
            run(tl.Flatten(x.ndim - 1), x)
        else:
            wider = eval(proposal.removeprefix('give '), {'x': x})
            np.testing.assert_array_equal(np.ravel(run(tl.Flatten(first_axis), wider)), x.ravel())


def test_a_slope_of_the_leak():
    x = np.array([-3, -0.5, 0, 2], np.float32)
    np.testing.assert_allclose(run(tl.LeakyRelu(0.2), x), np.where(x > 0, x, 0.2 * x), rtol=1e-6)
    np.testing.assert_allclose(run(tl.LeakyRelu(), x), np.where(x > 0, x, 0.01 * x), rtol=1e-6)
    assert (repr(tl.LeakyRelu()), repr(tl.LeakyRelu(0.2))) == ('LeakyRelu()', 'LeakyRelu(0.2)')
    assert tl.LeakyRelu(a=0.2) == tl.LeakyRelu(0.2) != tl.LeakyRelu() == tl.LeakyRelu(0.01)
    assert tl.activation('leaky_relu') == tl.LeakyRelu()


@pytest.mark.parametrize('dtype', ['int32', 'uint8'])
def test_a_mask_of_padding_is_true_where_ids_are_real(dtype):
    ids = np.array([[5, 3, 0, 0], [0, 7, 7, 0]], dtype)
    mask = run(tl.PaddingMask(), ids)
    assert mask.dtype == bool and mask.shape == (2, 4)
    assert (mask == (ids != 0)).all()
    assert (run(tl.PaddingMask(7), ids) == (ids != 7)).all()
    assert run(tl.PaddingMask(-100), ids).all()  # no id of an unsigned type is below 0


def test_a_mask_of_padding_takes_a_batch_of_ids():
    with pytest.raises(TypeError, match=r'PaddingMask takes token ids, integers, got float32\[2,4'):
        run(tl.PaddingMask(), floats(2, 4))
    with pytest.raises(ValueError, match=r'PaddingMask takes token ids \(batch, length\), got'):
        run(tl.PaddingMask(), np.zeros((2, 1, 1, 4), np.int32))


def test_a_mask_of_padding_hides_it_from_attention():
    attention = tl.SelfAttention(2, causal=False, masked=True)
    net = tl.Serial(tl.Branch(tl.Embedding(9, 8), tl.PaddingMask()), attention)
    ids = np.array([[5, 3, 2, 0, 0]], np.int32)
    weights, _ = net.init(signature_of(jnp.asarray(ids)), jax.random.key(0))
    padded = net.apply(weights, {}, (jnp.asarray(ids),))[0][0]
    alone = net.apply(weights, {}, (jnp.asarray(ids[:, :3]),))[0][0]
    np.testing.assert_allclose(padded[:, :3], alone, rtol=1e-5, atol=1e-6)


def waves(length, depth):
    """sin and cos of t·10000^(−2i/D), sines first."""
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, depth, 2) / depth)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


def test_trainable_sinusoids_begin_as_sinusoids_and_learn():
    layer = tl.SinusoidalPositions(max_len=6, trainable=True)
    x = floats(2, 5, 4)
    weights, state = layer.init(signature_of(x), jax.random.key(0))
    assert state == {} and list(weights) == ['table']
    np.testing.assert_allclose(weights['table'], waves(6, 4), atol=1e-6)
    np.testing.assert_allclose(layer.apply(weights, {}, (x,))[0][0], x + waves(5, 4), atol=1e-6)
    fixed = tl.SinusoidalPositions(max_len=6)
    np.testing.assert_allclose(run(fixed, x), run(layer, x), atol=1e-6)

    def loss(weights):
        return jnp.sum(layer.apply(weights, {}, (x,))[0][0] * x)

    wanted = np.concatenate([np.asarray(x).sum(0), np.zeros((1, 4))])
    np.testing.assert_allclose(jax.grad(loss)(weights)['table'], wanted, rtol=1e-5, atol=1e-6)


def test_trainable_sinusoids_decode_step_by_step():
    layer = tl.SinusoidalPositions(max_len=5, trainable=True)
    x = floats(2, 5, 4)
    weights = {'table': floats(5, 4)}  # as after training
    whole = layer.apply(weights, {}, (x,))[0][0]
    _, state = layer.init(signature_of(x), jax.random.key(0), Mode.PREDICT)
    pieces = []
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        (y,), state = layer.apply(weights, state, (x[:, begin:end],), mode=Mode.PREDICT)
        pieces.append(y)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    with pytest.raises(ValueError, match='max_len=5: shorten it, or make'):
        layer.apply(weights, state, (x[:, :1],), mode=Mode.PREDICT)
    with pytest.raises(ValueError, match='a table of max_len rows: give max_len'):
        tl.SinusoidalPositions(trainable=True)


# AssertShape.


def test_shapes_on_the_stack_are_checked_and_left_as_they_are():
    layer = tl.AssertShape('bld,b')
    assert (layer.n_in, layer.n_out) == (2, 2)
    x, y = floats(2, 3, 4), floats(2)
    for got, wanted in zip(run(layer, x, y), (x, y), strict=True):
        assert got is wanted or (got == wanted).all()
    with pytest.raises(ValueError, match=r"value 2 should fit 'b': 'b' is 3 and should be 2"):
        run(layer, x, floats(3))
    with pytest.raises(ValueError, match='there should be 3 axes, there are 2'):
        run(layer, floats(2, 3), y)


def test_shapes_in_and_out_of_a_layer_are_checked():
    x, y = floats(2, 3, 4), floats(2)
    good = tl.AssertShape('bld,b->bd', tl.Serial(tl.Mean(), tl.Swap(), tl.Drop()))
    np.testing.assert_allclose(run(good, x, y), np.asarray(x).mean(1), rtol=1e-6)
    wrong = tl.AssertShape('bld,b->bl', tl.Serial(tl.Mean(), tl.Swap(), tl.Drop()))
    with pytest.raises(
        ValueError,
        match=r"AssertShape\('bld,b->bl'\): the outputs of Serial are float32\[2,4\]; value 1 "
        r"should fit 'bl': 'l' is 4 and should be 3",
    ):
        run(wrong, x, y)


@pytest.mark.parametrize(
    ('layer', 'inputs', 'text'),
    [
        (tl.AssertShape('bd,b'), 1, 'AssertShape takes 2 values off the stack, only 1 was there'),
        (tl.AssertShape('bd,b'), 3, 'AssertShape takes 2 values off the stack, 3 were there'),
        (tl.AssertShape('bd->bd', tl.Dense()), 2, 'AssertShape takes 1 value .* 2 were there'),
        (tl.AssertShape('bd,bd->bd', tl.Add()), 0, 'AssertShape takes 2 values .* only 0 were'),
        (tl.Serial(tl.Dense(6), tl.AssertShape('bd,bd')), 1, 'AssertShape takes 2 .* only 1 was'),
    ],
)
def test_too_few_or_too_many_values_to_check_are_counted(layer, inputs, text):
    signature = (shape_dtype((2, 4)),) * inputs
    for call in (
        lambda: layer.init(signature, jax.random.key(0)),
        lambda: Model(layer).init(signature),
        lambda: layer.output_signature(signature),
    ):
        with pytest.raises(TypeError, match=text):
            call()


def test_one_axis_is_one_and_one_value_too():
    with pytest.raises(ValueError, match=r"'b': there should be 1 axis, there are 2"):
        run(tl.AssertShape('b'), floats(2, 3))
    with pytest.raises(ValueError, match='there should be at least 2 axes, there is 1'):
        run(tl.AssertShape('b...d'), floats(2))
    with pytest.raises(ValueError, match='there should be at least 1 axis, there are 0'):
        run(tl.AssertShape('...d'), floats())
    with pytest.raises(ValueError, match='describes 2 values that Mean takes, there is 1'):
        tl.AssertShape('b,c->b', tl.Mean())
    with pytest.raises(ValueError, match='describes 1 value that Add takes, there are 2'):
        tl.AssertShape('b->b', tl.Add())


def reversible(half, *checks):
    return tl.Serial(
        tl.Dup(), tl.ReversibleSerial(*checks, half, tl.ReversibleSwap(), *checks), tl.Add()
    )


def test_assertions_stand_among_reversible_layers():
    half = tl.ReversibleHalfResidual(tl.Dense(4), tl.Tanh())
    plain = reversible(half)
    spec = 'bd,bd->bd,bd'
    checked = reversible(tl.AssertShape(spec, half), tl.AssertShape('bd,bd'))
    inside = tl.AssertShape(spec, tl.ReversibleSerial(half, tl.ReversibleSwap()))
    repeated = tl.Serial(tl.Dup(), tl.ReversibleRepeat(inside, 1), tl.Add())
    x = floats(3, 4)
    weights, _ = plain.init(signature_of(x), jax.random.key(0))

    def slopes(net, weights):
        def loss(weights, x):
            return jnp.sum(net.apply(weights, {}, (x,), mode=Mode.TRAIN)[0][0] ** 2)

        return jax.grad(loss, (0, 1))(weights, x)

    def by_hand(weights, x):
        w = jax.tree.leaves(weights)
        return jnp.sum((2 * x + jnp.tanh(x @ w[1] + w[0])) ** 2)

    wanted = jax.grad(by_hand, (0, 1))(weights, x)
    for net in (plain, checked):
        for got, should in zip(
            jax.tree.leaves(slopes(net, weights)), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_allclose(got, should, rtol=1e-5, atol=1e-6)
    stacked, _ = repeated.init(signature_of(x), jax.random.key(0))
    leaves = [w[None] for w in jax.tree.leaves(weights)]
    stacked = jax.tree.unflatten(jax.tree.structure(stacked), leaves)
    for got, should in zip(
        jax.tree.leaves(slopes(repeated, stacked)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got.reshape(should.shape), should, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r'value 1 should fit .*should be'):
        run(reversible(half, tl.AssertShape('bb,bd')), x)


@pytest.mark.parametrize('make', [tl.ReversibleSerial, lambda x: tl.ReversibleRepeat(x, 2)])
def test_an_assertion_does_not_make_a_layer_reversible(make):
    with pytest.raises(TypeError, match='Swap is not reversible: put it into a ReversibleHalf'):
        make(tl.AssertShape('bd,bd->bd,bd', tl.Swap()))


def test_an_assertion_at_the_end_takes_no_gradient_from_the_layer_before_it():
    assert tl.is_diagonal(tl.AssertShape('bd')) and not tl.is_diagonal(tl.AssertShape('bd,b'))
    assert tl.is_diagonal(tl.AssertShape('bd->bd', tl.Dropout(0.5)))
    assert not tl.is_diagonal(tl.AssertShape('bd->bd', tl.Dense()))
    dropout = tl.Dropout(0.5, name='dropout')
    plain = tl.Residual(tl.Dense(4), dropout)
    checked = tl.Residual(tl.Dense(4), tl.AssertShape('bd->bd', dropout), tl.AssertShape('bd'))
    x, ct, key = floats(3, 4), floats(3, 4), jax.random.key(1)
    weights, _ = plain.init(signature_of(x), jax.random.key(0))
    results = [
        tl.one_pass(net, weights, {}, (x,), (ct,), rng=jax.random.clone(key))
        for net in (plain, checked)
    ]
    for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ('spec', 'fits'),
    [
        ('bhlk,bhmk,bhmk->bhlk', True),
        ('bhlk,bgmk,bgmk->bhlk', True),
        ('...lk,...mk,...mk->...lk', True),
        ('b2lk,b2mk,b2mk->b2lk', False),
        ('bhlh,bhmh,bhmh->bhlh', False),
        ('bh...,bhmk,bhmk->bhlk', False),
    ],
)
def test_an_assertion_about_attention_goes_a_head_at_a_time_if_it_fits_one(spec, fits):
    plain = tl.SelfAttention(2)
    checked = plain.replace(core=tl.AssertShape(spec, plain.core))
    assert (tl.by_head(checked.core, {}) is not None) == fits
    x, ct = floats(2, 5, 4), floats(2, 5, 4)
    weights, state = plain.init(signature_of(x), jax.random.key(0))
    got = tl.one_pass(checked, weights, state, (x,), (ct,), rng=jax.random.key(1))
    wanted = tl.one_pass(plain, weights, state, (x,), (ct,), rng=jax.random.key(1))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_assertion_about_a_projection_has_its_heads():
    plain = tl.SelfAttention(2)
    checked = plain.replace(query=tl.AssertShape('bld->bhlk', plain.query))
    x = floats(2, 5, 4)
    weights, _ = plain.init(signature_of(x), jax.random.key(0))
    assert tl.by_head(checked.query, weights['query'])['kernel'].shape == (2, 4, 1, 2)
    got = tl.one_pass(checked, weights, {}, (x,), (x,), rng=jax.random.key(1))
    wanted = tl.one_pass(plain, weights, {}, (x,), (x,), rng=jax.random.key(1))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positions_that_mix_inside_an_assertion_are_not_cut():
    for layer in (tl.SelfAttention(2), tl.SinusoidalPositions(), tl.Dropout(0.1, (1,))):
        checked = tl.AssertShape('bld->bld', layer)
        assert checked.position_wise == layer.position_wise
        with pytest.raises(TypeError, match='mixes positions'):
            tl.Chunk(checked, 2)


@pytest.mark.parametrize(
    ('spec', 'shapes', 'fits'),
    [
        ('...d', [(4,)], True),
        ('...d', [()], False),
        ('...d,...d', [(2, 3, 4), (2, 3, 4)], True),
        ('...d,...e', [(2, 3, 4), (2, 3, 5)], True),
        ('...d,...e', [(2, 3, 4), (3, 5)], False),
        ('b...d', [(2, 4)], True),
        ('b...b', [(2, 5, 3)], False),
        ('b11l', [(2, 1, 1, 6)], True),
        ('b11l', [(2, 2, 1, 6)], False),
        ('bb', [(2, 3)], False),
        ('bB', [(2, 3)], True),
        ('b,', [(2,), ()], True),
        ('b,', [(2,), (1,)], False),
        ('b l d', [(2, 3, 4)], True),
    ],
)
def test_what_the_language_of_shapes_says(spec, shapes, fits):
    values = [floats(*shape) for shape in shapes]
    if fits:
        run(tl.AssertShape(spec), *values)
    else:
        with pytest.raises(ValueError, match='AssertShape'):
            run(tl.AssertShape(spec), *values)


@pytest.mark.parametrize(
    ('make', 'text'),
    [
        (lambda: tl.AssertShape('bld->bd'), r'has an arrow, so it is about a layer: .*AssertShape'),
        (lambda: tl.AssertShape('bld', tl.Mean()), 'says nothing of outputs: write inputs->'),
        (lambda: tl.AssertShape('b,c->b', tl.Mean()), 'describes 2 values that Mean takes, there'),
        (lambda: tl.AssertShape('b->b,c', tl.Mean()), 'describes 2 values that Mean puts back, th'),
        (lambda: tl.AssertShape('b_d'), r"cannot be read at 'b_d': a value is letters"),
        (lambda: tl.AssertShape('b...l...'), 'cannot be read'),
        (lambda: tl.AssertShape('b->d->e', tl.Mean()), 'cannot be read'),
    ],
)
def test_a_language_that_cannot_be_read_is_refused_when_it_is_written(make, text):
    with pytest.raises(ValueError, match=text):
        make()
    with pytest.raises(TypeError, match='spec must be a str'):
        tl.AssertShape(3)


def test_an_assertion_adds_no_level_and_letters_mean_something_new_at_each_call():
    plain = tl.Serial(tl.Embedding(9, 4), tl.SelfAttention(2), tl.Dense(9))
    checked = tl.Serial(
        tl.AssertShape('bl'),
        tl.AssertShape('bl->bld', tl.Embedding(9, 4)),
        tl.AssertShape('bld->bld', tl.SelfAttention(2)),
        tl.AssertShape('...d->...v', tl.Dense(9)),
    )
    signature = (shape_dtype((2, 5), 'int32'),)
    weights, _ = plain.init(signature, jax.random.key(0))
    paths = trees.flatten(checked.init(signature, jax.random.key(0))[0])
    assert list(paths) == list(trees.flatten(weights))
    ids = jnp.asarray(made.integers(0, 9, (2, 5)), jnp.int32)
    whole = plain.apply(weights, {}, (ids,))[0][0]
    _, state = checked.init(signature, jax.random.key(0), Mode.PREDICT)
    parts = []
    for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
        (y,), state = checked.apply(weights, state, (piece,), mode=Mode.PREDICT)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_an_assertion_forwards_the_gradient_of_its_layer():
    layer = tl.AssertShape('bd->be', tl.Serial(tl.Dense(3), tl.Tanh()))
    x, ct = floats(2, 4), floats(2, 3)
    weights, _ = layer.init(signature_of(x), jax.random.key(0))
    got = tl.one_pass(layer, weights, {}, (x,), (ct,))
    wanted = tl.one_pass(layer.layer, weights, {}, (x,), (ct,))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_assertion_stays_where_a_loss_is_attached_in_pieces():
    net = tl.Serial(tl.Embedding(9, 4), tl.AssertShape('bld->blv', tl.Dense(9)))
    layer = losses.attach(net, tl.CrossEntropyLoss(), 3)
    ids = jnp.asarray(made.integers(0, 9, (2, 7)), jnp.int32)
    batch = ids, ids, jnp.ones((2, 7))
    weights, _ = layer.init(signature_of(batch), jax.random.key(0))
    values = layer.apply(weights, {}, batch)[0][0]
    logits = net.apply(weights, {}, (ids,))[0][0]
    np.testing.assert_allclose(values, tl.cross_entropy(logits, ids), rtol=1e-5)


# What the values meet: no shape is broadcast without a word.


@pytest.mark.parametrize(
    'make',
    [
        lambda: tl.Mean(masked=True),
        functools.partial(tl.SelfAttention, 2, causal=False, masked=True),
        functools.partial(tl.LocalSelfAttention, 2, 2, masked=True),
        functools.partial(tl.LSHSelfAttention, 2, chunk_len=2, n_buckets=2, masked=True),
    ],
    ids=['mean', 'attention', 'local', 'lsh'],
)
@pytest.mark.parametrize(
    ('mask', 'text'),
    [
        (np.ones((2, 4), np.float32), r'got float32\(2, 4\): True where a position is real'),
        (np.ones((2, 4), np.int32), r'got int32\(2, 4\): True where .* e.g. mask != 0'),
        (np.ones((2, 1, 1, 4), bool), r'got bool\(2, 1, 1, 4\): give mask\[:, 0, 0\]'),
        (np.ones((2, 1), bool), r'got bool\(2, 1\): one entry a position'),
        (np.ones((1, 4), bool), r'got bool\(1, 4\): .*np.broadcast_to\(mask, \(2, 4\)\)'),
        (np.ones(4, bool), r'got bool\(4,\): one entry'),
    ],
    ids=['float', 'integer', 'four axes', 'one a row', 'one row', 'no rows'],
)
def test_a_mask_is_boolean_and_has_one_entry_a_position(make, mask, text):
    with pytest.raises(ValueError, match=r'mask must be bool\(2, 4\), ' + text):
        run(make(), floats(2, 4, 4), mask)


def test_a_gate_is_no_outer_product():
    x = floats(2, 4, 8)
    for gate in (x[..., :1], x[:, :1], floats(1, 1, 8)):
        np.testing.assert_array_equal(run(tl.Multiply(), x, gate), np.asarray(x) * gate)
        np.testing.assert_array_equal(run(tl.Multiply(), gate, x), np.asarray(x) * gate)
    for a, b in ((x[:, :1], x[..., :1]), (x, x[0]), (x, x[0, 0]), (x, x[0, 0, 0])):
        with pytest.raises(ValueError, match='Multiply: cannot multiply'):
            run(tl.Multiply(), a, b)


def test_a_residual_is_no_broadcast_in_any_pass():
    net = tl.Residual(tl.Fn('Mean', lambda x: x.mean(1, keepdims=True)))
    x = floats(2, 4, 8)
    with pytest.raises(ValueError, match=r'Add: cannot add \(2, 1, 8\) to \(2, 4, 8\)'):
        net.apply({}, {}, (x,))
    with pytest.raises(ValueError, match='VJP'):
        tl.one_pass(net, {}, {}, (x,), (x,))


def test_queries_and_keys_of_two_shapes_are_not_rotated():
    q = floats(2, 4, 6, 8)
    assert [y.shape for y in run(tl.RotaryPositions(), q, q[:, :2])] == [q.shape, (2, 2, 6, 8)]
    for k in (q[:1], q[:, :, :1], q[..., :2], q[0]):
        with pytest.raises(ValueError, match=r'RotaryPositions takes q and k .* agree in all b'):
            run(tl.RotaryPositions(), q, k)
    with pytest.raises(ValueError, match=r'RotaryPositions takes queries \(batch, heads, length'):
        run(tl.RotaryPositions(), q[0], q[0])


@pytest.mark.parametrize(
    'layer',
    [
        tl.Dense(3),
        tl.LayerNorm(),
        tl.RMSNorm(),
        tl.BatchNorm(),
        tl.Conv1D(3),
        tl.SRU(),
        tl.LSTM(),
        tl.GRU(3),
        tl.LearnedPositions(4),
        tl.SinusoidalPositions(max_len=4, trainable=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_integers_into_a_model_of_floats_are_not_cut_to_integers(layer):
    weights, state = layer.init((shape_dtype((2, 4, 8)),), jax.random.key(0))
    with pytest.raises(
        TypeError, match=r'made for floating-point inputs, got int32\[2,4,8\]: conv'
    ):
        layer.apply(weights, state, (jnp.ones((2, 4, 8), jnp.int32),))


@pytest.mark.parametrize('layer', [tl.Softmax(), tl.LogSoftmax()])
def test_a_softmax_of_integers_is_not_all_zeros(layer):
    name = type(layer).__name__
    text = rf'{name} takes floating-point vectors .*, got .*: convert scores or counts, x.astype'
    for dtype in (np.int32, np.uint8, bool):
        with pytest.raises(TypeError, match=text):
            run(layer, np.ones((2, 3), dtype))


@pytest.mark.parametrize('layer', [tl.Softmax(), tl.LogSoftmax(), tl.Dense(2), tl.LayerNorm()])
def test_a_number_and_what_is_complex_are_not_told_to_embed_integers(layer):
    with pytest.raises(TypeError, match=r'got float32\[\]: add an axis, x\[None\]'):
        run(layer, np.float32(1))
    with pytest.raises(TypeError, match=r'got complex64\[2,3\]: give real numbers'):
        run(layer, np.ones((2, 3), np.complex64))


def test_what_is_looked_up_is_integers_at_every_call():
    layer = tl.Embedding(9, 4)
    weights, _ = layer.init((shape_dtype((2, 3), 'int32'),), jax.random.key(0))
    for dtype in (bool, np.float32):
        with pytest.raises(TypeError, match='Embedding takes integers, got'):
            layer.apply(weights, {}, (jnp.ones((2, 3), dtype),))


@pytest.mark.parametrize('layer', [tl.Mean(3), tl.Mean(-4), tl.Split(2, 3)])
def test_an_axis_that_is_not_there_is_named(layer):
    with pytest.raises(
        ValueError, match=rf'there is no axis {layer.axis} in the shape \(2, 3, 4\)'
    ):
        run(layer, floats(2, 3, 4))


def test_a_selection_takes_no_negative_number_of_values():
    with pytest.raises(ValueError, match='Select: indices'):
        tl.Select([], n_in=-1)
