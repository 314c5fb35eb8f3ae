"""Training whose blocks live in host memory does what training does."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import optimizers, parallel, tl, transforms, trees
from layercomb.launcher.experiment import Experiment
from layercomb.parallel.swapped import swapped
from layercomb.supervised import Callback, EvalTask, Loop, TrainTask
from layercomb.supervised.offloading import places_of, wire
from layercomb.supervised.offloading.independence import check_independent

V, L, B, N = 16, 4, 2, 3

RATE = optimizers.warmup_cosine(1e-2, 10, 2)
ADAMW = optimizers.adamw(RATE, weight_decay=0.1)
FF = tl.Serial(tl.LayerNorm(), tl.Dense(8), tl.Tanh(), name='ff')


def nets(ff):
    """Models with n blocks around some layers."""
    block = tl.ReversibleSerial(
        tl.ReversibleHalfResidual(ff, tl.Dropout(0.2)), tl.ReversibleSwap(), name='block'
    )
    stack = tl.ReversibleRepeat(block, N, name='blocks')
    plain = tl.Repeat(tl.Residual(ff, tl.Dropout(0.2)), N, name='blocks')
    return {
        'plain': tl.Serial(tl.Embedding(V, 8), plain, tl.Dense(V)),
        'reversible': tl.Serial(tl.Embedding(V, 8), tl.Dup(), stack, tl.Add(), tl.Dense(V)),
    }


NETS = nets(FF)
PLAIN, REVERSIBLE = NETS['plain'], NETS['reversible']


class Data:
    """Batches of random tokens, the same each time."""

    def __iter__(self):
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(0, V, (B, L + 1)).astype(np.int32)
            yield x[:, :-1], x[:, 1:], np.ones((B, L), np.float32)


class Rows(Callback):
    """Keeps what a run reports."""

    def __init__(self):
        self.found = []

    def after_step(self, loop, row):
        self.found.append((row['train/loss'], row['train/grad_norm']))


def loop(net=REVERSIBLE, offload='blocks', directory=None, optimizer=ADAMW, evals=(), **task):
    options = {name: task.pop(name) for name in ('mesh', 'offload_dtype') if name in task}
    rows = Rows()
    made = Loop(
        net, TrainTask(Data(), tl.CrossEntropyLoss(), optimizer, **task), evals, directory,
        progress=False, eval_every=None, checkpoint_every=None, callbacks=(rows,),
        offload=offload, **options,
    )  # fmt: skip
    return made, rows.found


def same(net, offload='blocks', tolerance=1e-6, **given):
    """Trains with and without; weights, state and reports are the same."""
    (one, rows), (other, found) = loop(net, None, **given), loop(net, offload, **given)
    for each in (one, other):
        each.run(3)
    np.testing.assert_allclose(found, rows, atol=tolerance, rtol=tolerance)
    ours, theirs = ((x.weights, x.opt_state) for x in (other, one))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            atol=tolerance,
            rtol=10 * tolerance,
        )
    return other


def kinds(made):
    """Where arrays are: 'device' or 'pinned_host' by path."""
    found = trees.flatten(made._carry.trainable)
    return {path: x.sharding.memory_kind for path, x in found.items() if x is not None}


MORE = {
    'losses inside': tl.Serial(
        tl.Embedding(V, 8),
        tl.Repeat(tl.Residual(tl.BatchNorm(), tl.SwitchFF(8, 2), name='block'), N, name='blocks'),
        tl.Dense(V),
    ),
    'tied, in two stacks': transforms.Tied(
        tl.Serial(
            tl.Embedding(V, 8),
            tl.Repeat(tl.Remat(tl.Residual(FF)), N, name='blocks'),
            tl.Serial(tl.Repeat(tl.Residual(FF), 1, name='more'), name='inside'),
            tl.Dense(V, name='head'),
        ),
        'embedding/table',
        'head/kernel',
        jnp.transpose,
    ),
}


@pytest.mark.parametrize('name', MORE)
def test_other_models(name):
    same(MORE[name], optimizer=optax.sgd(0.1))


def test_a_model_keeps_its_weights():
    model = lc.Model(PLAIN).init(np.zeros((B, L), np.int32), 1)
    before = jax.tree.map(np.asarray, model.weights)
    made = same(model)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    lc.Model(PLAIN, made.weights, made.state)(np.zeros((B, L), np.int32))


@pytest.mark.parametrize('name', NETS)
def test_training_is_the_same(name):
    made = same(NETS[name])
    found = kinds(made)
    assert {p: k for p, k in found.items() if k != 'device'} == {
        p: 'pinned_host' for p in found if p.startswith('blocks/')
    }
    moments = jax.tree.leaves(made._carry.opt_state)
    stacked = [x for x in moments if x.shape[:1] == (N,)]
    assert stacked
    assert all(x.sharding.memory_kind == 'pinned_host' for x in stacked)


def test_inputs_of_blocks_may_be_in_host_memory():
    made = same(PLAIN, 'blocks+inputs')
    batch = next(iter(Data()))
    traced = made._compiled.trace(made._carry, made._frozen, made._key, batch)
    assert f'f32<host>[{N},{B},{L},8]' in str(traced.jaxpr)
    assert 'pinned_host' in traced.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize(
    'optimizer',
    [optimizers.muon(0.01), optimizers.adafactor(0.01), optimizers.sm3(0.01), optax.sgd(0.1, 0.9)],
    ids=['muon', 'adafactor', 'sm3', 'sgd'],
)
def test_optimizers_that_go_by_tensors(optimizer):
    same(REVERSIBLE, optimizer=optimizer, tolerance=2e-6)


def test_narrow_moments_are_rounded_by_other_chances():
    narrow = optimizers.narrow_state(optimizers.adamw(1e-2), 8, min_size=64)
    same(REVERSIBLE, optimizer=narrow, tolerance=1.0)  # so much for dtypes and shapes
    (_, rows), (_, found) = both = [loop(REVERSIBLE, o, optimizer=narrow) for o in (None, 'blocks')]
    for each, _ in both:
        each.run(3)
    np.testing.assert_allclose(found, rows, rtol=1e-2)


def test_frozen_blocks_stay_and_are_in_host_memory():
    made = same(PLAIN, trainable=lambda path: not path.endswith('kernel'))
    found = trees.flatten(made._frozen)
    (frozen,) = (x for p, x in found.items() if p.startswith('blocks/') and x is not None)
    assert frozen.sharding.memory_kind == 'pinned_host'
    same(PLAIN, trainable=lambda path: not path.startswith('blocks'))


def test_a_run_is_switched_on_and_off(tmp_path):
    valid = EvalTask(Data(), tl.CrossEntropyLoss(), n_batches=1)
    adafactor = optimizers.adafactor(0.01)  # has integers for each tensor
    whole, rows = loop(REVERSIBLE, None, optimizer=adafactor, evals=valid)
    last = whole.run(4)
    found = []
    for until, offload in enumerate(('blocks', None, 'blocks', 'blocks'), 1):
        made, some = loop(REVERSIBLE, offload, tmp_path, adafactor, valid)
        row = made.run(until)
        found += some
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    assert row['valid/loss'] == pytest.approx(last['valid/loss'], rel=1e-5)


REFUSED = {
    'clip_norm': (
        {'clip_norm': 1.0},
        "offload='blocks' moves each block before the norm of all gradients is known: leave out "
        'clip_norm=1.0, or clip numbers, by an optimizer optax.chain(optax.clip(…), …)',
    ),
    'accumulate': ({'accumulate': 2}, 'sums none: leave out accumulate=2, or offload'),
    'dtype': ({'offload_dtype': 'int8'}, "offload_dtype='int8': it is 'float32' or 'bfloat16'"),
    'dtype alone': (
        {'offload_dtype': 'bfloat16', 'offload': None},
        "of blocks in host memory: say offload='blocks' too, or leave it out",
    ),
    'unknown': ({'offload': 'all'}, "offload='all': it is None, 'blocks', "),
    'shared': (
        {'net': tl.Serial(tl.Embedding(V, 8), tl.Repeat(FF, 2, shared=True), tl.Dense(V))},
        'the blocks of this Serial share their weights, or are inside other layers than tl.Serial',
    ),
    'none': (
        {'net': tl.Serial(tl.Embedding(V, 8), tl.Dense(V))},
        'no blocks of this Serial are in a Repeat: build them as tl.Repeat(block, n)',
    ),
    'global': (
        {'optimizer': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))},
        "this optimizer moves a block of 'blocks' otherwise if others' gradients, or the loss, are "
        'others: choose one that goes by tensors, such as optimizers.adamw',
    ),
    'whole stacks': ({'optimizer': optax.lamb(1e-2)}, "moves a block of 'blocks' otherwise"),
    'loss': (
        {'optimizer': optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())},
        "moves a block of 'blocks' otherwise",
    ),
    'line search': ({'optimizer': optax.lbfgs()}, 'asks for losses at other weights, as line'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_needs_all_gradients_is_refused(name):
    given, told = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(told)):
        loop(**given)


def test_what_is_outside_of_stacks_must_not_read_their_gradients():
    def update(grads, state, weights=None):
        total = sum(jnp.sum(g) for p, g in trees.flatten(grads).items() if 'blocks' in p)
        return {**grads, 'dense': jax.tree.map(lambda g: g + total, grads['dense'])}, state

    weights, _ = PLAIN.init((jnp.zeros((B, L), jnp.int32),), jax.random.key(0))
    reading = optax.GradientTransformation(lambda weights: (), update)
    with pytest.raises(ValueError, match='moves what is outside of stacks otherwise'):
        check_independent(reading, weights, {'blocks': N})


def test_a_device_without_host_memory_is_refused(monkeypatch):
    class Device:
        addressable_memories = staticmethod(list)

        def __str__(self):
            return 'ABC:0'

    monkeypatch.setattr(jax, 'devices', lambda: [Device()])
    task = TrainTask(Data(), tl.CrossEntropyLoss(), ADAMW)
    with pytest.raises(ValueError, match=r'\(pinned_host\), and ABC:0 has none: leave it out'):
        places_of('blocks', task, PLAIN, ADAMW, parallel.ALONE)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    task = TrainTask(Data(), tl.CrossEntropyLoss(), ADAMW)
    with pytest.raises(ValueError, match='for the devices of one process, and there are 2'):
        places_of('blocks', task, PLAIN, ADAMW, parallel.ALONE)


def test_packed_rows_are_told_apart():
    net = transforms.segmented(lc.models.TransformerLM(V, 8, 16, 2, 2, L))
    x, segments = jnp.arange(2 * L, dtype=jnp.int32).reshape(B, L), jnp.array([[1, 1, 2, 2]] * B)
    weights, state = net.init((x, segments), jax.random.key(0))
    for mode in (tl.Mode.TRAIN, tl.Mode.EVAL):
        given = weights, state, (x, segments)
        (wanted,), _ = net.apply(*given, mode=mode)
        (found,), _ = jax.jit(functools.partial(swapped(net).apply, mode=mode))(*given)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_mesh_of_one_device():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    (one, rows), (other, found) = loop(), loop(mesh=mesh)
    for each in (one, other):
        each.run(2)
    np.testing.assert_allclose(found, rows, rtol=1e-6)


def test_blocks_that_the_loss_does_not_see_are_refused():
    hidden = tl.Fn('Constant', lambda x: jax.lax.stop_gradient(x), position_wise=True)
    net = tl.Serial(tl.Embedding(V, 8), tl.Repeat(tl.Residual(FF), 2), hidden, tl.Dense(V))
    with pytest.raises(ValueError, match="does not depend on the outputs of 'residual'"):
        loop(net)[0].run(1)


@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'int16', 'int32', 'uint32', 'bool', 'float32'])
@pytest.mark.parametrize('shape', [(2, 8), (2, 3), (2, 1), (2,)])
def test_integers_travel_as_floats(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2**31, shape).astype(dtype)
    there = wire.sent(x)
    assert there.dtype == np.float32
    np.testing.assert_array_equal(wire.received(there, x), x)
    inside = jax.jit(wire.closed)(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(inside).view(np.uint32), there.view(np.uint32))
    np.testing.assert_array_equal(jax.jit(lambda y: wire.opened(y, x))(inside), x)


def test_a_configuration_says_it():
    task = TrainTask(Data(), tl.CrossEntropyLoss(), ADAMW)
    with pytest.raises(ValueError, match="offload='all'"):
        Experiment(PLAIN, task, offload='all').loop('unused')


class Rounded(tl.Serial):
    """Layers whose matrices are computed with as bfloat16, in plain words."""

    def apply(self, weights, state, inputs, **given):
        def one(path, x):
            near = x.astype(jnp.bfloat16).astype(jnp.float32)
            return x + jax.lax.stop_gradient(near - x) if path.endswith('kernel') else x

        return super().apply(trees.map_with_path(one, weights), state, inputs, **given)


@pytest.mark.parametrize('name', NETS)
def test_blocks_in_bfloat16_are_of_rounded_weights(name):
    (one, rows), (other, found) = (
        loop(nets(Rounded(*FF.sublayers, name='ff'))[name], None),
        loop(NETS[name], 'blocks', offload_dtype='bfloat16'),
    )
    for each in (one, other):
        each.run(3)
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    for a, b in zip(
        *(jax.tree.leaves((x.weights, x.opt_state)) for x in (one, other)), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_run_in_bfloat16_is_switched_on_and_off(tmp_path):
    valid = EvalTask(Data(), tl.CrossEntropyLoss(), n_batches=1)
    frozen = {'trainable': lambda path: 'dense/kernel' not in path}
    whole, rows = loop(PLAIN, None, evals=valid, **frozen)
    last = whole.run(4)
    found = []
    for until, dtype in enumerate(('bfloat16', None, 'bfloat16', 'bfloat16'), 1):
        given = {} if dtype is None else {'offload_dtype': dtype}
        made, some = loop(
            PLAIN, 'blocks' if dtype else None, tmp_path, evals=valid, **given, **frozen
        )
        row = made.run(until)
        found += some
    np.testing.assert_allclose(found, rows, rtol=2e-2)
    assert row['valid/loss'] == pytest.approx(last['valid/loss'], rel=2e-2)
    assert made._frozen['blocks']['ff']['dense']['kernel'].dtype == jnp.bfloat16
    assert jax.tree.structure(made.weights) == jax.tree.structure(whole.weights)


@pytest.mark.parametrize(
    ('dtype', 'frozen', 'sent'),
    [('float32', False, 16), ('bfloat16', False, 14), ('float32', True, 8), ('bfloat16', True, 4)],
)
def test_half_of_the_weights_is_sent(dtype, frozen, sent, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'benchmarks')
    counting = importlib.import_module('host_offload')
    block = tl.Residual(tl.Serial(tl.Dense(64, use_bias=False), tl.Tanh()))
    net = tl.Serial(tl.Embedding(V, 64), tl.Repeat(block, N, name='blocks'), tl.Dense(V))
    trainable = (lambda path: not path.startswith('blocks')) if frozen else None
    made, _ = loop(net, offload_dtype=dtype, trainable=trainable)
    args = made._carry, made._frozen, made._key, next(iter(Data()))
    jaxpr = made._compiled.trace(*args).jaxpr.jaxpr
    assert counting.sent_bytes(jaxpr, to_host=False) == N * 64 * 64 * sent
    assert counting.sent_bytes(jaxpr, to_host=True) == (0 if frozen else N * 64 * 64 * 12)
