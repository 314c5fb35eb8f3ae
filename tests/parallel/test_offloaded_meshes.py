"""Training on a mesh with blocks in host memory: the losses of one device."""

import pytest
import runs

MESHES = {
    'data': (4, 1, 1), 'fsdp': (1, 4, 1), 'both': (2, 4, 1), 'sequence': (1, 2, 1, 2),
}  # fmt: skip
BLOCKS = {'offload': 'blocks'}


def train(eight, name, mesh, **options):
    return eight(runs.train, name, mesh, 3, None, options)


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        ('transformer', 'data'), ('transformer', 'sequence'), ('reformer', 'both'),
        ('mixture', 'both'), ('batch_norm', 'both'), ('tied', 'both'),
    ],
)  # fmt: skip
def test_losses_are_those_of_one_device(eight, name, mesh):
    alone = train(eight, name, None)
    assert train(eight, name, MESHES[mesh], **BLOCKS) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize('optimizer', ['muon', 'adamw/8'])
def test_optimizers_that_look_at_whole_matrices(eight, optimizer):
    given = {'optimizer': optimizer, **BLOCKS}
    one, many = (train(eight, 'transformer', mesh, **given) for mesh in (None, (2, 4, 1)))
    assert many == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize(
    ('options', 'by_parts'),
    [
        ({}, True),
        ({'offload_dtype': 'bfloat16'}, True),
        ({'optimizer': 'muon'}, False),
        ({'optimizer': 'adafactor'}, False),
        ({'optimizer': 'adamw/8'}, False),  # a block of 256 numbers would be cut
        ({'optimizer': 'adamw/16'}, True),
    ],
)
def test_a_device_holds_its_part_and_may_move_it_alone(eight, options, by_parts):
    found, share = eight(_offloaded, (1, 4, 1), options)
    assert found == by_parts
    assert share < 0.3 or options.get('optimizer') in ('adafactor', 'adamw/8')


def _offloaded(sizes, options):
    return runs.offloaded(sizes, **options)


def test_blocks_in_bfloat16(eight):
    given = {'offload_dtype': 'bfloat16', **BLOCKS}
    one, many = (train(eight, 'reformer', mesh, **given) for mesh in (None, (2, 4, 1)))
    assert many == pytest.approx(one, rel=1e-5)


def test_a_run_is_switched(eight, tmp_path):
    whole = eight(runs.train, 'transformer', None, 4)
    ways = ((1, 4, 1), BLOCKS), (None, BLOCKS), ((2, 2, 1), {}), ((2, 4, 1), BLOCKS)
    found = []
    for until, (mesh, options) in enumerate(ways, 1):
        *losses, last = eight(runs.train, 'transformer', mesh, until, tmp_path, dict(options))
        found += losses
    assert [*found, last] == pytest.approx(whole, rel=1e-5)


def test_a_mesh_with_tensor_is_refused(eight):
    with pytest.raises(ValueError, match='is for a mesh of data, fsdp and sequence, and this'):
        train(eight, 'transformer', (1, 1, 2), **BLOCKS)


def test_streams_are_for_one_device(eight):
    said = eight(runs.raised, runs.loop_with_streams, (1, 2, 1))
    assert said.startswith("ValueError: offload='streams' is for one device: leave out mesh")
    assert eight(runs.raised, runs.loop_with_streams, (1, 1, 1)) is None
