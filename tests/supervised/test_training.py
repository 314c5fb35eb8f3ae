from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import ADAM, LOSS, NET, SGD, B, PlainData, V, eval_task, grain_data, loop

from layercomb import Layer, Mode, Model, UsageError, data, init_state, losses, tl, trees
from layercomb.supervised import EvalTask, TrainTask
from layercomb.supervised.reports import read_metrics

STILL = tl.Serial(tl.Embedding(16, 8), tl.Dense(16))  # nothing random


def losses_of(directory):
    return {row['step']: row['train/loss'] for row in read_metrics(directory)}


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_loss_falls_and_the_last_metrics_come_back(tmp_path):
    trained = loop(tmp_path, eval_tasks=eval_task())
    row = trained.run(60)
    assert row['step'] == trained.step == 60
    assert row['valid/accuracy'] > 0.9
    assert row['valid/bits_per_byte'] == pytest.approx(row['valid/loss'] / np.log(2))
    first = read_metrics(tmp_path)[0]
    assert first['train/loss'] == pytest.approx(np.log(16), rel=0.3)
    assert row['train/loss'] < first['train/loss'] / 2
    assert row['train/learning_rate'] == pytest.approx(1e-2)
    assert row['train/tokens_per_second'] > 0


def test_nothing_is_written_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop().run(3)['step'] == 3
    assert not list(tmp_path.iterdir())


