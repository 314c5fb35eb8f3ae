"""Moments in 8 and 16 bits: what is narrow, what training becomes of it, and mistakes."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import optimizers, supervised, tl, trees
from layercomb.optimizers.blockwise import Bytes
from layercomb.optimizers.narrow import Halves

narrow = optimizers.narrow_state
NET = tl.Serial(
    tl.Embedding(32, 64),
    tl.Repeat(tl.Serial(tl.Residual(tl.LayerNorm(), tl.Dense(64), tl.Tanh())), 80),
    tl.Dense(32, name='head'),
)
SIGNATURE = lc.signature_of(jax.ShapeDtypeStruct((4, 6), jnp.int32))


def weights_of(net=NET):
    return net.init(SIGNATURE, jax.random.key(0))[0]


def kept(state):
    """Path -> array of a state, narrow ones whole."""
    found = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, (Bytes, Halves))
    )
    return {jax.tree_util.keystr(k, simple=True, separator='/'): x for k, x in found}


def run(optimizer, weights, n_steps, noise=0.1):
    """The weights after some steps down a bowl whose gradients are noisy."""
    goal = jax.tree.map(lambda x: x + 0.3 * jnp.sign(x + 0.01), weights)
    with jax.numpy_dtype_promotion('standard'):
        state, update = jax.jit(optimizer.init)(weights), jax.jit(optimizer.update)
        for i in range(n_steps):
            rng = np.random.default_rng(i)
            grads = jax.tree.map(
                lambda w, g, rng=rng: w - g + noise * rng.normal(size=w.shape).astype(np.float32),
                weights, goal,
            )  # fmt: skip
            steps, state = update(grads, state, weights)
            weights = optax.apply_updates(weights, steps)
    far = jax.tree.map(lambda w, g: jnp.square(w - g).sum(), weights, goal)
    loss = sum(jax.tree.leaves(far))
    return weights, state, float(loss) / trees.count(weights)


@pytest.mark.parametrize(('bits', 'kind'), [(8, Bytes), (16, Halves)])
def test_moments_of_matrices_are_narrow_and_nothing_else(bits, kind):
    state = narrow(optimizers.adamw(0.1), bits, net=NET).init(weights_of())
    narrow_ones = {path for path, x in kept(state).items() if isinstance(x, kind)}
    where = 'inner_state/inner_state/0/'
    dense = 'serial/residual/dense/kernel'
    assert narrow_ones == {f'{where}{moment}/{dense}' for moment in ('mu', 'nu')}
    others = {path: x for path, x in kept(state).items() if path not in narrow_ones}
    # 80 stacked biases are more numbers than the least that is narrow, and still biases.
    assert others[f'{where}nu/serial/residual/dense/bias'].size == 5120
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in others.values())
    assert f'{where}nu/embedding/table' in others  # 2,048 numbers
    rates = [path for path in others if path.endswith('hyperparams/learning_rate')]
    assert rates == ['inner_state/hyperparams/learning_rate']


def test_without_a_model_names_say_what_a_bias_is():
    weights = {'a': {'kernel': jnp.ones((80, 64)), 'bias': jnp.ones((80, 64))}, 'bias': jnp.ones(2)}
    state = narrow(optax.adam(0.1)).init(weights)
    found = {path for path, x in kept(state).items() if isinstance(x, Bytes)}
    assert found == {f'inner_state/0/{moment}/a/kernel' for moment in ('mu', 'nu')}


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize(
    'make', [optimizers.adamw, optimizers.muon, optimizers.sm3], ids=lambda make: make.__name__
)
def test_training_goes_as_with_wide_moments(make, bits):
    net = tl.Serial(tl.Dense(96), tl.Dense(64))
    signature = lc.signature_of(jax.ShapeDtypeStruct((4, 48), jnp.float32))
    weights = net.init(signature, jax.random.key(0))[0]
    wide, _, loss = run(make(0.02, net=net), weights, 40)
    near, state, narrow_loss = run(narrow(make(0.02), bits, net=net), weights, 40)
    assert narrow_loss == pytest.approx(loss, rel=0.05)
    assert any(isinstance(x, (Bytes, Halves)) for x in kept(state).values())
    moved = [np.concatenate([np.ravel(x - y) for x, y in
             zip(*map(jax.tree.leaves, (after, weights)), strict=True)])
             for after in (wide, near)]  # fmt: skip
    assert np.corrcoef(*moved)[0, 1] > 0.98


def test_bytes_a_parameter():
    weights = {'kernel': jax.ShapeDtypeStruct((512, 1024), jnp.float32)}

    def bytes_of(optimizer):
        return trees.n_bytes(jax.eval_shape(optimizer.init, weights)) / (512 * 1024)

    assert bytes_of(optax.adam(0.1)) == pytest.approx(8, abs=1e-4)
    assert bytes_of(narrow(optax.adam(0.1))) == pytest.approx(2 * (1 + 4 / 256), abs=1e-4)
    assert bytes_of(narrow(optax.adam(0.1), 16)) == pytest.approx(4, abs=1e-4)
    assert bytes_of(narrow(optax.lion(0.1))) == pytest.approx(1 + 4 / 256, abs=1e-4)


PEAK = """
import jax, jax.numpy as jnp, optax
from layercomb import optimizers, trees
weights = {str(i): {'kernel': jnp.zeros((16, 1024))} for i in range(16)}
optimizer = optimizers.narrow_state(optax.adam(0.1))
state = optimizer.init(weights)
lowered = jax.jit(optimizer.update, donate_argnums=1).lower(weights, state, weights)
taken = lowered.compile().memory_analysis().temp_size_in_bytes
print(taken / trees.n_bytes(weights))
"""


SHARDED = """
import jax, jax.numpy as jnp, optax, re
from jax.sharding import NamedSharding, PartitionSpec
from layercomb import optimizers
mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
optimizer = optimizers.narrow_state(optax.adam(0.1))
for axis in range(3):
    axes = [None] * 3
    axes[axis] = 'x'
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    weights = {'kernel': jax.device_put(jnp.ones((4, 8, 1024)), sharding)}
    state = jax.tree.map(
        lambda x: jax.device_put(x, sharding) if x.ndim else x, optimizer.init(weights)
    )
    compiled = jax.jit(optimizer.update).lower(weights, state, weights).compile()
    _, state = compiled(weights, state, weights)
    assert not re.findall(r'(?:all-\\w+|collective-\\w+)\\(', compiled.as_text())
    assert all(x.sharding == sharding for x in jax.tree.leaves(state) if x.ndim)
