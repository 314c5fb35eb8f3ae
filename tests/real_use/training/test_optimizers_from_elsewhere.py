"""Optimizers of optax that ask for more than gradients, and those that ask for too much."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb import supervised, tl

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)
BATCH = X, Y, np.ones(8, np.float32)
STILL = np.zeros((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)


def loop(optimizer, batch=BATCH, **task):
    train_task = supervised.TrainTask([batch] * 50, tl.CrossEntropyLoss(), optimizer, **task)
    return supervised.Loop(tl.Dense(2), train_task, progress=False, log_every=1)


@pytest.mark.parametrize('task', [{}, {'accumulate': 2}, {'clip_norm': 1.0}])
def test_reduce_on_plateau_sees_the_loss_stand_still(task):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    trained = loop(optax.chain(optax.sgd(0.0), plateau), STILL, **task)
    trained.run(20)
    state = trained.opt_state[-1] if 'clip_norm' in task else trained.opt_state
    # The first loss is the best; after it, each second one that is no better halves the scale.
    assert float(state[1].scale) == 0.5**9


def test_polyak_steps_are_as_long_as_the_loss_is_high():
    trained = loop(optax.polyak_sgd(max_learning_rate=100.0))
    before = np.array(trained.weights['kernel']), np.array(trained.weights['bias'])

    def mean(kernel, bias):
        log_p = jax.nn.log_softmax(jnp.asarray(X) @ kernel + bias)
        return -log_p[jnp.arange(8), Y].mean()

    value, grads = jax.value_and_grad(mean, (0, 1))(*before)
    square = sum(float(jnp.sum(g**2)) for g in grads)
    trained.run(1)
    moved = before[0] - np.float32(float(value) / square) * np.array(grads[0])
    np.testing.assert_allclose(trained.weights['kernel'], moved, rtol=1e-4)


@pytest.mark.parametrize('task', [{}, {'accumulate': 4}])
def test_a_line_search_is_given_the_loss_as_a_function(task):
    searched, plain = loop(optax.lbfgs(), **task), loop(optax.sgd(0.1))
    assert searched.run(10)['train/loss'] < 0.1 * plain.run(10)['train/loss']


def test_one_that_asks_for_what_a_loop_has_not_is_refused_with_the_reason():
    def update(grads, state, params=None, *, hessian):
        return grads, state

    asking = optax.GradientTransformationExtraArgs(lambda _: (), update)
    with pytest.raises(
        TypeError, match=r"asks for 'hessian' at each step, and a Loop gives it val"
    ):
        supervised.TrainTask([BATCH], tl.CrossEntropyLoss(), asking)


def test_one_that_takes_the_loss_by_name_and_nothing_else():
    def update(grads, state, params=None, *, value):
        del params
        return jax.tree.map(lambda g: -value * g, grads), state

    mine = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    trained = loop(mine)
    before = np.array(trained.weights['bias'])
    p = np.asarray(jax.nn.softmax(jnp.asarray(X) @ trained.weights['kernel'] + before))
    value = -np.log(p[np.arange(8), Y]).mean()
    trained.run(1)
    moved = before - value * (p - np.eye(2)[Y]).mean(0)
    np.testing.assert_allclose(trained.weights['bias'], moved, rtol=1e-4)


def test_one_whose_update_has_no_weights_argument_by_name():
    def update(updates, opt_state, theta=None):
        del theta
        return jax.tree.map(lambda g: -0.5 * g, updates), opt_state

    mine = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    ours, theirs = loop(mine), loop(optax.sgd(0.5))
    ours.run(3), theirs.run(3)
    np.testing.assert_allclose(ours.weights['kernel'], theirs.weights['kernel'], rtol=1e-6)
