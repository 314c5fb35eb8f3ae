"""A run goes on as what it was, or says what has changed."""

from __future__ import annotations

import functools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import UsageError, data, optimizers, supervised, tl
from layercomb.errors import UsageWarning
from layercomb.supervised import fingerprint as fingerprints
from layercomb.supervised.checkpoints import Checkpoints

BATCH = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)
LOSS = tl.CrossEntropyLoss()
ONE = {'kernel': jnp.ones((1, 1)), 'bias': jnp.zeros(1)}


class Seen(tl.Metric):
    """The mean of a batch's inputs, as a model that changes nothing passes them on."""

    def values(self, logits, targets):
        return logits[..., 0]


def numbered(n=96, first=0):
    """Examples 0, 1, 2 …"""
    return [(np.full(1, first + i, np.float32), np.int32(0), np.float32(1)) for i in range(n)]


def loop(where, optimizer=None, *, net=None, loss=LOSS, batches=None, task=None, **kwargs):
    optimizer = optimizers.adamw(0.1) if optimizer is None else optimizer
    batches = [BATCH] * 30 if batches is None else batches
    train_task = supervised.TrainTask(batches, loss, optimizer, **(task or {}))
    net = tl.Dense(2) if net is None else net
    return supervised.Loop(net, train_task, output_dir=where, progress=False, **kwargs)


def counting(where, batches, **kwargs):
    net = lc.Model(tl.Dense(1), dict(ONE))
    return loop(where, optax.sgd(0.0), net=net, loss=Seen(), batches=batches, **kwargs)


def kernel(trained):
    return np.array(trained.weights['kernel'])


@pytest.mark.parametrize(
    ('before', 'after', 'said'),
    [
        (optimizers.adamw(0.1), optimizers.adamw(0.0), 'learning_rate is 0.1 there, 0 here'),
        (
            optimizers.adamw(0.1, weight_decay=0.1),
            optimizers.adamw(0.2),
            'learning_rate is 0.1 there, 0.2 here, .* weight_decay is 0.1 there, 0 here',
        ),
        (optimizers.muon(0.02), optimizers.muon(0.01), 'learning_rate is 0.0'),
        (optax.sgd(0.1), optax.sgd(0.2), 'the optimizer makes other updates'),
        (optax.adam(0.1, b1=0.9), optax.adam(0.1, b1=0.8), 'makes other updates'),
        (
            optax.adam(optax.cosine_decay_schedule(0.1, 10)),
            optax.adam(optax.cosine_decay_schedule(0.1, 20)),
            'makes other updates',
        ),
        (
            optimizers.adamw(optimizers.warmup_cosine(0.1, 10)),
            optimizers.adamw(optimizers.warmup_cosine(0.1, 20)),
            'makes other updates',
        ),
        (optax.sgd(0.1), optax.noisy_sgd(0.1, key=1), 'makes other updates'),
        (optax.noisy_sgd(0.1, key=1), optax.noisy_sgd(0.1, key=2), 'makes other updates'),
    ],
)  # fmt: skip
def test_another_optimizer_is_told_by_what_it_computes(tmp_path, before, after, said):
    loop(tmp_path, before).run(2)
    with pytest.raises(UsageError, match=f'{said}.*allow_changes optimizer'):
        loop(tmp_path, after)
    assert loop(tmp_path, before).step == 2


def test_an_optimizer_made_again_from_the_same_numbers_is_the_same(tmp_path):
    for make in (
        lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
        lambda: optax.chain(optax.clip(1.0), optax.lion(0.1)),
        lambda: optimizers.adafactor(0.1),
        lambda: optimizers.muon(0.1),
    ):
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        loop(where, make()).run(1)
        assert loop(where, make()).step == 1


def test_a_learning_rate_that_may_change_is_used_and_moments_stay(tmp_path):
    first = loop(tmp_path, optimizers.adamw(0.1))
    first.run(3)
    second = loop(tmp_path, optimizers.adamw(0.0), allow_changes='optimizer')
    mean = second.opt_state.inner_state[0].mu['kernel']
    assert np.abs(mean).max() > 0 and np.array_equal(
        mean, first.opt_state.inner_state[0].mu['kernel']
    )
    before = kernel(second)
    assert second.run(6)['train/learning_rate'] == 0
    assert np.array_equal(kernel(second), before)
    assert (
        loop(tmp_path, optimizers.adamw(0.0)).step == 6
    )  # what was allowed is what the run is now


