"""Optimizers take the axes of weights from the layers, and guess nothing from names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import models, optimizers, supervised, tl, trees
from layercomb.optimizers.tensors import by_tensor, decayed, matrices, tensors

RAGGED = lc.signature_of(jax.ShapeDtypeStruct((1, 16), jnp.int32))
STREAM = lc.signature_of(jax.ShapeDtypeStruct((2, 5, 8), jnp.float32))
IMAGES = lc.signature_of(jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
SIZES = {'d_model': 16, 'd_ff': 32, 'n_heads': 2, 'max_len': 16}
SPARSE = {'ff_block_size': 4, 'qkv_modules': 2, 'head_modules': 2}
LAYERS = {'n_encoder_layers': 2, 'n_decoder_layers': 2}

SHIPPED = {
    'MLP': (lambda: models.MLP((4, 5), 3), STREAM),
    'RevNet': (lambda: models.RevNet(widths=(4, 8), n_blocks=(2, 1)), IMAGES),
    'TransformerLM': (lambda: models.TransformerLM(11, n_layers=2, **SIZES), RAGGED),
    'TransformerEncoder': (lambda: models.TransformerEncoder(11, 3, n_layers=2, **SIZES), RAGGED),
    'ReformerLM': (lambda: models.ReformerLM(11, n_layers=2, chunk_len=4, **SIZES), RAGGED),
    'Reformer': (lambda: models.Reformer(11, **LAYERS, **SIZES), RAGGED * 2),
    'TerraformerLM': (lambda: models.TerraformerLM(11, n_layers=2, **SIZES, **SPARSE), RAGGED),
    'Terraformer': (lambda: models.Terraformer(11, **LAYERS, **SIZES, **SPARSE), RAGGED * 2),
    'mixtures': (
        lambda: tl.Repeat(
            tl.Serial(
                tl.Residual(tl.SwitchFF(8, 2)),
                tl.Residual(tl.BlockSparseFF(8, 2)),
                tl.Residual(tl.MixtureFF(8, 4, 2)),
            ),
            2,
        ),
        STREAM,
    ),
    'SRU': (lambda: tl.Repeat(tl.Serial(tl.SRU(), tl.Conv1D(8), tl.LocalConv(2)), 2), STREAM),
}


def init(net, signature=STREAM):
    return jax.eval_shape(lambda key: net.init(signature, key)[0], jax.random.key(0))


def by_names(path, ndim):
    """What optimizers took for rows and columns until layers declared them."""
    *above, leaf = path.split('/')
    layer = above[-1] if above and leaf == 'kernel' and ndim > 2 else ''
    if leaf == 'kernel_transposed':
        return (ndim - 1,), (ndim - 2,)
    if layer in ('query', 'key', 'value'):
        return (ndim - 3,), (ndim - 2, ndim - 1)
    if layer == 'output':
        return (ndim - 3, ndim - 2), (ndim - 1,)
    if layer.startswith('local_conv'):
        return (ndim - 4, ndim - 3, ndim - 2), (ndim - 1,)
    return (ndim - 2,), (ndim - 1,)


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_models_move_as_they_did_when_optimizers_went_by_names(name):
    make, signature = SHIPPED[name]
    net = make()
    weights = init(net, signature)
    found = tensors('muon', net, weights)
    assert all(its.is_declared for its in found.values())
    for path, x in trees.flatten(weights).items():
        its, (*above, leaf) = found[path], path.split('/')
        rows, columns = by_names(path, x.ndim) if x.ndim > 1 else ((), ())
        by_muon = leaf in ('kernel', 'kernel_transposed') and 'head' not in above
        numbers = trees.get(matrices(found, weights), path)
        assert numbers == ((rows, columns) if by_muon else None)
        of_mixtures = {'sparse_ff', 'mixture_ff'} & {*above}
        of_units = of_mixtures and not {'controller', 'router'} & {*above}
        assert its.has_chosen_rows == bool(by_muon and of_units)
        if leaf in ('bias', 'scale'):
            assert (its.first, its.second) == ((), (x.ndim - 1,))
        else:
            assert {its.first, its.second} == {rows, columns}
    assert decayed(net, weights) == trees.decay_mask(weights)


def one_step(optimizer, weights):
    """What one step adds, of gradients that differ from layer to layer."""
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), weights)
    with jax.numpy_dtype_promotion('standard'):
        return optimizer.update(grads, optimizer.init(weights), weights)[0]


@pytest.mark.parametrize('make', [optimizers.muon, optimizers.adafactor])
@pytest.mark.parametrize('name', ['query', 'output', 'key', 'local_conv'])
def test_a_dense_layer_is_one_by_whatever_name(make, name):
    moved = []
    for called in (name, 'plain'):
        net = tl.Repeat(tl.Serial(tl.Residual(tl.Dense(name=called))), 3)
        weights = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), init(net))
        step = one_step(make(0.1, net=net), weights)
        moved.append(trees.get(step, f'residual/{called}/kernel'))
    np.testing.assert_array_equal(*moved)


class Own(lc.Layer):
    """Heads' kernels under a name of its own, and a bias that is a matrix."""

    def init(self, signature, rng, mode=lc.Mode.TRAIN):
        d = signature[0].shape[-1]
        return {
            'mixing': jax.random.normal(rng, (d, 2, d // 2), jnp.float32),
            'bias': jnp.ones((d, d), jnp.float32),
            'gain': jnp.ones(d, jnp.float32),
        }, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=lc.Mode.EVAL):
        (x,) = inputs
        y = jnp.einsum('bld,dhk->blhk', x, weights['mixing']).reshape(x.shape)
        return (jnp.einsum('bld,df->blf', y, weights['bias']) * weights['gain'][None, None],), state


class Declared(Own):
    weight_axes = {'mixing': 'D->HK', 'bias': 'D->F', 'gain': '->D'}


@pytest.mark.parametrize('around', [lambda layer: layer, lambda layer: tl.Repeat(layer, 2)])
def test_a_layer_of_ones_own_that_declares_is_moved_as_it_says(around):
    net = around(Declared())
    weights, _ = net.init(STREAM, jax.random.key(0))
    moved = one_step(optimizers.muon(1.0, net=net), weights)
    for path in ('mixing', 'bias'):
        values = np.linalg.svd(np.asarray(moved[path]).reshape(-1, 8, 8), compute_uv=False)
        assert values.max() < 1.6 and np.median(values) > 0.7  # what is nearly 0 stays smaller
    assert np.ptp(np.abs(moved['gain'])) < 1e-3  # Adam's first step is the same everywhere


def test_what_is_decayed_is_what_is_no_vector():
    weights, _ = Declared().init(STREAM, jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    for make in (optimizers.adamw, optimizers.adafactor):
        optimizer = make(0.1, weight_decay=0.5, net=Declared())
        with jax.numpy_dtype_promotion('standard'):
            moved, _ = optimizer.update(zeros, optimizer.init(weights), weights)
        np.testing.assert_allclose(moved['bias'], -0.05, rtol=1e-6)
        assert not moved['gain'].any() and moved['mixing'].any()
    # Without a declaration names decide, as they do without a model.
    wanted = {'mixing': True, 'bias': False, 'gain': True}
    assert decayed(Own(), weights) == decayed(None, weights) == wanted


class Stacking(tl.Wrapper):
    """A wrapper of one's own that stacks weights, as `Repeat` does, and does not say so."""

    def init(self, signature, rng, mode=lc.Mode.TRAIN):
        return jax.vmap(lambda key: self.layer.init(signature, key, mode))(jax.random.split(rng, 3))


class Said(Stacking):
    stacked_axes = 1


class Scaled(tl.Serial, init=False):
    """A combinator with a weight of its own."""

    def init_with_outputs(self, signature, rng, mode):
        outputs, weights, state = super().init_with_outputs(signature, rng, mode)
        return outputs, {**weights, 'by': jnp.ones((2, 2))}, state


def test_wrappers_and_combinators_of_ones_own():
    for net in (Stacking(tl.Dense()), Scaled(tl.Dense())):
        weights = init(net)
        assert decayed(net, weights) == trees.decay_mask(weights)  # which needs no number of axes
    with pytest.raises(ValueError, match='a wrapper that stacks weights stacked_axes = 1'):
        tensors('muon', Stacking(tl.Dense()), init(Stacking(tl.Dense())))
    assert lc.axes(Said(tl.Dense()), init(Said(tl.Dense())))['kernel'] == lc.Axes('D->F', 1)
    with pytest.raises(ValueError, match=r"no weight 'by': .* in weight_axes of Scaled"):
        tensors('muon', Scaled(tl.Dense()), init(Scaled(tl.Dense())))


@pytest.mark.parametrize('make', [optimizers.muon, optimizers.adafactor])
def test_a_layer_of_ones_own_that_does_not_declare_is_refused_with_the_line_to_add(make):
    net = tl.Serial(tl.LayerNorm(), Own(name='mine'))
    weights, _ = net.init(STREAM, jax.random.key(0))
    said = r"Own does not declare .* 'bias', \(8, 8\): add a line such as weight_axes = {'bias': 'D"
    with pytest.raises(TypeError, match=said):
        make(0.1, net=net).init(weights)
    vectors = {'mine': {'gain': weights['mine']['gain']}}
    assert one_step(make(0.1, net=net), vectors)['mine'][
        'gain'
    ].all()  # which is no matter of doubt


def test_a_vector_without_declaration_is_one_for_each_layer_of_a_stack():
    net = tl.Repeat(tl.Serial(Own()), 3)
    weights = {'own': {'gain': jnp.ones((3, 8))}}
    state = optimizers.adafactor(net=net).init(weights)
    shapes = {x.shape for x in jax.tree.leaves(state.inner_state[0]) if x.size == 3 * 8}
    assert shapes == {(3, 8)}
    with pytest.raises(TypeError, match="Own does not declare the axes of its weight 'mixing'"):
        tensors('muon', net, {'own': {'mixing': jnp.ones((3, 8, 2, 4))}})


@pytest.mark.parametrize('make', [optimizers.muon, optimizers.adafactor])
def test_without_a_model_only_vectors_are_known(make):
    said = rf"optimizers.{make.__name__} has to know the model, .*'kernel' \(2, 2\) are: say .*net="
    with pytest.raises(ValueError, match=said):
        make(0.1).init({'kernel': jnp.ones((2, 2))})
    assert one_step(make(0.1), {'bias': jnp.ones(3)})['bias'].all()


def loop(optimizer, **task):
    batch = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)
    train_task = supervised.TrainTask([batch] * 9, tl.CrossEntropyLoss(), optimizer, **task)
    return supervised.Loop(tl.Dense(2), train_task, progress=False)


@pytest.mark.parametrize('make', [optimizers.muon, optimizers.adafactor])
def test_a_loop_tells_the_model_and_inside_others_net_does(make):
    kernels = []
    for optimizer, task in (
        (make(0.1), {}),
        (make(0.1), {'clip_norm': 1e9}),
        (optax.chain(optax.clip(1e9), make(0.1, net=tl.Dense(2))), {}),
        (optax.MultiSteps(make(0.1, net=tl.Dense(2)), 1).gradient_transformation(), {}),
    ):
        trained = loop(optimizer, **task)
        trained.run(3)
        kernels.append(np.asarray(trained.weights['kernel']))
    for kernel in kernels[1:]:
        np.testing.assert_allclose(kernel, kernels[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r'has to know the model.*not inside another one'):
        loop(optax.chain(optax.clip(1.0), make(0.1)))


def test_a_part_of_a_model_can_have_an_optimizer_of_its_own():
    net = tl.Serial(tl.Dense(4, name='a'), tl.Dense(4, name='b'))
    weights, _ = net.init(STREAM, jax.random.key(0))
    parts = {'muon': optimizers.muon(1.0, net=net), 'sgd': optax.sgd(0.0)}
    optimizer = optax.multi_transform(parts, {'a': 'muon', 'b': 'sgd'})
    moved = one_step(optimizer, weights)
    assert moved['a']['kernel'].all() and not moved['b']['kernel'].any()


def test_loops_of_one_task_and_model_share_a_compiled_step():
    optimizer = optimizers.muon(0.1)
    assert optimizers.bound(optimizer, tl.Dense(2)) == optimizers.bound(optimizer, tl.Dense(2))
    assert optimizers.bound(optimizer, tl.Dense(2)) != optimizers.bound(optimizer, tl.Dense(3))
    plain = optax.sgd(0.1)
    assert optimizers.bound(plain, tl.Dense(2)) is plain


def test_injecting_hyperparameters_again_is_refused_in_words():
    with pytest.raises(TypeError, match='what changes is injected here: leave out inject_hyper'):
        optax.inject_hyperparams(optimizers.muon)(0.1).init({'bias': jnp.ones(2)})


def test_by_tensor_takes_scalars_vectors_and_matrices_apart():
    shapes = []

    def note(weights):
        shapes.append(weights.shape)
        return ()

    noting = optax.GradientTransformation(note, lambda grads, state, _: (grads, state))
    weights = {'a': jnp.zeros((2, 3, 4, 5)), 'b': jnp.zeros((2, 3)), 'c': jnp.zeros(2)}
    found = {
        'a': lc.Axes('E|D->F', stacked=1),
        'b': lc.Axes('->F', stacked=1),
        'c': lc.Axes('->', stacked=1),
    }
    by_tensor(noting, lambda _: found).init(weights)
    assert shapes == [(4, 5), (3,), ()]
