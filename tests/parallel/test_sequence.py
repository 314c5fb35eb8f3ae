"""Sequences that devices split: each layer, and runs, are those of one device."""

import numpy as np
import pytest
import runs
import spans

from layercomb import tl

FOUR = (1, 1, 1, 4)  # data, fsdp, tensor, sequence


@pytest.mark.parametrize('name', spans.LAYERS)
def test_outputs_and_gradients_are_those_of_one_device(eight, name):
    assert eight(spans.errors, name, 4) < 5e-6


@pytest.mark.parametrize('name', ['full', 'grouped', 'relative', 'local_across', 'lsh', 'hashed'])
def test_more_devices_than_heads(eight, name):
    assert eight(spans.errors, name, 8) < 5e-6


@pytest.mark.parametrize('name', ['lsh', 'lsh_torch', 'hashed'])
def test_rotations_of_a_seed_are_those_of_each_head(eight, name):
    assert eight(spans.errors, name, 2, tl.Mode.EVAL) < 5e-6


@pytest.mark.parametrize(
    'sizes', [(4, 4, 4), (4, 8, 2), (8, 12, 3), (4, 6, 6), (8, 4, 1), (2, 3, 1)]
)
def test_heads_are_exchanged_and_come_back(eight, sizes):
    assert eight(spans.heads_there_and_back, *sizes) == (True, True)


@pytest.mark.parametrize(
    'name, mesh',
    [
        ('transformer', FOUR),
        ('tied', FOUR),
        ('llama', (1, 2, 1, 4)),
        ('reformer', FOUR),
        ('terraformer', (2, 1, 1, 2)),
        ('mixture', (1, 2, 1, 2)),
        ('transformer', (1, 2, 2, 2)),
    ],
)
def test_losses_are_those_of_one_device(eight, name, mesh):
    np.testing.assert_allclose(eight(runs.train, name, mesh), eight(runs.train, name, None), 1e-5)


def test_encoder_decoders_of_two_lengths(eight):
    np.testing.assert_allclose(eight(runs.train_pairs, FOUR), eight(runs.train_pairs, None), 1e-5)


def test_a_device_holds_its_part_of_weights(eight):
    one, whole = eight(runs.bytes_a_device, 'transformer', FOUR)
    assert whole / 4 <= one < whole / 3.5  # biases and scales are whole on each
    fsdp, _ = eight(runs.bytes_a_device, 'transformer', (1, 4, 1, 1))
    assert one == fsdp


def test_activations_fall_with_the_devices(eight_optimized):
    one = eight_optimized(runs.temporary_bytes, 'deep_2', (1, 1, 1, 1))
    four = eight_optimized(runs.temporary_bytes, 'deep_2', FOUR)
    assert four < 0.5 * one


def test_local_windows_ask_neighbours_alone(eight):
    kinds = {kind for kind, _ in eight(spans.sent, 'local', 4)}
    assert kinds == {'collective-permute'}


def test_full_attention_exchanges_heads_or_goes_round(eight):
    assert {kind for kind, _ in eight(spans.sent, 'full', 4)} == {'all-to-all'}
    assert {kind for kind, _ in eight(spans.sent, 'full', 8)} == {'collective-permute'}


def test_layers_that_would_not_see_others_positions_are_refused(eight):
    for layer, why in (
        (tl.SRU(32), 'sequence: SRU mixes positions, and does not see those of other devices: '),
        (tl.FourierMixing(), 'sequence: FourierMixing mixes positions, and does not see those of '),
        (tl.Conv1D(32), 'sequence: Conv1D mixes positions, and does not see those of other '),
        (
            runs.Own(),
            "sequence: Own(name='own') does not say whether it works on each position by itself: ",
        ),
        (tl.Repeat(tl.Residual(tl.Serial(tl.FourierMixing())), 2), 'sequence: FourierMixing'),
        (spans.Around(tl.SRU(32)), 'sequence: SRU mixes positions'),
    ):
        assert eight(runs.raised, runs.loop_of_layer, layer, FOUR).startswith(f'TypeError: {why}')


@pytest.mark.parametrize(
    ('n_queries', 'n_keys', 'window', 'n_shared'),
    [(48, 16, 3, 4), (32, 32, 3, 4), (32, 32, 12, 2), (32, 32, 9, 1), (64, 64, 17, 1)],
)
def test_windows_of_sequences_of_two_lengths(eight, n_queries, n_keys, window, n_shared):
    given = n_queries, n_keys, window, 4, n_shared
    assert eight(spans.windows, *given, 'float32') < 5e-6
    assert eight(spans.windows, *given, 'bfloat16') < 2e-2


def test_what_counts_is_asked_of_all_devices(eight):
    wanted = eight(spans.rows_that_count, 1)
    assert wanted > 1
    np.testing.assert_allclose(eight(spans.rows_that_count, 4), wanted, 0.05)  # other slices


def test_metrics_of_whole_rows_are_refused(eight):
    for metric in (tl.PreferenceLoss(), tl.SequenceAccuracy(), spans.RowMeans()):
        for chunk_len in (None, 4):
            if chunk_len and metric.position_wise is not True:
                continue
            name = type(metric).__name__
            assert eight(runs.raised, spans.checked, metric, chunk_len) == (
                f'TypeError: sequence: {name} is of whole rows, of which a device has parts: use '
                'a mesh with sequence=1'
            )
    for metric in (tl.CrossEntropyLoss(), tl.Accuracy(), tl.ConfusionMatrix(32)):
        assert eight(runs.raised, spans.checked, metric) is None


def test_an_evaluation_is_refused_before_training(eight):
    said = eight(runs.raised, runs.loop_measured_by, tl.SequenceAccuracy(), FOUR)
    assert said.startswith('TypeError: sequence: SequenceAccuracy is of whole rows')


def test_positions_that_the_mesh_does_not_divide(eight):
    tokens = np.zeros((8, 30), np.int32)
    assert eight(runs.raised, runs.batch_of, FOUR, tokens) == (
        'ValueError: sequence=4 does not divide the 30 positions of a batch (int32[8,30]): use a '
        'length of 32'
    )
    assert eight(runs.raised, runs.batch_of, FOUR, np.zeros(8, np.int32)) == (
        'ValueError: sequence=4 splits the second axis of every array of a batch, the positions, '
        'and int32[8] has none: use a mesh with sequence=1'
    )


def test_a_run_goes_on_where_devices_split_sequences(eight, tmp_path):
    whole = eight(runs.train, 'llama', None, 4)
    eight(runs.train, 'llama', None, 2, tmp_path)
    rest = eight(runs.train, 'llama', FOUR, 4, tmp_path)
    np.testing.assert_allclose(rest[:-1], whole[2:-1], 1e-5)