def test_an_optimizer_of_another_form_begins_anew(tmp_path):
    loop(tmp_path, optimizers.adamw(0.1)).run(3)
    with pytest.warns(UsageWarning, match='the state of the optimizer .* begins anew'):
        second = loop(tmp_path, optax.sgd(0.5, momentum=0.9), allow_changes=['optimizer'])
    before = kernel(second)
    second.run(4)
    z = BATCH[0] @ before
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    gradient = BATCH[0].T @ (p - np.array([1.0, 0.0])) / 4
    bias_of_first = second.weights['bias']
    assert np.isfinite(bias_of_first).all()
    moved = kernel(second) - before
    assert np.sign(moved).tolist() == np.sign(-gradient).tolist()


@pytest.mark.parametrize('as_list', [False, True], ids=['data.batches', 'a list'])
@pytest.mark.parametrize(
    'size', [4, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 24))]
)
def test_after_a_change_of_batch_size_the_next_unseen_example_comes_next(tmp_path, size, as_list):
    def of(batch_size):
        if not as_list:
            return data.batches(numbered(), batch_size, shuffle=False)
        rows = [numbered()[i : i + batch_size] for i in range(0, 96, batch_size)]
        return [tuple(np.stack(x) for x in zip(*batch, strict=True)) for batch in rows]

    assert counting(tmp_path, of(8)).run(3)['train/loss'] == np.mean(range(16, 24))
    with pytest.raises(UsageError, match=f'batch_size is 8 there, {size} here'):
        counting(tmp_path, of(size))
    seen = counting(tmp_path, of(size), allow_changes='batch_size').run(4)['train/loss']
    assert seen == np.mean(range(24, 24 + size))
    again = counting(tmp_path, of(size))  # what it counts now is resumed as well
    assert again.run(5)['train/loss'] == np.mean(range(24 + size, 24 + 2 * size))


def test_a_batch_size_that_does_not_divide_what_was_seen(tmp_path):
    counting(tmp_path / 'a', data.batches(numbered(), 8, shuffle=False)).run(3)
    of_five = counting(
        tmp_path / 'a', data.batches(numbered(), 5, shuffle=False), allow_changes='batch_size'
    )
    assert of_five.run(4)['train/loss'] == np.mean(range(24, 29))
    rows = [tuple(np.stack(x) for x in zip(*numbered(n, 8 * i), strict=True))
            for i in range(8) for n in (8,)]  # fmt: skip
    counting(tmp_path / 'b', rows).run(3)
    fives = [tuple(x[:5] for x in batch) for batch in rows]
    with pytest.raises(UsageError, match='24 examples were taken, and batches of 5 do not end'):
        counting(tmp_path / 'b', fives, allow_changes='batch_size')


def test_text_in_buckets_loses_and_repeats_nothing_when_the_batch_size_changes():
    words = ['a' * (1 + i % 7) for i in range(40)]

    def of(size):
        given = data.bucketed(words, [4, 8], [size, size], shuffle=False, num_epochs=1)
        return iter(given)

    def lengths(batches):
        return [int(w) for _, _, weights in batches for w in weights.sum(1) if w]

    all_of_them = sorted(lengths(of(3)))
    first = of(6)
    begun = lengths([next(first), next(first)])
    second = of(2)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert sorted(begun + lengths(second)) == all_of_them


def test_the_position_of_earlier_versions_counts_batches():
    batches = iter(data.batches(numbered(), 4, shuffle=False))
    batches.set_state({'next_index': 3})
    assert next(batches)[0][0, 0] == 12


def test_raw_grain_data_counts_batches_so_their_size_stays(tmp_path):
    def of(size):
        return grain.MapDataset.source(numbered()).batch(size).to_iter_dataset()

    counting(tmp_path, of(8)).run(3)
    assert counting(tmp_path, of(8)).run(4)['train/loss'] == np.mean(range(24, 32))
    with pytest.raises(UsageError, match='counts batches, so their size cannot change'):
        counting(tmp_path, of(4), allow_changes='batch_size')


def test_other_data_is_refused_or_begun_at_its_beginning(tmp_path):
    counting(tmp_path, data.batches(numbered(), 8, shuffle=False)).run(3)
    other = data.batches(numbered(first=100), 8, shuffle=False)
    with pytest.raises(UsageError, match=r'the data has other examples.*changes data'):
        counting(tmp_path, other)
    shuffled = data.batches(numbered(), 8, seed=5)
    with pytest.raises(UsageError, match='the data has other examples, or another order'):
        counting(tmp_path, shuffled)
    begun = counting(tmp_path, other, allow_changes='data')
    assert begun.run(4)['train/loss'] == np.mean(range(100, 108))


