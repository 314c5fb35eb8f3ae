from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from layercomb import data
from layercomb.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    for i in range(200):
        path = tmp_path / f'{i % 3}' / f'{i}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'text {i}')
    (tmp_path / 'image.png').write_bytes(b'\x89PNG\0\0')
    (tmp_path / 'latin1.txt').write_bytes('né'.encode('latin-1') * 9)
    (tmp_path / '.hidden').write_text('secret')
    return tmp_path


def test_the_stdlib_in_three_parts():
    parts = {split: data.python_stdlib(split) for split in ('train', 'valid', 'test')}
    everything = [path for part in parts.values() for path in part.paths]
    assert len(set(everything)) == len(everything)
    assert 0.8 < len(parts['train']) / len(everything) < 0.97
    assert all(part.paths == tuple(sorted(part.paths)) for part in parts.values())
    root = Path(sysconfig.get_paths()['stdlib'])
    names = {Path(path).relative_to(root).as_posix() for path in everything}
    assert {'ast.py', 'json/decoder.py'} <= names
    assert not any('test' in Path(name).parts or 'site-packages' in name for name in names)
    for document in parts['valid']:
        assert b'\0' not in document and document.decode('utf-8') is not None


def test_a_pattern(folder):
    source = data.text_files(f'{folder}/**/*.txt')
    assert len(source) == 201
    assert source.paths == tuple(sorted(source.paths))
    assert {b'text 0', b'text 199'} <= set(source)
    assert list(source[:2]) == [source[0], source[1]]
    assert source == data.text_files(f'{folder}/**/*.txt')


def test_a_directory_holds_its_text_files_only(folder):
    names = {Path(path).name for path in data.text_files(str(folder)).paths}
    assert names == {f'{i}.txt' for i in range(200)}


def test_a_character_cut_by_the_sniff_is_still_text(tmp_path):
    (tmp_path / 'long').write_text('a' + 'é' * 40_000, encoding='utf-8')
    assert len(data.text_files(str(tmp_path))) == 1


def test_splits_are_disjoint_and_move_with_the_directory(folder):
    def names(where, split):
        return {Path(path).name for path in data.text_files(where, split).paths}

    before = {split: names(f'{folder}/**/*.txt', split) for split in ('train', 'valid', 'test')}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 201
    assert len(before['train']) > 150 and before['valid'] and before['test']
    moved = folder.rename(folder.with_name('elsewhere'))
    assert before == {split: names(f'{moved}/**/*.txt', split) for split in before}
    assert names(str(moved), 'valid') <= before['valid']


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder))
    assert len(data.text_files('~/0/*.txt')) == 67


def test_no_such_split():
    for call in (data.python_stdlib, lambda split: data.text_files('/', split)):
        with pytest.raises(ValueError, match=r"split='dev': choose 'train', 'valid' or 'test'"):
            call('dev')


def test_nothing_to_read(tmp_path):
    with pytest.raises(
        UsageError, match=r"no file matches '.*/\*\.txt': check the pattern, or give"
    ):
        data.text_files(f'{tmp_path}/*.txt')
    with pytest.raises(
        UsageError, match=r"no text file in '.*': give a directory that holds UTF-8"
    ):
        data.text_files(str(tmp_path))
    (tmp_path / 'one.txt').write_text('')
    with pytest.raises(UsageError, match=r"the files of '.*' are empty: give files that hold text"):
        data.text_files(f'{tmp_path}/*.txt')
    missing = {'train', 'valid', 'test'} - {split_of(tmp_path / 'one.txt')}
    with pytest.raises(
        UsageError, match=r"none of the 1 files of '.*' is in split '\w+': give more"
    ):
        data.text_files(f'{tmp_path}/*.txt', split=missing.pop())
    with pytest.raises(TypeError, match=r'pattern=3: give a glob pattern, e\.g\.'):
        data.text_files(3)


def split_of(path):
    path.write_text('x')
    for split in ('train', 'valid', 'test'):
        try:
            data.text_files(str(path), split)
        except UsageError:
            continue
        return split


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    with pytest.raises(UsageError, match=r"no Python sources of split 'train' in .*: this Python"):
        data.python_stdlib()


def test_a_file_that_went_away(folder):
    source = data.text_files(f'{folder}/0/*.txt')
    Path(source.paths[0]).unlink()
    with pytest.raises(UsageError, match=r'cannot read .*: No such file or directory'):
        next(iter(data.packed(source, 4, 2, streaming=True, shuffle=False)))
