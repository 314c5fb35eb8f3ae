"""A disk that is full when a checkpoint is saved: one line, the same end for all, and a way on."""

import subprocess

import damages
import disks
import pytest
import several

SAID = (
    "step {} cannot be saved in '{}/checkpoints': {}: put that right, and run the same again to go "
    'on from step {}\n'
)


@pytest.fixture
def small(tmp_path):
    """A disk of half a megabyte."""
    command = ['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip('mounting is not permitted')
    yield tmp_path
    subprocess.run(['umount', '-l', str(tmp_path)], check=True)


def ended(n, directory, which):
    """What each process says in the end, and its exit code."""
    processes = several.started(n, disks.fill, str(directory), which)
    try:
        made = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(err, p.returncode) for (_, err), p in zip(made, processes, strict=True)]


def test_one_process(tmp_path):
    ((err, code),) = ended(1, tmp_path, [0])
    assert code == 1  # an error of Python: the command makes a line of it
    assert 'UsageError: ' + SAID.format(6, tmp_path, 'File too large', 4) in err
    assert several.together(1, damages.found, str(tmp_path)) == [4]


@pytest.mark.slow
@pytest.mark.parametrize('which', [[0], [1], [0, 1]])
def test_processes_that_cannot_write(tmp_path, which):
    said = SAID.format(6, tmp_path, 'File too large', 4)
    for i, (err, code) in enumerate(ended(2, tmp_path, which)):
        assert code == 2 and 'Traceback' not in err
        assert f'layercomb: process {i}: ' in err and err.endswith(said), err
        assert i in which or f'layercomb: process {i}: process {which[0]} says: step' in err
    assert several.together(2, damages.found, str(tmp_path)) == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2])
def test_a_disk_that_is_full(small, n):
    made = ended(n, small, [])
    assert [code for _, code in made] == [1 if n == 1 else 2] * n, made
    assert 'No space left on device' in made[0][0]  # of a checkpoint, or of the metrics
    last = max(int(p.name) for p in (small / 'checkpoints').iterdir() if p.name.isdecimal())
    assert several.together(n, damages.found, str(small)) == [last] * n
