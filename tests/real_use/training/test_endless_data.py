"""An evaluation that can never end does not begin without a word."""

from __future__ import annotations

import itertools

import grain
import numpy as np
import pytest

from layercomb import data, supervised, tl
from layercomb.errors import UsageWarning
from layercomb.supervised import evaluation

LOSS = tl.CrossEntropyLoss()
BATCH = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)
ENDLESS = {
    'packed': lambda: data.packed(['text'] * 9, 4, 2),
    'streamed': lambda: data.packed(['text'] * 9, 4, 2, streaming=True),
    'bucketed': lambda: data.bucketed(['text'] * 9, [8], [2]),
    'batches': lambda: data.batches(data.copy(4, 8), 2),
    'Grain': lambda: grain.MapDataset.source([BATCH]).repeat().to_iter_dataset(),
}


class Forever:
    def __iter__(self):
        return itertools.repeat(BATCH)


@pytest.mark.parametrize('kind', ENDLESS)
def test_data_that_repeats_for_ever_is_refused_without_a_number_of_batches(kind):
    with pytest.raises(ValueError, match=r"'valid': the data repeats for ever, .*: give n_batches"):
        supervised.EvalTask(ENDLESS[kind](), LOSS)
    assert supervised.EvalTask(ENDLESS[kind](), LOSS, n_batches=3).n_batches == 3


def test_data_that_ends_is_measured_whole():
    supervised.EvalTask(data.packed(['text'] * 9, 4, 2, num_epochs=1), LOSS)
    supervised.EvalTask(data.batches(data.copy(4, 8, n_examples=9), 2, num_epochs=3), LOSS)
    supervised.EvalTask([BATCH], LOSS)
    first = grain.MapDataset.source([BATCH]).repeat()[:5]
    supervised.EvalTask(first, LOSS)
    supervised.EvalTask(first.to_iter_dataset(), LOSS)
    endless = grain.MapDataset.source([BATCH]).repeat().to_iter_dataset()
    supervised.EvalTask(grain.experimental.LimitIterDataset(endless, 5), LOSS)


def test_a_generator_of_which_nobody_knows_is_spoken_of(monkeypatch):
    monkeypatch.setattr(evaluation, '_MANY', 20)
    task = supervised.EvalTask(Forever(), LOSS)
    net = tl.Dense(2)
    weights = {'kernel': np.ones((3, 2), np.float32), 'bias': np.zeros(2, np.float32)}
    with pytest.raises(UsageWarning, match="'valid': 20 batches so far, and no end: if the data"):
        supervised.evaluate(net, weights, {}, task)