print('sharded')
"""


def in_a_process(program, flags):
    """What a program prints, under flags of XLA."""
    environment = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': os.pathsep.join(sys.path)}
    command = [sys.executable, '-c', program]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_no_moment_is_wide_in_memory():
    assert float(in_a_process(PEAK, '')) < 0.6  # codes are a half, all moments would be 2


def test_moments_are_sharded_as_weights_are_and_devices_need_nothing_of_each_other():
    out = in_a_process(SHARDED, '--xla_force_host_platform_device_count=2')
    assert out.split() == ['sharded']


class Rows:
    """Batches of tokens, drawn anew."""

    def __iter__(self):
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(0, 32, (4, 6)).astype(np.int32)
            yield x, (x + 1) % 32, np.ones((4, 6), np.float32)


def loop(optimizer, directory=None, **task):
    train = supervised.TrainTask(Rows(), tl.CrossEntropyLoss(), optimizer, **task)
    return supervised.Loop(
        NET, train, output_dir=directory, eval_every=None, log_every=1, progress=False
    )


@pytest.mark.parametrize('bits', [8, 16])
def test_a_run_that_resumes_is_the_same_bit_for_bit(bits, tmp_path):
    def optimizer():
        return narrow(optimizers.adamw(optimizers.warmup_cosine(0.01, 8, 2)), bits)

    whole = loop(optimizer())
    row = whole.run(6)
    assert row['train/learning_rate'] > 0
    loop(optimizer(), tmp_path).run(3)
    again = loop(optimizer(), tmp_path)
    assert again.step == 3
    again.run(6)
    for name in ('weights', 'opt_state'):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(again, name))
    assert any(isinstance(x, (Bytes, Halves)) for x in kept(again.opt_state).values())


def test_it_works_inside_other_optimizers_and_with_frozen_weights():
    inside = optax.chain(optax.clip_by_global_norm(1.0), narrow(optimizers.adamw(0.01), net=NET))
    row = loop(inside, clip_norm=1.0, trainable=lambda path: 'embedding' not in path).run(2)
    assert row['train/learning_rate'] == pytest.approx(0.01)
    parts = {'a': narrow(optax.adam(0.1)), 'b': optax.sgd(0.1)}
    optimizer = optax.multi_transform(parts, {'a': 'a', 'b': 'b'})
    weights = {'a': {'kernel': jnp.ones((64, 64))}, 'b': {'kernel': jnp.ones((64, 64))}}
    found = kept(optimizer.init(weights)).values()
    assert sum(isinstance(x, Bytes) for x in found) == 2
    assert jax.tree.all(jax.tree.map(jnp.any, run(optimizer, weights, 2)[0]))


def test_optimizers_that_ask_for_the_loss_are_given_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    loop(narrow(optax.chain(optax.adam(0.01), plateau))).run(2)


def test_what_is_a_moment_can_be_said():
    optimizer = narrow(optax.contrib.schedule_free_sgd(0.1), which=lambda path: False, net=NET)
    with pytest.raises(
        ValueError, match=r"finds no moment.*/serial/residual/dense/kernel'.*which="
    ):
        optimizer.init(weights_of())
    with pytest.raises(ValueError, match='which=lambda path: … is one, or leave narrow_state out'):
        narrow(optax.contrib.schedule_free_sgd(0.1), net=NET).init(weights_of())
    chosen = narrow(optax.adam(0.1), which=lambda path: '/mu/' in path, net=NET)
    found = {path for path, x in kept(chosen.init(weights_of())).items() if isinstance(x, Bytes)}
    assert found == {'inner_state/0/mu/serial/residual/dense/kernel'}
    narrow(optax.sgd(0.1)).init(weights_of())  # keeps nothing


def test_the_recipe_inside_is_told_the_model():
    optimizer = narrow(optimizers.muon(0.1))
    loop(optimizer).run(1)
    with pytest.raises(ValueError, match=r'optimizers\.muon has to know the model'):
        optimizer.init(weights_of())


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (('adam',), TypeError, "narrow_state: 'adam' is no optax.GradientTransformation: give"),
        ((optax.adam(0.1), 4), TypeError, 'narrow_state: bits must be 8 or 16, got 4'),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        narrow(*arguments)
    with pytest.raises(ValueError, match='min_size must be at least 1, got 0'):
        narrow(optax.adam(0.1), min_size=0)
    with pytest.raises(TypeError, match="which must be a function or None, got 'mu'"):
        narrow(optax.adam(0.1), which='mu')
