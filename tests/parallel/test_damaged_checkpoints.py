"""Damaged checkpoints of several processes: as many processes, or one, refuse them by name."""

import fnmatch
import shutil

import damages
import pytest
import several

pytestmark = pytest.mark.slow

# how, what, what takes its place; what is said to be wrong
DAMAGES = [
    ('delete', 'weights/ocdbt.process_1', '', 'weights/ocdbt.process_1/* is missing'),
    ('delete', 'weights/ocdbt.process_0/d', '', 'weights/ocdbt.process_0/d/* is missing'),
    (
        'truncate', 'weights/ocdbt.process_1/d', '',
        'weights/ocdbt.process_1/d/* differs from what was written',
    ),
    ('truncate', 'opt_state/d', '', 'opt_state/d/* differs from what was written'),
    (
        'replace', 'weights/ocdbt.process_1/d', 'weights/ocdbt.process_0/d',
        'weights/ocdbt.process_1/d/* differs from what was written',
    ),
    ('replace', 'opt_state/d', '../2/opt_state/d', 'opt_state/d/* differs from what was written'),
    ('delete', 'weights/_METADATA', '', 'weights/_METADATA is missing'),
    ('delete', 'weights/manifest.ocdbt', '', 'weights/manifest.ocdbt is missing'),
    ('delete', 'opt_state', '', 'opt_state/crc32.json cannot be read'),
    ('delete', 'record', '', 'its record cannot be read'),
    ('truncate', 'record/metadata', '', 'its record cannot be read'),
    ('replace', 'weights', '../2/weights', 'weights and its record were not written together'),
    (
        'replace', 'record/metadata', '../2/record/metadata',
        '* and its record were not written together',
    ),
]  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of two processes."""
    directory = tmp_path_factory.mktemp('runs') / 'two'
    assert several.together(2, damages.train, str(directory), 4) == [['2', '4']] * 2
    return directory


def check(run, said):
    *of_damages, whole, before = said
    for (how, what, _, wrong), text in zip(DAMAGES, of_damages, strict=True):
        end = 'delete that directory to continue from step 2'
        named = f"*checkpoint '{run}/checkpoints/4' is damaged ({wrong}): {end}"
        assert fnmatch.fnmatchcase(str(text), named), (how, what, text)
    assert (whole, before) == (4, 2)


def test_damages_are_named_by_as_many_processes(run):
    damaged = [d[:3] for d in DAMAGES]
    first, second = several.together(2, damages.each, str(run), damaged)
    check(run, first)
    check(run, second)


def test_damages_are_named_on_another_mesh(run, eight):
    check(run, eight(damages.each, str(run), [d[:3] for d in DAMAGES]))


def test_what_one_process_reads_all_hear(run):
    first, second = several.together(2, damages.read_wrongly, str(run))
    assert first == f'process 1 says: {second}'
    assert 'differs from what was written): delete that directory to continue from' in second


def test_processes_that_see_other_directories(run, tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    shutil.copytree(run / 'checkpoints' / '2', tmp_path / 'checkpoints' / '2')
    for other, its in ((tmp_path, 'step 2'), (tmp_path / 'empty', 'none')):
        made = several.together(2, damages.apart, [str(run), str(other)])
        for text in made:
            assert f'process 0 sees step 4 as the last, process 1 {its}: give an output' in text
