from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from layercomb import data
from layercomb.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i:02}.png')
    (tmp_path / 'notes.txt').write_text('no image')
    return tmp_path


@pytest.fixture
def cifar(tmp_path):
    """The ten-thousandth part of each published batch and more: two records in each file."""
    rng = np.random.default_rng(0)
    names = [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']
    records = {name: rng.integers(0, 256, (2, 3073), np.uint8) for name in names}
    for i, (name, batch) in enumerate(records.items()):
        batch[:, 0] = i, i + 1
        batch.tofile(tmp_path / name)
    return tmp_path, records


def test_png_images_of_the_size_are_left_as_they_are(folder):
    images = data.png_images(str(folder), size=8)
    assert len(images) == 40 and images[3].dtype == np.uint8
    np.testing.assert_array_equal(images[3], np.asarray(Image.open(folder / '03.png')))
    assert len(data.png_images(f'{folder}/0*.png', 8)) == 10


def test_other_images_are_cut_to_the_centre_and_scaled(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 4:20] = 200, 100, 50  # what is scaled is 8:16, and some pixels beside it
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    Image.fromarray(np.full((5, 5), 9, np.uint8)).save(tmp_path / 'grey.png')
    grey, colour = data.png_images(str(tmp_path), size=4)
    assert (colour == [200, 100, 50]).all() and colour.shape == (4, 4, 3)
    assert (grey == 9).all() and grey.shape == (4, 4, 3)


def test_splits_of_a_folder_are_disjoint(folder):
    sizes = [len(data.png_images(str(folder), 8, split)) for split in ('train', 'valid', 'test')]
    assert sum(sizes) == 40 and sizes[0] > 30


def test_subpixels_are_targets_in_raster_order():
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    inputs, targets, weights = data.subpixels([image])[0]
    expected = [int(image[y, x, c]) for y in range(3) for x in range(5) for c in range(3)]
    assert targets.tolist() == expected and inputs.tolist() == [0, *expected[:-1]]
    assert weights.tolist() == [1] * 45
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


def test_labelled_images_give_the_same_subpixels():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    example = (image.astype(np.float32) / np.float32(255), np.int32(3), np.float32(1))
    np.testing.assert_array_equal(data.subpixels([example])[0], data.subpixels([image])[0])


def test_imagenet64_of_a_folder(folder):
    source = data.imagenet64(str(folder), split=None)
    assert len(source) == 40 and source[0][0].shape == (12_288,)
    parts = [len(data.imagenet64(str(folder), split)) for split in ('train', 'valid', 'test')]
    assert sum(parts) == 40


def test_subpixels_come_in_batches():
    source = data.imagenet64(stand_in=data.shapes(4, 6))
    batch = next(iter(data.batches(source, 3)))
    assert [x.shape for x in batch] == [(3, 48)] * 3


def test_cifar10_of_a_folder(cifar):
    folder, records = cifar
    train, test = (data.cifar10(str(folder), split) for split in ('train', 'test'))
    assert [int(label) for _, label, _ in train] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert len(test) == 2
    record = records['test_batch.bin'][1]
    image, label, weight = test[1]
    for channel, y, x in [(0, 0, 0), (1, 3, 7), (2, 31, 30)]:
        expected = record[1 + 1024 * channel + 32 * y + x] / np.float32(255)
        assert image[y, x, channel] == np.float32(expected)
    assert image.shape == (32, 32, 3) and label == 6 and weight == 1
    batch = next(iter(data.batches(train, 5)))
    assert [x.shape for x in batch] == [(5, 32, 32, 3), (5,), (5,)]


def test_shapes_depend_on_seed_and_index_alone():
    a, b = data.shapes(16, seed=1)[7], data.shapes(16, n_examples=8, seed=1)[7]
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert (data.shapes(16, seed=2)[7][0] != a[0]).any()
    image = a[0]
    assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
    np.testing.assert_allclose(image * 255, np.rint(image * 255), atol=1e-4)


def test_shapes_are_of_ten_classes_and_every_one_is_seen():
    """On each image there are two colours: that of the ground, at its edge, and another."""
    labels = set()
    for image, label, _ in data.shapes(24, 200):
        ground = np.median(image[0], 0)
        away = np.abs(image - ground).max(-1) > 0.25
        assert 0.01 < away.mean() < 0.6
        labels.add(int(label))
    assert labels == set(range(10))


def test_what_a_person_gets_wrong(folder, tmp_path, monkeypatch):
    (tmp_path / 'broken.png').write_bytes((folder / '00.png').read_bytes()[:60])
    with pytest.raises(UsageError, match=r'broken\.png is no image that can be read: remove it or'):
        data.png_images(f'{tmp_path}/broken.png')[0]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UsageError, match=r"no PNG file in '.*': give a directory that holds PNG"):
        data.png_images(str(tmp_path / 'empty'))
    with pytest.raises(ValueError, match='size must be at least 1, got 0'):
        data.png_images(str(folder), 0)
    with pytest.raises(TypeError, match='path=7: give a folder of PNG images'):
        data.imagenet64(7)
    with pytest.raises(ValueError, match=r"split='dev': choose 'train', 'valid' or 'test'"):
        data.imagenet64(split='dev')
    with pytest.raises(ValueError, match='subpixels: images is empty'):
        data.subpixels([])
    monkeypatch.setitem(sys.modules, 'PIL.Image', None)
    with pytest.raises(UsageError, match=r'not installed: pip install "layercomb\[images\]"'):
        data.png_images(str(folder))


def test_a_folder_that_is_not_of_cifar10(cifar):
    folder, _ = cifar
    with pytest.raises(ValueError, match=r"split='valid': choose 'train' or 'test'"):
        data.cifar10(str(folder), 'valid')
    (folder / 'data_batch_2.bin').write_bytes(b'x' * 100)
    with pytest.raises(UsageError, match=r'data_batch_2\.bin is no batch of CIFAR-10: give the fo'):
        data.cifar10(str(folder))
    with pytest.raises(UsageError, match=r'no file .*elsewhere/test_batch\.bin: give the folder'):
        data.cifar10(str(folder / 'elsewhere'), 'test')


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'size': 0}, ValueError, 'size must be at least 1, got 0'),
        ({'size': '32'}, TypeError, "size must be an int, got '32'"),
        ({'n_examples': 0}, ValueError, 'n_examples must be at least 1, got 0'),
        ({'seed': -1}, ValueError, 'seed must be at least 0 and at most'),
    ],
)
def test_wrong_arguments_of_shapes(arguments, error, message):
    with pytest.raises(error, match=message):
        data.shapes(**arguments)


def test_subpixels_of_what_is_no_image_are_refused():
    with pytest.raises(ValueError, match=r'takes images \(H, W, 3\), got \(4, 4\)'):
        data.subpixels([np.zeros((4, 4), np.uint8)])[0]
    for wrong in (np.full((2, 2, 3), 255, np.int32), np.full((2, 2, 3), 1.5, np.float32)):
        with pytest.raises(ValueError, match='takes uint8, or floats in 0 … 1'):
            data.subpixels([wrong])[0]
