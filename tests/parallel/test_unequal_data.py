"""Processes whose data is of unequal length: evaluated as by one, and in training told."""

import pytest
import several
import unequal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    'sizes',
    [
        [[(0, 4), (1, 4), (2, 3)], [(3, 4)]],
        [[(0, 4)], [(1, 3), (2, 4, 8), (3, 1, 8)]],  # others are shorter than any of the first's
    ],
)
def test_evaluation_goes_through_all(sizes, eight):
    first, second = several.together(2, unequal.measured, sizes)
    assert first == second == pytest.approx(eight(unequal.measured, sizes), rel=1e-6)


def test_batches_that_differ_in_more_than_rows():
    sizes = [[(0, 4), (1, 4)], [(2, 4), (3, 4, 8)]]
    said = (
        "EvalTask 'valid', batch 2: process 0 has int32[…,16] int32[…,16] float32[…,16], process 1 "
        'int32[…,8] int32[…,8] float32[…,8]: batches may differ in their rows alone'
    )
    assert several.together(2, unequal.measured, sizes) == [said] * 2


def test_first_batches_of_unequal_rows():
    said = (
        'the batch of step 1: process 0 has int32[4,16] int32[4,16] float32[4,16], process 1 '
        'int32[2,16] int32[2,16] float32[2,16]: all must bring as many rows'
    )
    assert several.together(2, unequal.begun, [4, 2]) == [said] * 2


@pytest.mark.parametrize('short', [0, 1])
def test_training_data_that_ends_in_one_process(short):
    n_batches = [40, 40]
    n_batches[short] = 12
    processes = several.started(2, unequal.train, n_batches)
    made = [p.communicate(timeout=100)[1] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], made
    assert f'layercomb: process {short}: the data ended after 12 batches: repeat it' in made[short]
    assert f'process {1 - short}: another process of the run has ended' in made[1 - short]