def test_another_length_of_windows_is_named(tmp_path):
    net = tl.Serial(tl.Embedding(256, 4), tl.Dense(256))

    def of(length):
        return data.packed(['some text, and more of it'] * 9, length, 2)

    loop(tmp_path, optax.sgd(0.1), net=net, batches=of(8)).run(1)
    with pytest.raises(UsageError, match=r'the data has 30 examples there, 39 here'):
        loop(tmp_path, optax.sgd(0.1), net=net, batches=of(6))


def test_another_loss_is_refused_and_used_when_allowed(tmp_path):
    loop(tmp_path, optax.sgd(0.0)).run(1)
    smooth = tl.CrossEntropyLoss(label_smoothing=0.5)
    with pytest.raises(UsageError, match=r'loss is CrossEntropyLoss\(\) there, .*\(0.5\) here'):
        loop(tmp_path, optax.sgd(0.0), loss=smooth)
    allowed = loop(tmp_path, optax.sgd(0.0), loss=smooth, allow_changes='loss')
    z = BATCH[0] @ kernel(allowed) + np.array(allowed.weights['bias'])
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -(0.5 * log_p[:, 0] + 0.5 * log_p.mean(-1)).mean()
    assert allowed.run(2)['train/loss'] == pytest.approx(expected, rel=1e-5)


def test_another_seed_is_refused_and_draws_anew_when_allowed(tmp_path):
    net = tl.Serial(tl.Dropout(0.5), tl.Dense(2))
    same = {'net': net, 'optimizer': optax.sgd(0.0)}
    trained = loop(tmp_path, **same)
    trained.run(2)
    with pytest.raises(UsageError, match='seed is 0 there, 7 here'):
        loop(tmp_path, **same, seed=7)
    values = [
        loop(tmp_path, **same, seed=seed, allow_changes='seed', checkpoint_every=None)
        for seed in (0, 7)
    ]
    keys = [jax.random.key_data(each._key).tolist() for each in values]
    assert keys[0] == jax.random.key_data(trained._key).tolist() != keys[1]


def test_an_optimizer_that_draws_goes_on_drawing_the_same(tmp_path):
    noisy = optax.noisy_sgd(0.1, key=1)
    whole = loop(None, noisy)
    whole.run(4)
    loop(tmp_path, noisy).run(2)
    parts = loop(tmp_path, noisy)
    parts.run(4)
    assert np.array_equal(kernel(parts), kernel(whole))


def test_a_change_of_the_model_that_keeps_its_shapes_is_named(tmp_path):
    def net(rate):
        return tl.Serial(tl.Dense(8), tl.Dropout(rate), tl.Dense(2))

    loop(tmp_path, net=net(0.1)).run(1)
    with pytest.raises(UsageError, match=r'model is .*Dropout\(0.1\).* there, .*Dropout\(0.2\)'):
        loop(tmp_path, net=net(0.2))
    assert loop(tmp_path, net=net(0.2), allow_changes='model,seed').run(2)['step'] == 2


def test_other_weights_that_train_are_named(tmp_path):
    loop(tmp_path, optax.adam(0.1)).run(1)
    task = {'trainable': lambda path: path == 'kernel'}
    with pytest.raises(UsageError, match='other weights train'):
        loop(tmp_path, optax.adam(0.1), task=task)
    with pytest.warns(UsageWarning, match='begins anew, since .* other weights train'):
        frozen = loop(tmp_path, optax.adam(0.1), task=task, allow_changes='trainable')
    before = np.array(frozen.weights['bias'])
    frozen.run(3)
    assert np.array_equal(frozen.weights['bias'], before)


def test_weights_that_a_model_brings_are_not_passed_over(tmp_path):
    counting(tmp_path, data.batches(numbered(), 8)).run(1)
    other = lc.Model(tl.Dense(1), {'kernel': jnp.full((1, 1), 2.0), 'bias': jnp.zeros(1)})
    same = {'optimizer': optax.sgd(0.0), 'loss': Seen(), 'batches': data.batches(numbered(), 8)}
    with pytest.raises(UsageError, match=r'the Model brings other weights \(give its layer alone'):
        loop(tmp_path, net=other, **same)
    with pytest.raises(UsageError, match='the Model brings other weights'):
        loop(tmp_path, net=other, allow_changes='all', **same)  # or they would be passed over
    assert loop(tmp_path, net=tl.Dense(1), **same).weights['kernel'] == 1