def test_a_step_is_the_gradient_of_the_weighted_mean():
    trained = loop(net=STILL, data=PlainData(), optimizer=SGD)
    before = jax.tree.map(np.array, trained.weights)
    x, y, w = next(iter(PlainData()))

    def mean(weights):
        (logits,), _ = STILL.apply(weights, {}, (jnp.asarray(x),))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(y)[..., None], -1)
        return -jnp.sum(log_p[..., 0] * w) / w.sum()

    value, grads = jax.value_and_grad(mean)(before)
    row = trained.run(1)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert row['train/loss'] == pytest.approx(float(value), rel=1e-5)
    assert row['train/grad_norm'] == pytest.approx(float(norm), rel=1e-5)
    expected = jax.tree.map(lambda a, g: a - np.float32(0.1) * np.array(g), before, grads)
    for a, b in zip(jax.tree.leaves(trained.weights), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_are_the_big_batch():
    runs = [loop(net=STILL, optimizer=SGD, task={'accumulate': n}) for n in (1, 2, 4)]
    rows = [run.run(4) for run in runs]
    for run, row in zip(runs[1:], rows[1:], strict=True):
        assert row['train/loss'] == pytest.approx(rows[0]['train/loss'], rel=1e-5)
        assert row['train/grad_norm'] == pytest.approx(rows[0]['train/grad_norm'], rel=1e-5)
        for a, b in zip(
            jax.tree.leaves(run.weights), jax.tree.leaves(runs[0].weights), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sums_in_bfloat16_are_right_on_average():
    grads = {}
    for dtype in ('float32', 'bfloat16'):
        task = {'accumulate': 4, 'accumulate_dtype': dtype}
        made = loop(net=STILL, optimizer=SGD, task=task)
        step = made._compiled.__wrapped__
        batch = tuple(jnp.asarray(x) for x in made._first)

        def gradient(key, step=step, made=made, batch=batch):
            before = made._carry
            after, _ = step(before, made._frozen, key, batch)
            return jax.tree.map(lambda a, b: (b - a) / 0.1, after.trainable, before.trainable)

        keys = jax.random.split(jax.random.key(0), 400)
        grads[dtype] = jax.jit(jax.vmap(gradient))(keys)
    assert all(np.ptp(x, axis=0).max() < 1e-5 for x in jax.tree.leaves(grads['float32']))
    for narrow, wide in zip(*(jax.tree.leaves(grads[x]) for x in grads), strict=True):
        off = np.asarray(wide - narrow)
        assert 0 < np.abs(off).max() < 0.02 * np.abs(wide).max()
        error = off.std(0) / 20  # of the mean of 400
        assert (np.abs(off.mean(0)) <= 5 * error + 1e-6).all()


def test_a_batch_that_cannot_be_cut():
    with pytest.raises(ValueError, match=r'accumulate=3 does not divide a batch of 4 rows: choose'):
        loop(task={'accumulate': 3}).run(1)


def test_clipping_bounds_the_step():
    free, clipped = (
        loop(net=STILL, optimizer=SGD),
        loop(net=STILL, optimizer=SGD, task={'clip_norm': 1e-3}),
    )
    before = jax.tree.map(np.array, clipped.weights)
    assert free.run(1)['train/grad_norm'] == clipped.run(1)['train/grad_norm'] > 1e-3
    moved = jax.tree.map(lambda a, b: np.array(a) - b, clipped.weights, before)
    assert optax.tree.norm(moved) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_frozen_weights_stay_and_have_no_optimizer_state():
    trained = loop(net=STILL, task={'trainable': lambda path: path.startswith('dense')})
    before = jax.tree.map(np.array, trained.weights)
    trained.run(3)
    assert leaves_equal(trained.weights['embedding'], before['embedding'])
    assert not leaves_equal(trained.weights['dense'], before['dense'])
    assert trees.count(trained.opt_state.inner_state[0].mu) == trees.count(before['dense'])
    with pytest.raises(ValueError, match='no weight trains: check the predicate'):
        loop(task={'trainable': lambda path: False})


class Balanced(Layer):
    """Leaves an auxiliary loss, the mean square of its input."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'aux_loss': tl.AuxLoss(jnp.zeros(()))}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, {'aux_loss': tl.AuxLoss(jnp.mean(jnp.square(inputs[0])))}


@pytest.mark.parametrize('accumulate', [1, 2])
def test_auxiliary_losses_are_added(accumulate):
    net = tl.Serial(tl.Embedding(16, 8), Balanced(), tl.Dense(16))
    plain = loop(net=STILL, optimizer=SGD).run(1)['train/loss']
    trained = loop(net=net, optimizer=SGD, task={'accumulate': accumulate})
    x = next(iter(grain_data()))[0]
    aux = np.mean(np.square(np.asarray(trained.weights['embedding']['table'])[x]))
    assert trained.run(1)['train/loss'] == pytest.approx(plain + float(aux), rel=2e-2)
    before = jax.tree.map(np.array, trained.weights)
    trained.run(2)
    assert not leaves_equal(trained.weights, before)


@pytest.mark.parametrize('make', [grain_data, PlainData])
def test_resumes_bit_for_bit(tmp_path, make):
    whole = loop(tmp_path / 'whole', data=make())
    whole.run(12)
    loop(tmp_path / 'parts', data=make(), checkpoint_every=5, log_every=3).run(7)
    resumed = loop(tmp_path / 'parts', data=make())
    assert resumed.step == 7
    resumed.run(12)
    parts = losses_of(tmp_path / 'parts')
    assert list(parts) == [3, 6, 7, 8, 9, 10, 11, 12]
    assert parts == {step: losses_of(tmp_path / 'whole')[step] for step in parts}
    assert leaves_equal(resumed.weights, whole.weights)
    assert leaves_equal(resumed.opt_state, whole.opt_state)


def test_goes_on_in_the_same_object(tmp_path):
    whole, parts = loop(), loop(tmp_path)
    whole.run(6)
    parts.run(2)
    assert parts.run(2) == read_metrics(tmp_path)[-1]
    parts.run(6)
    assert leaves_equal(whole.weights, parts.weights)
    assert list(losses_of(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_rows_after_the_checkpoint_are_dropped_at_resume(tmp_path):
    loop(tmp_path, checkpoint_every=4).run(4)
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 5, "train/loss": 1.0}\n{"step": 6, "trai')  # killed in a line
    loop(tmp_path).run(7)
    rows = read_metrics(tmp_path)
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[4]['train/loss'] != 1.0


def test_killed_while_saving_and_resumed(tmp_path):
    run_dir = tmp_path / 'killed'
    checkpoints = run_dir / 'checkpoints'
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    environment['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # the same programs as in this process
    process = subprocess.Popen([sys.executable, tiny_run.__file__, run_dir], env=environment)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            names = os.listdir(checkpoints) if checkpoints.exists() else []
            complete = [name for name in names if name.isdigit()]
            if len(complete) >= 3 and len(names) > len(complete):
                break
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = loop(run_dir)
    killed_at = resumed.step
    assert killed_at >= 2
    resumed.run(killed_at + 3)
    whole = loop(tmp_path / 'whole')
    whole.run(killed_at + 3)
    assert losses_of(run_dir) == losses_of(tmp_path / 'whole')
    assert leaves_equal(resumed.weights, whole.weights)


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path):
    loop(tmp_path, checkpoint_every=2).run(4)
    weights = tmp_path / 'checkpoints' / '4' / 'weights'
    file = max(weights.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
    file.write_bytes(b'')
    with pytest.raises(UsageError, match=r'/4. is damaged .*: delete .* to continue from step 2$'):
        loop(tmp_path)
    file.unlink()
    subprocess.run(['rm', '-r', tmp_path / 'checkpoints' / '4'], check=True)
    assert loop(tmp_path).step == 2


def test_another_run_in_the_directory(tmp_path):
    loop(tmp_path).run(1)
    said = r"holds another run: model is Serial\(.*\) there, Serial\(.*name='other'.*\) here: go on"
    with pytest.raises(UsageError, match=said):
        loop(tmp_path, net=tl.Serial(tl.Embedding(16, 8, name='other'), tl.Dense(16)))
    with pytest.raises(UsageError, match='the optimizer makes other updates'):
        loop(tmp_path, optimizer=SGD)
    with pytest.raises(UsageError, match='the data begins with other examples'):
        loop(tmp_path, data=PlainData())
    others = tl.Serial(tl.Embedding(16, 8, name='other'), tl.Dense(16))
    with pytest.raises(UsageError, match=r'is of another experiment \(weights/embedding/table is '):
        loop(tmp_path, net=others, allow_changes='model')


class Spoiled:
    """The third batch has an infinite weight."""

    def __iter__(self):
        for i, (x, y, w) in enumerate(PlainData()):
            yield x, y, np.full_like(w, np.inf) if i == 2 else w


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    with pytest.raises(UsageError) as error:
        loop(tmp_path, data=Spoiled(), checkpoint_every=1).run(9)
    assert str(error.value) == (
        f'step 3: the loss is nan (last good checkpoint: step 2, {tmp_path}/checkpoints/2): '
        'a loss weight is inf; check the data'
    )
    assert max(losses_of(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '2']
    with pytest.raises(
        UsageError, match=r'step 3: the loss is nan \(no checkpoint yet\): a loss w'
    ):
        loop(data=Spoiled()).run(9)
    with pytest.raises(
        UsageError, match='lower the learning rate or warm it up, set clip_norm, or l'
    ):
        loop(net=STILL, data=PlainData(), optimizer=optax.sgd(1e38)).run(9)


def test_weights_that_an_update_makes_not_finite_are_not_saved(tmp_path):
    """Tokens that are in no batch have the gradient 0, and 0 / (√0 + 0) is NaN."""
    trained = loop(tmp_path, optimizer=optax.adam(1e-2, eps=0.0), checkpoint_every=1)
    said = r'step 1: embedding/table is not finite after its update \(no checkpoint yet\)'
    for _ in range(2):
        with pytest.raises(UsageError, match=said):
            trained.run(1)
    assert not (tmp_path / 'checkpoints').exists()


def test_a_value_at_a_padded_position_does_not_count():
    (x, y, w), *_ = PlainData(1)
    y = np.where(w == 0, 99, y)  # the loss of such a target is NaN
    assert np.isfinite(loop(net=STILL, data=[(x, y, w)] * 2).run(2)['train/loss'])
    assert loop(net=STILL, data=[(x, y, 0 * w)]).run(1)['train/loss'] == 0


def test_tokens_outside_the_vocabulary():
    x, y, w = next(iter(PlainData()))
    with pytest.raises(UsageError, match='the batch of step 1: token id 16 is outside the vocab'):
        loop(data=[(x + (x == 15), y, w)]).run(1)
    with pytest.raises(UsageError, match=r'the loss is nan .*: target 16 is none of the 16 logits'):
        loop(data=[(x, np.where(y == y.max(), 16, y), np.ones_like(w))]).run(1)


def test_data_that_ends():
    with pytest.raises(UsageError, match='the data ended after 3 batches: repeat it'):
        loop(data=PlainData(3)).run(4)
    with pytest.raises(UsageError, match="EvalTask 'valid': the data holds no batch: check"):
        loop(eval_tasks=EvalTask([], LOSS)).run(1)


def test_an_element_of_the_data_that_is_like_no_other():
    documents = data.bucketed(['ab'] * 6 + [5], [4], [2], shuffle=False)
    net = tl.Serial(tl.Embedding(256, 4), tl.Dense(256))
    with pytest.raises(UsageError, match=r'^batch 4 of the data: a document is a str .*: 5$'):
        loop(net=net, data=documents).run(5)


def test_data_of_the_wrong_form():
    x, y, _ = next(iter(PlainData()))
    with pytest.raises(TypeError, match=r'a batch is 3 arrays .*, and the data yields 2: check'):
        loop(data=[(x, y)])
    with pytest.raises(TypeError, match=r'data must yield tuples of arrays .*, got ndarray'):
        loop(data=[x])
    with pytest.raises(TypeError, match='data must be iterable more than once, and generator is'):
        loop(data=iter(PlainData()))
    with pytest.raises(TypeError, match=r'data must be iterable more than once, and int is not'):
        EvalTask(3, LOSS)


def test_evaluation_is_the_mean_over_all_batches_and_changes_nothing(tmp_path):
    tasks = (eval_task(), eval_task(name='first', n_batches=1, loss_chunk_len=2))
    trained = loop(tmp_path, net=STILL, eval_tasks=tasks, eval_every=2, log_every=100)
    row = trained.run(5)
    assert [r['step'] for r in read_metrics(tmp_path)] == [2, 4, 5]
    for name, n in (('valid', 3), ('first', 1)):
        x, y, w = map(np.concatenate, zip(*PlainData(n), strict=True))
        (logits,), _ = STILL.apply(trained.weights, {}, (jnp.asarray(x),))
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), y[..., None], -1)[..., 0]
        right = np.argmax(np.asarray(logits), -1) == y
        assert row[f'{name}/loss'] == pytest.approx(-np.sum(w * log_p) / w.sum(), rel=1e-5)
        assert row[f'{name}/accuracy'] == pytest.approx(np.sum(w * right) / w.sum(), rel=1e-5)
    without = loop(net=STILL)
    without.run(5)
    assert leaves_equal(without.weights, trained.weights)


def test_a_model_is_where_training_starts_and_keeps_its_weights():
    model = Model(NET).init(next(iter(PlainData()))[0], rng=5)
    before = jax.tree.map(np.array, model.weights)
    trained = loop(net=model)
    assert leaves_equal(trained.weights, before)
    trained.run(2)
    assert leaves_equal(model.weights, before)
    assert not leaves_equal(trained.weights, before)


def test_a_model_that_has_decoded_is_trained_without_its_caches(tmp_path):
    net = tl.Serial(
        tl.Embedding(V, 8), tl.SelfAttention(2), tl.Repeat(tl.BatchNorm(), 11), tl.Dense(V)
    )
    x = next(iter(PlainData()))[0]
    model = Model(net).init(x, mode=Mode.PREDICT)
    model(x, mode=Mode.PREDICT)
    for i in range(11):
        model.state['batch_norm'][str(i)]['mean'] += 7.0 + i
    trained = loop(tmp_path, net=model, optimizer=SGD)
    trained.run(1)
    of_training = init_state(net, x, Mode.TRAIN)
    assert jax.tree.structure(trained.state) == jax.tree.structure(of_training)
    assert (jnp.diff(trained.state['batch_norm']['mean'], axis=0) > 0.5).all()
    assert loop(tmp_path, net=net, optimizer=SGD).step == 1


def test_weights_of_another_layer():
    x = next(iter(PlainData()))[0]
    weights = Model(tl.Serial(tl.Embedding(V, 4), tl.Dense(V))).init(x).weights
    for given, where in (
        (weights, r'dense/kernel is \(4, 16\) and should be \(8, 16\)'),
        ({}, r'dense/bias is absent and should be \(16,\)'),
    ):
        message = rf"the Model's weights are not those of its layer \({where}\): init it, or load"
        with pytest.raises(ValueError, match=message):
            loop(net=Model(NET, given))


def test_equal_seeds_equal_runs():
    runs = [loop(seed=seed) for seed in (0, 0, 1)]
    rows = [run.run(3) for run in runs]
    assert rows[0]['train/loss'] == rows[1]['train/loss'] != rows[2]['train/loss']
    assert leaves_equal(runs[0].weights, runs[1].weights)


def test_keeps_the_last_checkpoints(tmp_path):
    loop(tmp_path, checkpoint_every=2, keep=2).run(7)
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['6', '7']


def test_an_optimizer_that_keeps_the_weights():
    kept = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9)
    assert loop(net=STILL, optimizer=kept).run(2)['step'] == 2


def test_no_cost_beside_the_plain_step():
    trained = loop(net=STILL, optimizer=SGD)
    batch = next(iter(PlainData()))
    lowered = trained._compiled.lower(trained._carry, trained._frozen, trained._key, batch)
    scored = losses.attach(STILL, LOSS)

    def plain(weights, batch):
        def mean(weights):
            (values, w), _ = scored.apply(weights, {}, batch, mode=Mode.TRAIN)
            return jnp.sum(values * w) / jnp.sum(w)

        value, grads = jax.value_and_grad(mean)(weights)
        return value, jax.tree.map(lambda x, g: x - np.float32(0.1) * g, weights, grads)

    flops = [
        step.compile().cost_analysis()['flops']
        for step in (lowered, jax.jit(plain).lower(trained.weights, batch))
    ]
    norm = 2 * trees.count(trained.weights)  # the gradient's norm is the only extra
    positions = 3 * B * tiny_run.L
    assert flops[0] - flops[1] <= norm + positions + 500


@pytest.mark.parametrize(
    ('task', 'error', 'text'),
    [
        ({'optimizer': 'adam'}, TypeError, r"optimizer='adam' is no optax.GradientTransformation"),
        ({'optimizer': optax.adam}, TypeError, 'optimizer=adam is no optax.GradientTransformation'),
        ({'optimizer': optax.adam('abc')}, TypeError, 'must be numbers or schedules, not strings'),
        ({'optimizer': optax.sgd('0.1')}, TypeError, 'must be numbers or schedules, not strings'),
        ({'loss': 'cross_entropy'}, TypeError, "loss: 'cross_entropy' is no metric: give e.g. tl."),
        ({'loss': tl.CrossEntropyLoss}, TypeError, 'loss: CrossEntropyLoss is no metric: give'),
        ({'accumulate': 0}, ValueError, 'accumulate must be at least 1, got 0'),
        ({'accumulate': 2.0}, TypeError, r'TrainTask: accumulate must be an int, got 2\.0$'),
        (
            {'accumulate_dtype': 'float16'},
            TypeError,
            "TrainTask: accumulate_dtype must be 'float32' or 'bfloat16', got 'float16'",
        ),
        ({'clip_norm': '1'}, TypeError, "clip_norm must be a number or None, got '1'"),
        ({'clip_norm': 0.0}, ValueError, 'TrainTask: clip_norm must be above 0, got 0.0'),
        ({'loss_chunk_len': 'a'}, TypeError, "loss_chunk_len must be an int or 'auto' or None"),
        ({'trainable': 'dense'}, TypeError, "trainable='dense': give a function of a path"),
    ],
)
def test_a_train_task_checks_its_arguments(task, error, text):
    with pytest.raises(error, match=text):
        TrainTask(**{'data': PlainData(), 'loss': LOSS, 'optimizer': ADAM, **task})


@pytest.mark.parametrize(
    ('task', 'error', 'text'),
    [
        ({'metrics': ()}, ValueError, 'metrics is empty: give one'),
        ({'metrics': 'loss'}, TypeError, "metrics: 'loss' is no metric"),
        ({'metrics': (LOSS, LOSS)}, ValueError, 'two metrics have one label'),
        ({'name': 'a/b'}, ValueError, "name='a/b': give a word without"),
        ({'name': 'train'}, ValueError, "the name 'train' is that of training"),
        ({'n_batches': 0}, ValueError, 'EvalTask: n_batches must be at least 1, got 0'),
    ],
)
def test_an_eval_task_checks_its_arguments(task, error, text):
    with pytest.raises(error, match=text):
        EvalTask(**{'data': PlainData(3), 'metrics': LOSS, **task})


@pytest.mark.parametrize(
    ('arguments', 'error', 'text'),
    [
        ({'net': tl.Dense}, TypeError, 'is no layer: give e.g. tl.Serial'),
        ({'eval_tasks': (eval_task(), eval_task())}, ValueError, 'two eval_tasks have one name'),
        ({'eval_tasks': LOSS}, TypeError, r'eval_tasks holds CrossEntropyLoss\(\): give EvalTasks'),
        ({'seed': 'a'}, TypeError, "seed='a': give an integer"),
        ({'log_every': 0}, ValueError, 'Loop: log_every must be at least 1, got 0'),
        ({'eval_every': 'a'}, TypeError, "eval_every must be an int or None, got 'a'"),
        ({'keep': None}, TypeError, 'Loop: keep must be an int, got None$'),
    ],
)
def test_a_loop_checks_its_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        loop(**arguments)


def test_an_output_dir_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match=r'cannot write to .*: choose another output_dir'):
        loop(tmp_path / 'file')


def test_the_memory_of_a_run_is_donated():
    trained = loop(net=STILL)
    before = trained.weights
    trained.run(1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_a_later_batch_that_the_model_refuses():
    net = tl.Serial(tl.Embedding(16, 8), tl.LearnedPositions(6), tl.Dense(16))
    short = next(iter(PlainData()))
    long = tuple(np.concatenate([x, x], 1) for x in short)
    said = r'the batch of step 2 has shape \(4, 12\), the first one \(4, 6\), and does not fit the'
    with pytest.raises(UsageError, match=said):
        loop(net=net, data=[short, long]).run(2)
    with pytest.raises(ValueError, match='12'):
        loop(net=net, data=[long])


def test_what_the_machine_refuses_is_one_line(tmp_path, monkeypatch):
    cure = ': put that right, and run again to go on from the last checkpoint'

    def as_tensorstore_says(*_):
        raise ValueError(
            'OUT_OF_RANGE: Error writing "count/0" in OCDBT database at local file "x/": Failed '
            f"to write 92118 bytes to file 15: File too large [os_error_code='{errno.EFBIG}']"
        )

    with monkeypatch.context() as patch:
        patch.setattr('layercomb.supervised.checkpoints.Checkpoints.wait', as_tensorstore_says)
        with pytest.raises(UsageError) as error:
            loop(tmp_path / 'a', net=STILL).run(1)
    assert str(error.value) == os.strerror(errno.EFBIG) + cure

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'metrics.jsonl')

    monkeypatch.setattr('layercomb.supervised.training.MetricsLog.write', full)
    with pytest.raises(UsageError) as error:
        loop(tmp_path / 'b', net=STILL).run(1)
    assert str(error.value) == f'{os.strerror(errno.ENOSPC)} (metrics.jsonl){cure}'


def test_errors_of_programming_stay_what_they_are(monkeypatch):
    def wrong(*_):
        raise ValueError('no error of the machine')

    monkeypatch.setattr('layercomb.supervised.training.Progress.row', wrong)
    with pytest.raises(ValueError, match='no error of the machine'):
        loop(net=STILL).run(1)
