"""Training on a mesh: the losses of one device, and a part of the bytes."""

import pytest
import runs

DEEP = ('deep_2', 'deep_10')
MESHES = {'data': (4, 1, 1), 'fsdp': (1, 4, 1), 'tensor': (1, 1, 2), 'all': (2, 2, 2)}


@pytest.fixture(scope='module')
def alone(pool):
    """The losses on one device, by model."""
    import worker

    names = [n for n in runs.NETS if not n.startswith('deep')]
    return {n: pool.submit(worker.quick, runs.train, n, None).result() for n in names}


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        *(('transformer', mesh) for mesh in MESHES),
        *(
            (n, 'all')
            for n in runs.NETS
            if n not in ('transformer', 'dropout', 'deep_2', 'deep_10')
        ),
        ('reformer', 'fsdp'),
        ('tied', 'fsdp'),
    ],
)
def test_losses_are_those_of_one_device(eight, alone, name, mesh):
    assert eight(runs.train, name, MESHES[mesh]) == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize('optimizer', ['muon', 'adafactor'])
def test_optimizers_that_look_at_whole_matrices(eight, optimizer):
    given = 3, None, {'optimizer': optimizer, 'clip_norm': 0.1}
    one, many = (eight(runs.train, 'transformer', mesh, *given) for mesh in (None, (2, 2, 2)))
    assert many == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize('optimizer', ['adamw/8', 'adamw/16', 'muon/8', 'sm3'])
def test_narrow_moments_are_those_of_one_device(eight, optimizer):
    given = 3, None, {'optimizer': optimizer}
    one, many = (eight(runs.train, 'transformer', mesh, *given) for mesh in (None, (2, 2, 2)))
    assert many == pytest.approx(one, rel=1e-4)


def test_a_device_holds_its_part_of_narrow_moments(eight):
    for bits in (8, 16):
        own, whole = eight(runs.bytes_a_device, 'transformer', (1, 4, 2), f'adamw/{bits}')
        assert own <= 1.9 * whole / 8


def test_sums_in_bfloat16_are_near_those_of_one_device(eight):
    given = 3, None, {'accumulate': 2, 'n_rows': 16, 'accumulate_dtype': 'bfloat16'}
    one, many = (eight(runs.train, 'transformer', mesh, *given) for mesh in (None, (2, 2, 2)))
    assert many == pytest.approx(one, rel=1e-2)


def test_accumulation_cuts_the_rows_of_each_device(eight):
    given = 3, None, {'accumulate': 2, 'n_rows': 16}
    one, many = (eight(runs.train, 'transformer', mesh, *given) for mesh in (None, (2, 4, 1)))
    assert many == pytest.approx(one, rel=1e-5)


def test_gradients_of_narrow_weights_are_as_near_as_those_of_one_device(eight):
    one = eight(runs.far_from_float32, 'transformer', None)
    for mesh in ((8, 1, 1), (1, 8, 1), (2, 4, 1)):
        assert eight(runs.far_from_float32, 'transformer', mesh) <= 1.05 * one
        assert max(eight(runs.large_and_small, mesh).values()) < 2**-8  # rounded once


def test_gradients_of_narrow_weights_are_summed_in_float32(eight):
    """XLA for CPUs sums bfloat16 in float32 by itself; others sum in what they are given."""
    for mesh in ((8, 1, 1), (1, 8, 1), (2, 4, 1)):
        found = eight(runs.dtypes_of_sums, mesh)
        assert {kind for kind, _ in found} == {'f32'}
        assert any(name == 'reduce_scatter' for _, name in found) == (mesh[1] > 1)


@pytest.mark.parametrize('bits', [4, 8])
def test_adapters_beside_narrow_weights(eight, bits):
    one, many = (eight(runs.adapters, mesh, bits) for mesh in (None, (2, 2, 2)))
    assert many == pytest.approx(one, rel=1e-5)


def test_devices_draw_different_masks(eight, alone):
    """With one mask for all, equal rows on two devices would have equal losses and gradients."""
    assert eight(runs.masks) == 8
    assert eight(runs.train, 'dropout', (4, 1, 1)) != pytest.approx(alone['dropout'], rel=1e-5)


@pytest.mark.parametrize('name', ['transformer', 'llama', 'reformer', 'terraformer'])
def test_a_device_holds_its_part(eight, name):
    for mesh, n in (((1, 8, 1), 8), ((1, 4, 2), 8)):
        own, whole = eight(runs.bytes_a_device, name, mesh)
        assert whole / n <= own <= 1.6 * whole / n  # vectors are whole everywhere