def test_how_a_run_is_computed_may_change(tmp_path):
    loop(tmp_path, optax.sgd(0.1)).run(1)
    how = {'accumulate': 2}
    assert loop(tmp_path, optax.sgd(0.1), task=how, keep=1, log_every=1).run(2)['step'] == 2


@pytest.mark.parametrize(('before', 'after'), [(4, 'auto'), ('auto', 4), (4, 5)])
def test_pieces_that_the_platform_chooses_are_no_other_model(tmp_path, before, after):
    one = np.ones((4, 6, 3), np.float32), np.zeros((4, 6), np.int32), np.ones((4, 6), np.float32)
    loop(tmp_path, net=tl.Chunk(tl.Dense(2), before), batches=[one] * 3).run(1)
    other = functools.partial(loop, tmp_path, net=tl.Chunk(tl.Dense(2), after), batches=[one] * 3)
    if 'auto' in (before, after):
        assert other(keep=1, log_every=1).run(2)['step'] == 2
    else:
        with pytest.raises(UsageError, match=r'model is Chunk\(Dense\(2\), 4\) there'):
            other()


def test_a_checkpoint_that_does_not_say_what_it_is_made_of_is_gone_on_with_and_said(tmp_path):
    old = loop(tmp_path)
    old._made_of = None  # as earlier versions wrote it
    old.run(1)
    with pytest.warns(UsageWarning, match='does not say what the run was made of.*make sure'):
        assert loop(tmp_path, optimizers.adamw(0.3)).step == 1


def test_programs_of_other_versions_of_jax_cannot_be_compared_which_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, '_versions', lambda: {'jax': '0.9', 'optax': '0.2'})
        loop(tmp_path, optax.sgd(0.1)).run(1)
    assert loop(tmp_path, optax.sgd(0.1)).step == 1  # the programs are equal all the same
    with pytest.warns(UsageWarning, match=r'made by .*jax 0.9, optax 0.2, and these are others'):
        assert loop(tmp_path, optax.sgd(0.2)).step == 1


def test_a_fingerprint_names_no_place_in_files_or_memory(tmp_path):
    net = tl.Serial(tl.Fn('Half', lambda x: x / 2), tl.Fn('Relu', jax.nn.relu), tl.Dense(2))
    loop(tmp_path, optimizers.muon(optimizers.warmup_cosine(0.1, 10)), net=net).run(1)
    record, _ = Checkpoints(tmp_path / 'checkpoints').record(1)
    text = json.dumps(record['made_of'])
    assert record['made_of']['versions'].keys() == {'layercomb', 'jax', 'optax', 'x64'}
    for trace in ('0x', '.py', 'layercomb.', str(tmp_path)):
        assert trace not in text


def test_the_same_run_in_another_console_or_without_jit_is_the_same(tmp_path, monkeypatch):
    tables = jnp.array([0.1, 0.2])
    optimizer = optax.sgd(jax.jit(lambda count: tables[count % 2]))
    loop(tmp_path, optimizer).run(1)
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    assert loop(tmp_path, optimizer).step == 1
    with jax.disable_jit():
        assert loop(tmp_path, optimizer).step == 1


def test_numbers_in_a_compiled_part_of_an_optimizer_are_seen(tmp_path):
    def of(*rates):
        rates = jnp.array(rates)
        return optax.sgd(jax.jit(lambda count: rates[count % 2]))

    loop(tmp_path, of(0.1, 0.2)).run(1)
    with pytest.raises(UsageError, match='makes other updates'):
        loop(tmp_path, of(0.1, 0.9))
    assert loop(tmp_path, of(0.1, 0.2)).step == 1


def test_an_optimizer_that_holds_a_key_is_known_by_it(tmp_path):
    def of(seed):
        return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(seed)), optax.sgd(0.1))

    loop(tmp_path, of(3)).run(1)
    with pytest.raises(UsageError, match='makes other updates'):
        loop(tmp_path, of(4))
    assert loop(tmp_path, of(3)).run(2)['step'] == 2


