"""A Model, which remembers its state, inside JAX's transformations, threads, copies and pickles."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import Mode, tl

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def model() -> lc.Model:
    """Running statistics of (0.25, …) and (2, …), and a dense layer of known weights."""
    made = lc.Model(tl.Serial(tl.BatchNorm(epsilon=0.0), tl.Dense(2))).init(X)
    made.state = {'batch_norm': {'mean': jnp.full(3, 0.25), 'var': jnp.full(3, 2.0)}}
    made.weights['dense']['kernel'] = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    return made


def right(x=X):
    return ((x - 0.25) / np.sqrt(2.0)) @ np.array([[1, 0], [0, 1], [1, -1]], np.float32)


# d/dx of the sum of the outputs: (1, 1, 0) / √2 at each row.
SLOPE = np.tile(np.array([1, 1, 0]) / np.sqrt(2.0), (4, 1))
INSIDE = {
    'jit': (lambda m: jax.jit(m)(X), right()),
    'jit of a closure': (lambda m: jax.jit(lambda: m(X))(), right()),
    'vmap': (lambda m: jax.vmap(m)(X[:, None])[:, 0], right()),
    'vmap in jit': (lambda m: jax.jit(jax.vmap(m))(X[:, None])[:, 0], right()),
    'grad': (lambda m: jax.grad(lambda x: m(x).sum())(X), SLOPE),
    'value and grad in jit': (
        lambda m: jax.jit(jax.value_and_grad(lambda x: m(x).sum()))(X)[1],
        SLOPE,
    ),
    'jacobian': (lambda m: jax.jacfwd(lambda x: m(x).sum(1))(X)[0], SLOPE * np.eye(4)[0][:, None]),
    'checkpoint': (lambda m: jax.grad(lambda x: jax.checkpoint(m)(x).sum())(X), SLOPE),
    'scan': (lambda m: jax.lax.scan(lambda c, x: (c, m(x)), 0, X[:, None])[1][:, 0], right()),
    'cond': (lambda m: jax.lax.cond(jnp.bool_(True), m, lambda x: -m(x), X), right()),
    'shapes alone': (lambda m: np.zeros(jax.eval_shape(m, X).shape), np.zeros((4, 2))),
    'a jaxpr': (lambda m: jax.core.eval_jaxpr(*closed(jax.make_jaxpr(m)(X)), X)[0], right()),
    'ahead of time': (lambda m: jax.jit(m).lower(X).compile()(X), right()),
}


def closed(program):
    return program.jaxpr, program.consts


def holds_arrays(m: lc.Model) -> bool:
    return not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((m.weights, m.state)))


@pytest.mark.parametrize('inside', INSIDE)
def test_a_model_inside_a_transformation_is_a_pure_function(inside):
    use, wanted = INSIDE[inside]
    m = model()
    weights, state = m.weights, m.state
    np.testing.assert_allclose(use(m), wanted, rtol=1e-5, atol=1e-6)
    assert m.weights is weights and holds_arrays(m)
    jax.tree.map(np.testing.assert_array_equal, m.state, state)
    np.testing.assert_allclose(m(X), right(), rtol=1e-5, atol=1e-6)


def test_nothing_leaks_out_of_a_model_in_jit():
    m = model()
    with jax.checking_leaks():
        jax.jit(m)(X)


def test_a_new_state_that_jit_would_lose_is_refused_with_the_cure():
    m = model()
    refused = r'cannot keep its state in TRAIN inside jax.jit.*outputs, state = layer.apply\('
    for use in (jax.jit, jax.make_jaxpr, jax.checkpoint):
        with pytest.raises(ValueError, match=refused):
            use(lambda x: m(x, mode=Mode.TRAIN))(X)
    assert holds_arrays(m)
    np.testing.assert_allclose(m(X), right(), rtol=1e-5)

    @jax.jit  # the cure
    def step(weights, state, x):
        return m.layer.apply(weights, state, (x,), mode=Mode.TRAIN)

    _, new = step(m.weights, m.state, X)
    wanted = 0.99 * 0.25 + 0.01 * X.mean(0)
    np.testing.assert_allclose(new['batch_norm']['mean'], wanted, rtol=1e-5)


def test_a_new_state_that_grad_leaves_an_array_is_kept():
    m = model()
    jax.grad(lambda x: m(x, mode=Mode.TRAIN).sum())(X)
    wanted = 0.99 * 0.25 + 0.01 * X.mean(0)
    np.testing.assert_allclose(m.state['batch_norm']['mean'], wanted, rtol=1e-5)


def test_caches_that_jit_would_lose_are_refused():
    m = lc.Model(tl.SelfAttention(1)).init(lc.shape_dtype((1, 4, 2)), mode=Mode.PREDICT)
    x = np.ones((1, 1, 2), np.float32)
    with pytest.raises(ValueError, match='cannot keep its state in PREDICT'):
        jax.jit(lambda x: m(x, mode=Mode.PREDICT))(x)
    m(x, mode=Mode.PREDICT)
    assert int(m.state['core'].position.rows[0]) == 1


def test_modes_without_a_state_run_inside_jit():
    m = lc.Model(tl.Serial(tl.Dense(2), tl.Dropout(0.5))).init(X)
    train = jax.jit(lambda x, key: m(x, mode=Mode.TRAIN, rng=key))
    key = jax.random.key(3)
    wanted = m(X, mode=Mode.TRAIN, rng=jax.random.clone(key))
    np.testing.assert_allclose(train(X, key), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: m(x, mode=Mode.PREDICT))(X), m(X), rtol=1e-6)


def test_a_model_made_of_traced_weights_keeps_its_state_there():
    m = model()

    def loss(weights, x):
        inner = lc.Model(m.layer, weights, m.state)
        return inner(x, mode=Mode.TRAIN).sum(), inner.state

    grads, state = jax.jit(jax.grad(loss, has_aux=True))(m.weights, X)
    np.testing.assert_allclose(grads['dense']['bias'], [4, 4], rtol=1e-6)
    wanted = 0.99 * 0.25 + 0.01 * X.mean(0)
    np.testing.assert_allclose(state['batch_norm']['mean'], wanted, rtol=1e-5)
    assert holds_arrays(m)


def test_init_inside_jit_is_refused_and_leaves_the_model():
    m = model()
    for use in (jax.jit, jax.eval_shape, jax.make_jaxpr):
        with pytest.raises(ValueError, match=r'weights, state = layer.init\(signature, key\)'):
            use(lambda x: m.init(x)(x), *([X] if use is jax.eval_shape else []))(X)
    np.testing.assert_allclose(m(X), right(), rtol=1e-5, atol=1e-6)
    weights, _ = jax.jit(lambda key: m.layer.init(lc.signature_of(X), key))(jax.random.key(0))
    again = lc.Model(m.layer).init(X, 0)
    np.testing.assert_allclose(weights['dense']['kernel'], again.weights['dense']['kernel'])


def test_a_failed_call_inside_jit_leaves_the_model():
    m = model()
    with pytest.raises(ValueError, match='the input is 5 wide'):
        jax.jit(m)(np.zeros((4, 5), np.float32))
    np.testing.assert_allclose(jax.jit(m)(X), right(), rtol=1e-5, atol=1e-6)


def test_copies_have_states_of_their_own():
    m = model()
    copies = [copy.copy(m), copy.deepcopy(m), pickle.loads(pickle.dumps(m))]
    m(X, mode=Mode.TRAIN)
    for other in copies:
        np.testing.assert_array_equal(other.state['batch_norm']['mean'], np.full(3, 0.25))
        np.testing.assert_allclose(other(X), right(), rtol=1e-5, atol=1e-6)


def test_save_after_jit_holds_arrays(tmp_path):
    m = model()
    jax.jit(m)(X)
    m.save(tmp_path / 'saved')
    again = lc.Model(m.layer).init(X).load(tmp_path / 'saved')
    np.testing.assert_allclose(again(X), right(), rtol=1e-5, atol=1e-6)


def test_a_model_is_evaluated_in_two_threads_while_a_copy_trains():
    m, trained = model(), copy.copy(model())
    barrier = threading.Barrier(2)

    def evaluate(_):
        barrier.wait()
        return [np.asarray(m(X)) for _ in range(5)]

    with ThreadPoolExecutor(2) as threads:
        made = threads.map(evaluate, range(2))
        for _ in range(3):
            trained(X, mode=Mode.TRAIN)
    for outputs in made:
        np.testing.assert_allclose(outputs, [right()] * 5, rtol=1e-5, atol=1e-6)
    mean = np.float32(0.25)
    for _ in range(3):
        mean = 0.99 * mean + 0.01 * X.mean(0)
    np.testing.assert_allclose(trained.state['batch_norm']['mean'], mean, rtol=1e-5)


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
def test_weights_may_be_numpy_arrays_that_a_person_changes(dtype):
    m = model()
    m.weights = jax.tree.map(lambda x: np.array(x, dtype), m.weights)
    with jax.numpy_dtype_promotion('standard'):
        np.testing.assert_allclose(m(X), right(), rtol=1e-2, atol=1e-2)
        m.weights['dense']['kernel'][:] = 0  # in place
        m.weights['dense']['bias'] += 2
        np.testing.assert_allclose(m(X), np.full((4, 2), 2), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(m)(X), np.full((4, 2), 2), rtol=1e-6)
