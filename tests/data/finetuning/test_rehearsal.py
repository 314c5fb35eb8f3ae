"""`packed_documents(rehearsal=…)`: pieces of other text in what a row leaves free."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from layercomb import data
from layercomb.errors import UsageError

LENGTH = 32


def of_ones(sizes, start):
    """Documents of distinct tokens, all of which are learnt."""
    made = []
    for size in sizes:
        weights = np.ones(size, np.float32)
        weights[0] = 0
        made.append((np.arange(start, start + size, dtype=np.int32), weights))
        start += size
    return made


MANY = of_ones(np.random.default_rng(0).integers(2, 12, 100).tolist(), 1)
OTHERS = of_ones([70, 1, 5, 40], 10_000)


def batches(n=None, *, batch_size=2, share=0.25, **options):
    made = data.packed_documents(
        MANY, LENGTH, batch_size, rehearsal=OTHERS, rehearsal_share=share, **options
    )
    return list(islice(made, n))


def rows(made):
    """(inputs, segments, targets, weights) of each row."""
    return [row for batch in made for row in zip(*batch, strict=True)]


@pytest.mark.parametrize('share', [0.0, 0.25, 0.6])
def test_each_row_is_full_and_has_its_share(share):
    found = rows(batches(num_epochs=1, share=share))
    for inputs, segments, targets, weights in found:
        if not (inputs < 10_000).any():
            continue
        assert (weights == 1).all() and (segments[0], (np.diff(segments) >= 0).all()) == (1, True)
        kept = (inputs >= 10_000).sum()
        assert kept >= int(share * LENGTH) or segments[inputs < 10_000].max() == 1
        inside = np.diff(segments) == 0
        assert (targets[:-1][inside] == inputs[1:][inside]).all()
    learnt = np.concatenate([row[2][row[2] < 10_000] for row in found if row[3].any()])
    wanted = np.concatenate([ids[1:] for ids, _ in MANY])
    assert sorted(learnt.tolist()) == sorted(wanted.tolist())  # each document once


def test_other_text_goes_on_where_the_row_before_ended_and_begins_anew():
    found = rows(batches(40, shuffle=False))
    targets = np.concatenate([row[2][row[2] >= 10_000] for row in found])
    wanted = np.concatenate([ids[1:] for ids, _ in OTHERS])
    assert targets.size > 2 * wanted.size
    np.testing.assert_array_equal(targets, np.resize(wanted, targets.size))


def test_other_text_may_weigh_less():
    (batch,) = batches(1, rehearsal_weight=0.5)
    other = batch[0] >= 10_000
    assert other.any() and (batch[3][other] == 0.5).all() and (batch[3][~other] == 1).all()


def test_an_epoch_is_one_of_the_documents():
    (batch,) = batches(num_epochs=1, batch_size=200)
    assert not batch[3][-1].any()  # the rows at its end are empty, and not filled
    assert len(batches(num_epochs=2)) >= 2 * len(batches(num_epochs=1)) - 1


@pytest.mark.parametrize('after', [0, 1, 7])
def test_resuming_is_exact(after):
    dataset = data.packed_documents(MANY, LENGTH, 2, rehearsal=OTHERS)
    iterator = iter(dataset)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(islice(iterator, 12))
    again = iter(dataset)
    next(again)
    again.set_state(state)
    for batch, wanted in zip(islice(again, 12), rest, strict=True):
        assert all((x == y).all() for x, y in zip(batch, wanted, strict=True))


def test_hosts_share_rows():
    alone = batches(10, batch_size=4)
    parts = [batches(10, batch_size=2, shard=(i, 2)) for i in range(2)]
    for whole, *shares in zip(alone, *parts, strict=True):
        for i, share in enumerate(shares):
            assert all((x[i::2] == y).all() for x, y in zip(whole, share, strict=True))


def test_it_is_a_part_of_what_the_data_is():
    def identity(**options):
        return data.packed_documents(MANY, LENGTH, 2, **options).identity()

    with_it = identity(rehearsal=OTHERS)
    assert with_it['rehearsal'] != identity(rehearsal=OTHERS, rehearsal_weight=0.5)['rehearsal']
    assert identity() == {k: v for k, v in with_it.items() if k != 'rehearsal'}
    assert with_it['rehearsal'] != identity(rehearsal=OTHERS[:2])['rehearsal']
    assert with_it['rehearsal'] != identity(rehearsal=OTHERS, rehearsal_share=0.5)['rehearsal']


def test_what_cannot_be_rehearsed():
    with pytest.raises(TypeError, match=r'rehearsal takes documents \(ids, weights\)'):
        data.packed_documents(MANY, LENGTH, 2, rehearsal=['text'])
    ids = np.arange(50)
    answers = (ids, (ids > 40).astype(np.float32))
    with pytest.raises(UsageError, match='answers could lose their questions: give text of which'):
        data.packed_documents(MANY, LENGTH, 2, rehearsal=[answers])
    later = data.packed_documents(MANY, LENGTH, 2, rehearsal=[*OTHERS, answers], shuffle=False)
    with pytest.raises(UsageError, match='rehearsal is cut to fit'):
        list(islice(later, 40))
    with pytest.raises(ValueError, match='packed_documents: rehearsal is empty'):
        data.packed_documents(MANY, LENGTH, 2, rehearsal=[])
    with pytest.raises(ValueError, match='packed_documents: rehearsal_share must be'):
        data.packed_documents(MANY, LENGTH, 2, rehearsal=OTHERS, rehearsal_share=2)
    nothing = data.packed_documents(MANY, LENGTH, 2, rehearsal=OTHERS[1:2])
    with pytest.raises(UsageError, match='its documents have no text: give others'):
        next(iter(nothing))


def test_the_manual_is_english_text():
    documents = data.python_manual(data.ByteTokenizer())
    texts = [bytes(ids[:-1].tolist()).decode() for ids, _ in documents]
    assert len(texts) > 50 and sum(map(len, texts)) > 300_000
    assert all(ids[-1] == 0 and weights[1:].all() for ids, weights in documents)
    assert sum(' the ' in text for text in texts) > 50