def test_hyperparameters_that_are_arrays_are_used_when_allowed(tmp_path):
    def of(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=jnp.full((1,), rate))

    loop(tmp_path, of(0.5)).run(1)
    with pytest.raises(UsageError, match=r'learning_rate is 0\.5 there, 0\.25 here'):
        loop(tmp_path, of(0.25))
    second = loop(tmp_path, of(0.25), allow_changes='optimizer')
    assert second.opt_state.hyperparams['learning_rate'].tolist() == [0.25]


@pytest.mark.parametrize(
    'changed',
    [
        lambda: data.batches(data.copy(8, 16, n_examples=120), 4),
        lambda: data.batches(data.copy(8, 16, n_examples=100), 4, seed=1),
        lambda: data.batches(data.copy(8, 16, n_examples=100, seed=1), 4),
        lambda: data.batches(data.copy(8, 16, n_examples=100), 4, shuffle=False),
    ],
    ids=['more examples', 'another order', 'other examples', 'no order'],
)
def test_data_that_changed_behind_its_first_batch_is_noticed(tmp_path, changed):
    net = tl.Serial(tl.Embedding(16, 4), tl.Dense(16))
    begun = data.batches(data.copy(8, 16, n_examples=100), 4)
    same = {'optimizer': optax.sgd(0.1), 'net': net}
    loop(tmp_path, batches=begun, **same).run(2)
    with pytest.raises(UsageError, match=r'the data has .*allow_changes data'):
        loop(tmp_path, batches=changed(), **same)
    again = data.batches(data.copy(8, 16, n_examples=100), 4, num_epochs=9)  # the first the same
    assert loop(tmp_path, batches=again, **same).step == 2


def test_buckets_of_other_sizes_are_another_batch_size_and_no_other_data(tmp_path):
    net = tl.Serial(tl.Embedding(256, 4), tl.Dense(256))
    words = ['a' * (1 + i % 9) for i in range(40)]
    same = {'optimizer': optax.sgd(0.1), 'net': net}

    def of(sizes):
        return data.bucketed(words, [4, 10], sizes, shuffle=False)

    first = loop(tmp_path, batches=of([8, 8]), **same)
    first.run(3)
    with pytest.raises(UsageError, match=r'batch_size is .* there, .* here: go on'):
        loop(tmp_path, batches=of([4, 8]), **same)
    second = loop(tmp_path, batches=of([4, 8]), allow_changes='batch_size', **same)
    read = first._batches.position()['state']['next']
    assert second._batches.position()['state']['next'] == read


def test_another_number_of_hosts_with_the_same_batches_together(tmp_path):
    def of(size, shard):
        return data.batches(numbered(), size, shuffle=False, shard=shard)

    counting(tmp_path, of(4, (0, 2))).run(3)
    assert counting(tmp_path, of(8, (0, 1))).run(4)['train/loss'] == np.mean(range(24, 32))


def test_no_example_is_lost_at_the_end_when_the_batch_size_changes():
    def of(size):
        return iter(data.batches(numbered(20), size, shuffle=False, num_epochs=1))

    first, second = of(8), of(5)
    next(first)
    second.set_state(first.get_state())
    rest = [(x[:, 0].tolist(), w.tolist()) for x, _, w in second]
    seen = [int(i) for xs, ws in rest for i, w in zip(xs, ws, strict=True) if w]
    assert seen == list(range(8, 20)) and [len(xs) for xs, _ in rest] == [5, 5, 5]


def test_a_model_in_bfloat16_goes_on(tmp_path):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ONE)
    same = {'optimizer': optax.sgd(0.0), 'loss': Seen(), 'batches': data.batches(numbered(), 8)}
    with jax.numpy_dtype_promotion('standard'):
        loop(tmp_path, net=lc.Model(tl.Dense(1), narrow), **same).run(1)
        assert loop(tmp_path, net=lc.Model(tl.Dense(1), narrow), **same).step == 1


def test_a_change_that_no_part_is_called_by(tmp_path):
    with pytest.raises(ValueError, match="allow_changes: 'lr' is none of model, loss"):
        loop(tmp_path, allow_changes='lr')
    assert not list(tmp_path.iterdir())


def test_numpy_integers_are_integers(tmp_path):
    small = {'seed': np.int64(3), 'log_every': np.int32(1), 'keep': np.uint8(2)}
    task = {'accumulate': np.int64(2), 'clip_norm': np.float32(1.0)}
    assert loop(tmp_path, task=task, **small).run(np.int64(2))['step'] == 2
