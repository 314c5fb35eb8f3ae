"""Models that use more of their units, and training that begins with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb import shape_dtype, supervised, tl, transforms, trees
from layercomb.errors import UsageError
from layercomb.layers.core.mode import Mode

V, D = 11, 8


def lm(ff):
    return tl.Serial(tl.Embedding(V, D), tl.Residual(tl.RMSNorm(), ff), tl.Dense(V))


def batches(n=64, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, V, (n, 2, 6)).astype(np.int32)
    return [(x, np.roll(x, -1, 1), np.ones(x.shape, np.float32)) for x in tokens]


def task(**given):
    return supervised.TrainTask(batches(), tl.CrossEntropyLoss(), optax.sgd(0.3), **given)


def test_chooses_more_with_the_same_weights():
    mixture = tl.MixtureFF(32, 16, 2, 1)
    dense = transforms.denser(mixture, 100)
    assert (dense.n_chosen, dense.n_shared) == (15, 1)
    assert transforms.denser(mixture, 3).n_chosen == 6
    assert transforms.denser(tl.SparseFF(32, 16), 4).block_size == 4
    made = [layer.init((shape_dtype((1, D)),), jax.random.key(0))[0] for layer in (mixture, dense)]
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_reaches_what_is_inside_and_leaves_the_rest():
    net = lm(tl.Repeat(tl.Residual(tl.MixtureFF(32, 16, 2)), 2))
    found = transforms.denser(net, 2)
    assert found == lm(tl.Repeat(tl.Residual(tl.MixtureFF(32, 16, 4)), 2))


def test_layers_of_ones_own_take_part():
    class Top(tl.Layer):
        n_chosen: int = 1

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            return inputs, state

    transforms.chosen_more.register(Top, lambda top, factor: top.replace(n_chosen=factor))
    assert transforms.denser(tl.Serial(Top()), 3) == tl.Serial(Top(3))


@pytest.mark.parametrize(
    ('net', 'factor', 'error', 'text'),
    [
        (tl.Dense(3), 2, ValueError, 'this Dense has no layer that chooses units: give it a'),
        (tl.SparseFF(32, 16), 3, ValueError, 'factor=3 does not divide block_size=16 of SparseFF'),
        (tl.MixtureFF(32, 16, 2), 0, ValueError, 'factor must be at least 1, got 0'),
    ],
)
def test_refusals(net, factor, error, text):
    with pytest.raises(error, match=text):
        transforms.denser(net, factor)


@pytest.mark.parametrize(
    ('given', 'error'),
    [
        (((4, 2), (4, 1)), ValueError),
        (((0, 2),), ValueError),
        ((4, 2), TypeError),
        (((4, 2, 1),), TypeError),
        (((4, 2.0),), TypeError),
        (((True, 2),), TypeError),
        ({4: 2}, TypeError),
        (None, TypeError),
    ],
)
def test_stages_that_cannot_be(given, error):
    with pytest.raises(
        error, match=r'TrainTask: denser=.*: give pairs \(step, factor\) of integers'
    ):
        task(denser=given)


def test_stages_may_be_lists_of_numbers_of_numpy():
    assert task(denser=[[np.int64(4), 2], [8, 1]]).denser == ((4, 2), (8, 1))


def test_units_of_sparse_layers_train_denser_with_the_controller_of_the_model():
    net = tl.Serial(tl.Embedding(V, 64), tl.Residual(tl.SparseFF(64, 16)), tl.Dense(V))
    loop = supervised.Loop(net, task(denser=((2, 8),)), progress=False)
    before = jax.tree.map(np.array, loop.weights)
    loop.run(3)
    assert jax.tree.map(jnp.shape, loop.weights) == jax.tree.map(jnp.shape, before)
    assert before['residual']['sparse_ff']['controller']['in']['kernel'].shape == (64, 16)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, loop.weights)
    assert all(jax.tree.leaves(moved))


def test_wrappers_keep_what_they_hold():
    net = lm(tl.MixtureFF(32, 16, 2))
    weights, _ = net.init((shape_dtype((2, 6), 'int32'),), KEY)
    twice = transforms.denser(net, 2)
    quantized, narrow = transforms.quantize(net, weights, 8, smallest=1)
    assert transforms.denser(quantized, 2) == transforms.quantize(twice, weights, 8, smallest=1)[0]
    tokens = jnp.asarray(batches()[0][0])
    (y,), _ = jax.jit(transforms.denser(quantized, 2).apply)(narrow, {}, (tokens,))
    assert y.shape == (2, 6, V)
    assert transforms.denser(transforms.fuse(net), 2) == transforms.fuse(twice)
    assert transforms.denser(transforms.cast(net), 2) == transforms.cast(twice)


def by_hand(net, stages):
    """The weights after each stage, trained as models of their own that hand weights on."""
    optimizer = optax.sgd(0.3)  # Adam would enlarge rounding errors
    weights, state = jax.jit(net.init)((shape_dtype((2, 6), 'int32'),), KEY)
    opt_state, step, data = optimizer.init(weights), 0, batches()
    for until, each in stages:

        def loss(weights, tokens, targets, each=each):
            (logits,), new = each.apply(weights, state, (tokens,), rng=None, mode=Mode.TRAIN)
            logs = jax.nn.log_softmax(logits)
            nats = -jnp.take_along_axis(logs, targets[..., None], -1).mean()
            return nats + sum(x.value for x in jax.tree.leaves(new, is_leaf=is_loss) if is_loss(x))

        grad = jax.jit(jax.grad(loss))
        for tokens, targets, _ in data[step:until]:
            with jax.numpy_dtype_promotion('standard'):
                moved, opt_state = optimizer.update(
                    grad(weights, tokens, targets), opt_state, weights
                )
            weights = jax.tree.map(jnp.add, weights, moved)
        step = until
    return weights


def is_loss(x):
    return isinstance(x, tl.AuxLoss)


KEY = jax.random.split(jax.random.key(0))[0]


def test_training_begins_denser():
    net = lm(tl.MixtureFF(32, 16, 1, 0))
    loop = supervised.Loop(net, task(denser=((3, 8), (5, 2))), progress=False)
    loop.run(8)
    stages = ((3, transforms.denser(net, 8)), (5, transforms.denser(net, 2)), (8, net))
    wanted = by_hand(net, stages)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), loop.weights, wanted
    )
    without = supervised.Loop(net, task(), progress=False)
    without.run(8)
    assert not np.allclose(
        *(trees.get(each.weights, 'residual/mixture_ff/out/kernel') for each in (loop, without))
    )


def test_a_run_goes_on_in_its_stage_and_refuses_other_stages(tmp_path):
    net = lm(tl.MixtureFF(32, 16, 1, 0))
    stages = ((3, 8), (6, 2))
    whole = supervised.Loop(net, task(denser=stages), progress=False)
    whole.run(8)
    supervised.Loop(net, task(denser=stages), output_dir=tmp_path, progress=False).run(4)
    again = supervised.Loop(net, task(denser=stages), output_dir=tmp_path, progress=False)
    again.run(8)
    jax.tree.map(np.testing.assert_array_equal, again.weights, whole.weights)
    with pytest.raises(UsageError, match='another run: model'):
        supervised.Loop(net, task(), output_dir=tmp_path, progress=False)


def test_a_model_that_does_not_choose_is_refused():
    with pytest.raises(ValueError, match='no layer that chooses units'):
        supervised.Loop(lm(tl.Dense(D)), task(denser=((3, 2),)), progress=False)
