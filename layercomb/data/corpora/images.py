"""Images, for classifiers or, as sequences of subpixels, for language models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data import checks, files
from layercomb.data.corpora.choice import StandIn, choose
from layercomb.data.packing import Arrays, window
from layercomb.data.sources import Mapped, labelled, tfds, tfds_records
from layercomb.errors import UsageError, require

_CIFAR10_FILES = {
    'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    'test': ('test_batch.bin',),
}
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # a label, then planes of red, green and blue
_CIFAR10_CURE = (
    'the folder cifar-10-batches-bin of the binary version (cs.toronto.edu/~kriz/cifar.html)'
)
_IMAGENET64_SPLITS = {None: 'all', 'train': 'train', 'valid': 'validation', 'test': 'validation'}


@checked
def png_images(
    pattern: str | os.PathLike[str], size: Size = 64, split: str | None = None
) -> Sequence[np.ndarray]:
    """Returns the images that a pattern matches, cut to squares about the centre and scaled.

    Args:
      pattern: a glob pattern, or a directory, for all PNG files in it; as in `text_files`.
      size: height and width; an image of this size is left as it is.
      split: None for all, or 'train', 'valid', 'test', as in `text_files`.

    Returns:
      A sequence of images, (size, size, 3) uint8, each decoded when it is asked for.

    Raises:
      TypeError: if the pattern is no path, or the size no int.
      ValueError: if the size is out of range, or there is no such split.
      UsageError: if no file is left, one is no image, or Pillow is not installed.
    """
    require('PIL.Image', 'images')
    return Mapped(files.matching(pattern, split, files.PNG), partial(_decoded, size=size))


def subpixels(images: Sequence[Any]) -> Sequence[Arrays]:
    """Returns images as sequences, for language models of subpixels.

    Targets are the red, green and blue of each pixel, row by row: 12,288 tokens for 64 × 64.
    Inputs are the targets one position later, after a 0. Each subpixel is a target once, the first
    one too, so the mean loss in bits is the bits per dimension.

    Args:
      images: a sequence of (H, W, 3) uint8; or of labelled examples, whose inputs are (H, W, 3)
        float32 in 0 … 1 and whose labels are left out.

    Returns:
      A sequence of (inputs, targets, loss_weights), each (3·H·W,), int32, int32 and float32.

    Raises:
      TypeError: if `images` is no sequence.
      ValueError: if it is empty, or an element is no such image.

    References:
      van den Oord et al. 2016, Pixel recurrent neural networks, https://arxiv.org/abs/1601.06759

    >>> inputs, targets, _ = subpixels([np.arange(12, dtype=np.uint8).reshape(2, 2, 3)])[0]
    >>> inputs.tolist()
    [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    return Mapped(checks.source('subpixels', images, 'images'), _sequence)


def imagenet64(
    path: str | None = None,
    split: str | None = 'train',
    data_dir: str | None = None,
    stand_in: StandIn = None,
) -> Sequence[Arrays]:
    """Returns ImageNet at 64 × 64 as sequences of 12,288 subpixels; see `subpixels`.

    Without a path, TFDS is asked for ``downsampled_imagenet/64x64``, then `stand_in` is used, and a
    line on stderr says so.

    Args:
      path: PNG files, as in `png_images`.
      split: 'train', 'valid' or 'test'; with a path also None, for all files, since published
        folders are splits themselves. In TFDS both 'valid' and 'test' are its validation split.
      data_dir: where TFDS has prepared it.
      stand_in: other images, as `subpixels` takes them, e.g. ``shapes(64)``, or a function
        that returns them.

    Raises:
      TypeError: if `path` is no path.
      ValueError: if there is no such split.
      UsageError: as `png_images`, or if there is neither data nor stand-in.
    """
    if split is not None:
        files.check_split(split)
    name = 'downsampled_imagenet/64x64'

    def prepared() -> Sequence[np.ndarray]:
        records = tfds_records(name, _IMAGENET64_SPLITS[split], data_dir, ('image',))
        return Mapped(records, itemgetter('image'))

    def local(path: str) -> Sequence[np.ndarray]:
        return png_images(path, 64, split)

    given, asked = 'a folder of PNG images', data_dir is not None
    return subpixels(choose(name, path, local, prepared, stand_in, given, asked))


def cifar10(
    path: str | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    stand_in: StandIn = None,
) -> Sequence[Arrays]:
    """Returns CIFAR-10: 50,000 images to train on and 10,000 to test, of ten classes.

    Without a path, TFDS is asked for ``cifar10``, then `stand_in` is returned, and a line on stderr
    says so.

    Args:
      path: the folder ``cifar-10-batches-bin``.
      split: 'train' or 'test'.
      data_dir: where TFDS has prepared it.
      stand_in: other labelled images, e.g. ``shapes(32)``, or a function that returns them.

    Returns:
      A sequence of (inputs, targets, loss_weights): (32, 32, 3) float32 in 0 … 1, int32, float32.

    Raises:
      TypeError: if `path` is no path.
      ValueError: if there is no such split.
      UsageError: if the folder is another, or there is neither data nor stand-in.

    References:
      Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    if split not in _CIFAR10_FILES:
        raise ValueError(f"split={split!r}: choose 'train' or 'test'")
    return choose(
        'cifar10',
        path,
        partial(_cifar10_batches, split=split),
        lambda: tfds('cifar10', split, data_dir, ('image', 'label')),
        stand_in,
        _CIFAR10_CURE,
        data_dir is not None,
    )


def _decoded(path: str, size: int) -> np.ndarray:
    image, operations = require('PIL.Image', 'images'), require('PIL.ImageOps', 'images')
    try:
        with image.open(path) as opened:
            return np.asarray(operations.fit(opened.convert('RGB'), (size, size)))
    except (OSError, SyntaxError, ValueError):  # a broken PNG is a SyntaxError to Pillow
        raise UsageError(f'{path} is no image that can be read: remove it or repair it') from None


def _sequence(image: Any) -> Arrays:
    if isinstance(image, tuple):  # a labelled example
        image = image[0]
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f'subpixels takes images (H, W, 3), got {image.shape}')
    if image.dtype != np.uint8:
        if image.dtype.kind != 'f' or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f'subpixels takes uint8, or floats in 0 … 1, got {image.dtype}')
        image = np.rint(image * 255).astype(np.uint8)
    return window(np.concatenate([np.zeros(1, np.uint8), image.ravel()]), image.size)


def _cifar10_batches(folder: str, split: str) -> Sequence[Arrays]:
    paths = [os.path.join(folder, name) for name in _CIFAR10_FILES[split]]
    records = np.frombuffer(b''.join(map(_cifar10_batch, paths)), np.uint8)
    return Mapped(records.reshape(-1, _CIFAR10_RECORD), _cifar10_example)


def _cifar10_batch(path: str) -> bytes:
    if not os.path.isfile(path):
        raise UsageError(f'no file {path}: give {_CIFAR10_CURE}')
    batch = files.read(path)
    if not batch or len(batch) % _CIFAR10_RECORD:
        raise UsageError(f'{path} is no batch of CIFAR-10: give {_CIFAR10_CURE}')
    return batch


def _cifar10_example(record: np.ndarray) -> Arrays:
    planes = record[1:].reshape(3, 32, 32)
    return labelled(planes.transpose(1, 2, 0), record[0])
