"""Published data sets: enwik8, and the choice among a path, TFDS and a stand-in."""

from __future__ import annotations

import sys
import zipfile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from layercomb import data
from layercomb.errors import UsageError

TEXT = bytes(range(65, 85)) * 10 + b'end'  # 203 bytes, so that the cuts are rounded


@pytest.fixture
def path(tmp_path):
    (tmp_path / 'enwik8').write_bytes(TEXT)
    return str(tmp_path / 'enwik8')


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """TFDS as of a machine where nothing is prepared; a test may put a data set into it."""
    known = {}

    def builder(name, data_dir):
        if name not in known:
            raise ValueError(f'Dataset {name} not found.')
        as_source = lambda split: known[name][split]  # noqa: E731
        return SimpleNamespace(
            info=SimpleNamespace(splits=known[name]), as_data_source=as_source, data_dir='/d'
        )

    module = ModuleType('tensorflow_datasets')
    module.builder = builder
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)
    return known


def splits(**arguments):
    return [data.enwik8(split=split, **arguments) for split in ('train', 'valid', 'test')]


def test_a_file_is_cut_into_ninety_five_and_five_percent(path):
    parts = splits(path=path)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert [len(part[0]) for part in parts] == [182, 10, 11]
    assert b''.join(part[0] for part in parts) == TEXT


def test_the_splits_of_the_whole_are_the_usual_ones():
    from layercomb.data.corpora.wikipedia import _cut

    cuts = [_cut(10**8, split) for split in ('train', 'valid', 'test')]
    assert cuts == [(0, 90_000_000), (90_000_000, 95_000_000), (95_000_000, 100_000_000)]


def test_the_zip_it_is_published_as(path, tmp_path):
    with zipfile.ZipFile(tmp_path / 'enwik8.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, 'enwik8')
    for a, b in zip(splits(path=str(tmp_path / 'enwik8.zip')), splits(path=path), strict=True):
        assert a[0] == b[0]


def test_every_byte_is_a_target_once(path):
    dataset = data.packed(data.enwik8(path), 16, 2, shuffle=False, num_epochs=1)
    targets = [t[w > 0] for _, t, w in dataset]
    assert bytes(np.concatenate(targets).astype(np.uint8)) == TEXT[:182] + b'\0'


def test_tfds_is_asked_where_there_is_no_path(library):
    library['mine'] = {'train': [{'text': TEXT[:100]}, {'text': TEXT[101:]}]}
    parts = splits(name='mine')
    assert b''.join(part[0] for part in parts) == TEXT[:100] + b'\n' + TEXT[101:]


def test_the_stand_in_is_used_and_said_to_be_in_one_line(capsys):
    other = ['some text']
    assert data.enwik8(stand_in=other) is other
    said = capsys.readouterr().err
    assert said == (
        "layercomb: no enwik8 here (Dataset enwik8 not found. Check name='enwik8' and "
        'data_dir=None, or see the list at tensorflow.org/datasets): using its stand-in\n'
    )


def test_a_given_path_wins_and_its_mistakes_are_never_stood_in_for(path, tmp_path, capsys):
    assert data.enwik8(path, stand_in=['x'])[0] == TEXT[:182]
    with pytest.raises(UsageError, match=r'cannot read .*none \(No such file or directory\): give'):
        data.enwik8(str(tmp_path / 'none'), stand_in=['x'])
    assert capsys.readouterr().err == ''


def test_what_a_person_gets_wrong(path, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive:
        archive.write(path, 'a')
        archive.write(path, 'b')
    with pytest.raises(UsageError, match=r'two\.zip holds 2 files, not one: give the path of enw'):
        data.enwik8(str(tmp_path / 'two.zip'))
    with pytest.raises(UsageError, match=r'cannot read .* \(Is a directory\): give the path of'):
        data.enwik8(str(tmp_path))
    with pytest.raises(ValueError, match=r"split='dev': choose 'train', 'valid' or 'test'"):
        data.enwik8(path, 'dev')
    with pytest.raises(TypeError, match=r'path=3: give the path of enwik8 or enwik8\.zip'):
        data.enwik8(3)
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(UsageError) as caught:
        data.enwik8()
    assert str(caught.value) == (
        'no enwik8 here (tensorflow_datasets is not installed: pip install "layercomb[tfds]"): '
        'give path=the path of enwik8 or enwik8.zip (mattmahoney.net/dc/enwik8.zip), or a stand_in='
    )


IMAGE = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)


@pytest.mark.parametrize(
    ('ours', 'theirs'), [('train', 'train'), ('valid', 'validation'), ('test', 'validation')]
)
def test_imagenet64_in_tfds(library, ours, theirs):
    library['downsampled_imagenet/64x64'] = {theirs: [{'image': IMAGE}]}
    inputs, targets, weights = data.imagenet64(split=ours)[0]
    assert (targets == IMAGE.ravel()).all() and (weights == 1).all()
    assert inputs.shape == (12_288,) and inputs[0] == 0 and (inputs[1:] == targets[:-1]).all()


def test_cifar10_in_tfds(library):
    library['cifar10'] = {'test': [{'image': IMAGE[:32, :32], 'label': np.int64(7)}]}
    image, label, weight = data.cifar10(split='test')[0]
    np.testing.assert_array_equal(image * 255, IMAGE[:32, :32])
    assert (image.dtype, label.dtype, weight.dtype) == (np.float32, np.int32, np.float32)
    assert label == 7 and weight == 1


@pytest.mark.parametrize(
    ('source', 'what', 'cure'),
    [
        (data.imagenet64, 'downsampled_imagenet/64x64', 'a folder of PNG images'),
        (data.cifar10, 'cifar10', 'the folder cifar-10-batches-bin of the binary version'),
    ],
)
def test_images_are_stood_in_for_or_asked_for(source, what, cure, capsys):
    with pytest.raises(UsageError, match=rf'^no {what} here \(Dataset .*\): give path={cure}'):
        source()
    assert len(source(stand_in=data.shapes(4, 9))) == 9
    assert capsys.readouterr().err.startswith(f'layercomb: no {what} here (Dataset {what} not')
