"""What interrupts the data leaves it where it was."""

from __future__ import annotations

import contextlib
import itertools

import grain
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import data, supervised, tl
from layercomb.supervised.batches import Batches


class Seen(tl.Metric):
    """The mean of a batch's inputs, as a model that changes nothing passes them on."""

    def values(self, logits, targets):
        return logits[..., 0]


def batch(i):
    return np.full((2, 1), i, np.float32), np.zeros(2, np.int32), np.ones(2, np.float32)


class Interrupted:
    """Batches 0, 1, 2 …; the making of one of them is interrupted the first time."""

    def __init__(self, at, error):
        self.at, self.error, self.armed = at, error, True

    def __iter__(self):
        for i in itertools.count():
            if i == self.at and self.armed:
                self.armed = False
                raise self.error
            yield batch(i)


class InterruptedSource:
    """Examples by number, with the same fault."""

    def __init__(self, at, error):
        self.at, self.error, self.armed = at, error, True

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == self.at and self.armed:
            self.armed = False
            raise self.error
        return tuple(x[0] for x in batch(i // 2))


def loop(batches, **kwargs):
    model = lc.Model(tl.Dense(1), {'kernel': jnp.ones((1, 1)), 'bias': jnp.zeros(1)})
    task = supervised.TrainTask(batches, Seen(), optax.sgd(0.0))
    return supervised.Loop(model, task, progress=False, log_every=1, **kwargs)


def sources(at, error):
    return {
        'a generator': Interrupted(at, error),
        'data.batches': data.batches(InterruptedSource(2 * at, error), 2, shuffle=False),
        'Grain': grain.MapDataset.source(InterruptedSource(2 * at, error))
        .batch(2)
        .to_iter_dataset(grain.ReadOptions(0, 0)),
    }


@pytest.mark.parametrize('kind', ['a generator', 'data.batches', 'Grain'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('the network is down')])
@pytest.mark.parametrize('at', [1, 3])
def test_the_next_run_goes_on_with_the_batch_that_was_being_made(kind, error, at):
    trained = loop(sources(at, error)[kind])
    with pytest.raises(type(error)):
        trained.run(6)
    assert trained.step == at
    assert trained.run(at + 1)['train/loss'] == at
    assert trained.run(6)['train/loss'] == 5


def test_an_interrupt_in_text_that_is_packed_loses_no_token():
    texts = [b'abcdefgh', b'ijkl', b'mnopqrstuv', b'wxyz']

    class Texts(InterruptedSource):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            super().__getitem__(i)
            return texts[i]

    def packed(at):
        source = Texts(at, KeyboardInterrupt())
        return data.packed(source, 5, 1, shuffle=False, streaming=True, num_epochs=1)

    batches, found = Batches(packed(2)), []
    while len(found) < 5:
        with contextlib.suppress(KeyboardInterrupt):
            found.append(batches.take()[0].tolist())
    assert found == [x.tolist() for x, _, _ in itertools.islice(iter(packed(99)), 5)]


def test_an_interrupt_while_the_place_is_looked_for_loses_nothing_either():
    class Twice:
        """The sixth and the ninth batch that are made at all are interrupted."""

        def __init__(self):
            self.made = 0

        def __iter__(self):
            for i in itertools.count():
                self.made += 1
                if self.made in (6, 9):
                    raise RuntimeError('the network is down')
                yield batch(i)

    trained = loop(Twice())
    for _ in range(2):
        with pytest.raises(RuntimeError, match='network'):
            trained.run(8)
        assert trained.step == 5
    assert trained.run(8)['train/loss'] == 7
    assert trained._batches.taken == 8


def test_a_loop_whose_step_was_cut_in_two_says_so_or_goes_on():
    trained = loop([batch(i) for i in range(6)])
    trained.run(2)
    trained._carry, _ = trained._compiled(
        trained._carry, trained._frozen, trained._key, trained._batches.peek()
    )  # and here Ctrl-C came: the step is not counted yet
    assert trained.run(4)['train/loss'] == 3
    trained._compiled(trained._carry, trained._frozen, trained._key, trained._batches.peek())
    with pytest.raises(lc.UsageError, match=r'interrupted inside a step, .*: make the Loop anew'):
        trained.run(5)


class Counting:
    """Batches whose iterator says by itself where it stands."""

    def __init__(self, state):
        self.state = state

    def __iter__(self):
        return _Counted(self.state)


class _Counted:
    def __init__(self, as_state):
        self.n, self.as_state = 0, as_state

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        return batch(self.n - 1)

    def get_state(self):
        return self.as_state(self.n)

    def set_state(self, state):
        self.n = int(state if isinstance(state, int) else state[-1])


@pytest.mark.parametrize('as_state', [int, lambda n: [n]], ids=['a number', 'a list'])
def test_an_iterator_of_ones_own_may_say_where_it_stands_as_it_likes(tmp_path, as_state):
    loop(Counting(as_state), output_dir=tmp_path).run(3)
    assert loop(Counting(as_state), output_dir=tmp_path).run(4)['train/loss'] == 3


def test_a_position_that_cannot_be_saved_is_refused_when_the_loop_is_made(tmp_path):
    with pytest.raises(TypeError, match='where the data stands cannot be saved: get_state'):
        loop(Counting(np.int64), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    assert loop(Counting(np.int64)).run(2)['train/loss'] == 1


def test_a_step_that_is_interrupted_before_it_is_taken_keeps_its_batch(monkeypatch):
    trained = loop([batch(i) for i in range(6)])
    trained.run(2)
    compiled = trained._compiled

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, '_compiled', interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained.run(3)
    monkeypatch.setattr(trained, '_compiled', compiled)
    assert trained.run(3)['train/loss'] == 2


def test_data_that_has_ended_is_still_said_to_have_ended():
    trained = loop([batch(i) for i in range(3)])
    for _ in range(2):
        with pytest.raises(lc.UsageError, match='the data ended after 3 batches'):
            trained.run(5)


def test_an_interrupted_run_is_saved_where_it_stood(tmp_path):
    trained = loop(Interrupted(3, KeyboardInterrupt()), output_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        trained.run(6)
    resumed = loop([batch(i) for i in range(6)], output_dir=tmp_path)
    assert resumed.step >= 2
    assert resumed.run(resumed.step + 1)['train/loss'] == resumed.step - 1