def test_weights_are_gathered_a_block_at_a_time(eight_optimized):
    """No gather gives stacked weights, and gradients are scattered block by block."""
    found = eight_optimized(runs.collectives, 'transformer', (1, 4, 1))
    gathers = {shape for kind, shape in found if kind == 'all-gather'}
    assert found['all-gather', 'f32[32,64]'] >= 2  # a feed-forward's, forward and again backward
    assert not any(shape.startswith('f32[2,') for shape in gathers)  # two blocks are stacked
    assert any(kind == 'reduce-scatter' for kind, _ in found)
    assert not any(kind == 'all-to-all' for kind, _ in found)


def test_a_layer_of_ones_own_is_cut_and_gathered(eight):
    one, many = (eight(runs.train, 'own', mesh) for mesh in (None, (2, 2, 2)))
    assert many == pytest.approx(one, rel=1e-5)


def test_a_run_goes_on_on_another_mesh(eight, tmp_path, alone):
    whole = eight(runs.train, 'transformer', None, 4)
    eight(runs.train, 'transformer', (2, 2, 2), 2, str(tmp_path))
    assert eight(runs.train, 'transformer', (1, 4, 1), 3, str(tmp_path))[0] == pytest.approx(
        whole[2], rel=1e-5
    )
    rest = eight(runs.train, 'transformer', None, 4, str(tmp_path))
    assert rest == pytest.approx(whole[3:], rel=1e-5)


def test_a_resumed_run_on_one_mesh_is_bitwise_the_same(eight, tmp_path):
    whole = eight(runs.train, 'reformer', (1, 4, 1), 4)
    eight(runs.train, 'reformer', (1, 4, 1), 2, str(tmp_path))
    assert eight(runs.train, 'reformer', (1, 4, 1), 4, str(tmp_path)) == whole[2:]


def refused(eight, *args):
    return eight(runs.raised, *args)


def test_a_mesh_that_does_not_fit_the_devices(eight):
    assert refused(eight, runs.mesh_by_name, {'data': 3}) == (
        'UsageError: a mesh of data=3 fsdp=-1 does not fit 8 devices: use data=2 fsdp=4, or set '
        'JAX_NUM_CPU_DEVICES to try it on a CPU'
    )


def test_sizes_of_a_mesh():
    from layercomb import parallel

    with pytest.raises(ValueError, match='only one axis can be −1, the rest'):
        parallel.make_mesh(data=-1)
    with pytest.raises(ValueError, match='an axis has 1 device or more, or −1'):
        parallel.make_mesh(tensor=0)


def test_a_weight_that_the_mesh_does_not_divide(eight):
    said = refused(eight, runs.train, 'transformer', (1, 1, 8))
    assert said == (
        'ValueError: block/residual/self_attention/key/bias: its axis H has 4 numbers, which '
        'tensor=8 does not divide: use tensor=4'
    )


def test_rows_that_the_mesh_does_not_divide(eight):
    said = refused(eight, runs.train, 'transformer', (4, 1, 1), 1, None, {'n_rows': 6})
    assert said == (
        'ValueError: the batch of step 1 has 6 rows, which the mesh (data=4) does '
        'not divide into 4 parts: use a batch of 8'
    )


def test_what_is_no_mesh(eight):
    said = refused(eight, runs.loop_on, 'data=2')
    assert said.startswith(
        "TypeError: mesh='data=2' is no mesh with the axes data, fsdp, sequence, tensor"
    )


def test_micro_batches_that_the_mesh_does_not_divide(eight):
    given = 1, None, {'n_rows': 16, 'accumulate': 4}
    assert refused(eight, runs.train, 'transformer', (1, 8, 1), *given) == (
        'ValueError: the batch of step 1 has 16 rows, which the mesh (fsdp=8) does '
        'not divide into 8 parts of a multiple of 4 rows: use a batch of 32'
    )


def test_rules_that_are_none():
    from layercomb import parallel

    for rules in ([('V', 'data')], (('D', 'modle'),), (('D',),)):
        with pytest.raises(ValueError, match='is no rule: give pairs of a letter and one of fsdp'):
            parallel.Layout(rules=rules)


def test_whole_weights_are_not_kept_for_the_backward_pass(eight_optimized):
    """Of a deeper model, a device keeps activations of more blocks, and no more whole weights."""
    few, many = (eight_optimized(runs.temporary_bytes, f'deep_{n}', (1, 8, 1)) for n in (2, 10))
    whole = 8 * 2 * 64 * 512 * 4  # eight more blocks' feed-forwards
    assert many - few < 0.75 * whole
