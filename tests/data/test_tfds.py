from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from layercomb import data
from layercomb.errors import UsageError

TEXTS = [{'text': f'text {i}'.encode(), 'id': i} for i in range(5)]
IMAGES = [{'image': np.full((2, 2, 1), 51 * i, np.uint8), 'label': np.int64(i)} for i in range(5)]


class Builder:
    """As much of a data set's builder as is used, behaving like version 4.9.10."""

    data_dir = '/data/letters/1.0.0'

    def __init__(self, records, splits=('train', 'validation'), file_format='array_record'):
        self.records, self.file_format = records, file_format
        self.info = SimpleNamespace(splits=dict.fromkeys(splits))

    def as_data_source(self, split):
        if self.file_format != 'array_record':
            raise NotImplementedError('Random access data source for file format is not supported.')
        if split not in self.info.splits:
            raise ValueError(f'Unknown split {split!r}. Should be one of …')
        return self.records if split == 'train' else []


@pytest.fixture(autouse=True)
def library(monkeypatch):
    builders = {
        'letters': Builder(TEXTS),
        'images': Builder(IMAGES),
        'unprepared': Builder([], splits=()),
        'tfrecord': Builder([], file_format='tfrecord'),
    }

    def builder(name, data_dir):
        if name not in builders:
            raise ValueError(f'Dataset {name} not found.\nAvailable datasets:\n\t- …')
        return builders[name]

    module = ModuleType('tensorflow_datasets')
    module.builder = builder
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)


def test_documents():
    assert list(data.tfds('letters')) == [x['text'] for x in TEXTS]
    batch = next(iter(data.packed(data.tfds('letters'), 16, 2, shuffle=False, streaming=True)))
    assert bytes(batch[1][0].astype(np.uint8)) == b'text 0\0text 1\0te'


def test_inputs_and_targets():
    source = data.tfds('images', feature=('image', 'label'))
    inputs, targets, weights = next(iter(data.batches(source, 5, shuffle=False)))
    assert (inputs.dtype, targets.dtype, weights.dtype) == (np.float32, np.int32, np.float32)
    np.testing.assert_allclose(inputs[:, 0, 0, 0], np.arange(5) / 5, rtol=1e-6)
    assert targets.tolist() == [0, 1, 2, 3, 4] and weights.tolist() == [1] * 5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'x'}, r"Dataset x not found\. Check name='x' and data_dir=None, or see the list"),
        (
            {'name': 'unprepared', 'data_dir': '/d'},
            r"'unprepared' is not prepared in .*: run tfds build unprepared "
            r'--file_format=array_record --data_dir=/d$',
        ),
        ({'name': 'tfrecord'}, r"'tfrecord' in .* is no ArrayRecord: remove it and run tfds build"),
        (
            {'name': 'letters', 'split': 'dev'},
            r"'letters' has no split 'dev': give one of train, validation, or a slice of it",
        ),
        ({'name': 'letters', 'split': 'validation'}, r"split 'validation' of 'letters' is empty"),
        ({'name': 'letters', 'feature': 'txt'}, r"has no feature 'txt': choose from id, text"),
        ({'name': 'letters', 'feature': 'id'}, r"feature 'id' of 'letters' is no text: name a"),
    ],
)
def test_what_a_person_gets_wrong(arguments, message):
    with pytest.raises(UsageError, match=message):
        data.tfds(**arguments)


@pytest.mark.parametrize('arguments', [{'name': 3}, {'name': 'a', 'feature': ('x', 'y', 'z')}])
def test_wrong_types(arguments):
    with pytest.raises(TypeError, match='give strings, and for feature one name or a pair'):
        data.tfds(**arguments)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(UsageError, match=r'not installed: pip install "layercomb\[tfds\]"'):
        data.tfds('letters')
