"""C4 and scientific papers: from JSON lines, TFDS or a stand-in."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest

from layercomb import data
from layercomb.errors import UsageError

TEXTS = [f'page {i}: né\n' for i in range(50)]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """TFDS as of a machine where nothing is prepared; a test may put a data set into it."""
    known = {}

    def builder(name, data_dir):
        if name not in known:
            raise ValueError(f'Dataset {name} not found.')
        return SimpleNamespace(
            info=SimpleNamespace(splits=known[name]),
            as_data_source=lambda split: known[name][split],
            data_dir='/d',
        )

    module = ModuleType('tensorflow_datasets')
    module.builder = builder
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)
    return known


def write(path, records):
    """JSON lines, compressed if the name ends in .gz, with a blank line at the end."""
    lines = ''.join(json.dumps(record) + '\n' for record in records) + '\n'
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'wb') as file:
        file.write(lines.encode())
    return str(path)


def pages(texts):
    return [{'url': 'x', 'text': text} for text in texts]


def paper(i):
    return {
        'article_id': str(i),
        'article_text': [f'first of {i} .', 'and <S> second .'],
        'abstract_text': ['<S> we show . </S>', f'<S> {i} . </S>'],
    }


@pytest.mark.parametrize('name', ['c4.json.gz', 'c4.jsonl'])
def test_each_twentieth_line_of_a_file_is_for_validation(tmp_path, name):
    path = write(tmp_path / name, pages(TEXTS))
    valid = [x for i, x in enumerate(TEXTS) if i % 20 == 19]
    assert list(data.c4(path, 'valid')) == [x.encode() for x in valid]
    assert list(data.c4(path)) == [x.encode() for x in TEXTS if x not in valid]


def test_lines_are_counted_file_by_file(tmp_path):
    for i in (1, 0):
        write(tmp_path / f'{i}.json.gz', pages(TEXTS[25 * i : 25 * i + 25]))
    assert list(data.c4(f'{tmp_path}/*.json.gz', 'valid')) == [TEXTS[i].encode() for i in (19, 44)]


def test_the_folder_as_published(tmp_path):
    write(tmp_path / 'c4-train.00000-of-00002.json.gz', pages(TEXTS[:25]))
    write(tmp_path / 'c4-train.00001-of-00002.json.gz', pages(TEXTS[25:40]))
    write(tmp_path / 'c4-validation.00000-of-00001.json.gz', pages(TEXTS[40:]))
    assert list(data.c4(str(tmp_path))) == [x.encode() for x in TEXTS[:40]]
    assert list(data.c4(str(tmp_path), 'valid')) == [x.encode() for x in TEXTS[40:]]


@pytest.mark.parametrize('name', ['c4.json.gz', 'c4.jsonl'])
def test_nothing_is_read_before_it_is_asked_for_and_lines_are_not_pickled(tmp_path, name):
    path = write(tmp_path / name, pages(TEXTS * 100))
    source = data.c4(path)
    assert len(pickle.dumps(source)) < 1000
    assert len(source) == 4750 and source[-1] == source[4749]
    assert list(source[3:9:2]) == [source[3], source[5], source[7]]
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000 and again[4000] == source[4000]
    (tmp_path / name).unlink()
    with pytest.raises(
        UsageError, match=r'cannot read .* \(No such file or directory\): give JSON'
    ):
        list(pickle.loads(pickle.dumps(source)))


def test_documents_of_c4_come_in_batches(tmp_path):
    path = write(tmp_path / 'c4.jsonl', pages(TEXTS))
    batch = next(iter(data.packed(data.c4(path), 16, 2, shuffle=False, streaming=True)))
    assert bytes(batch[1][0].astype('uint8')) == b'page 0: n\xc3\xa9\n\0pag'


@pytest.mark.parametrize(('split', 'theirs'), [('train', 'train'), ('valid', 'validation')])
def test_c4_in_tfds(library, split, theirs):
    library['c4/en'] = {theirs: [{'text': b'a page'}]}
    assert list(data.c4(split=split)) == [b'a page']
    library['mine'] = {theirs: [{'text': 'né'}]}
    assert list(data.c4(split=split, name='mine')) == ['né'.encode()]


def test_papers_are_articles_with_abstracts(tmp_path):
    path = write(tmp_path / 'train.txt', [paper(i) for i in range(40)])
    parts = [data.scientific_papers(path, x) for x in ('train', 'valid', 'test')]
    assert [len(part) for part in parts] == [36, 2, 2]
    article, abstract = parts[1][1]
    assert article == b'first of 39 .\nand <S> second .'
    assert abstract == b' we show . \n 39 . '
    assert parts[2][0][0].startswith(b'first of 18 .')


def test_papers_as_plain_strings(tmp_path):
    path = write(tmp_path / 'x.jsonl', [{'article': 'né', 'abstract': ''}])
    assert list(data.scientific_papers(path)) == [('né'.encode(), b'')]


def test_the_folder_of_papers_as_published(tmp_path):
    for i, name in enumerate(['train.txt', 'val.txt', 'test.txt', 'vocab']):
        write(tmp_path / name, [paper(i)])
    for i, split in enumerate(['train', 'valid', 'test']):
        ((article, _),) = data.scientific_papers(str(tmp_path), split)
        assert article.startswith(f'first of {i} .'.encode())


@pytest.mark.parametrize(('split', 'theirs'), [('valid', 'validation'), ('test', 'test')])
def test_papers_in_tfds(library, split, theirs):
    record = {'article': b'long', 'abstract': b'short', 'section_names': b''}
    library['scientific_papers/arxiv'] = {theirs: [record]}
    source = data.scientific_papers(split=split)
    assert list(source) == [(b'long', b'short')]
    assert next(iter(data.batches(data.pairs(source, 4, 6), 1)))[3].tolist() == [[*b'short', 0]]
    library['scientific_papers/pubmed'] = {theirs: [{'article': b'x'}]}
    with pytest.raises(UsageError, match="has no feature 'abstract': choose from article"):
        data.scientific_papers(split=split, name='scientific_papers/pubmed')


@pytest.mark.parametrize(
    ('source', 'what', 'cure'),
    [
        (data.c4, 'c4', "JSON lines with a field 'text'"),
        (data.scientific_papers, 'scientific_papers', "JSON lines with 'article_text' and 'abstra"),
    ],
)
def test_they_are_stood_in_for_or_asked_for(source, what, cure, capsys):
    with pytest.raises(UsageError, match=rf'^no {what} here \(Dataset .*\): give path={cure}'):
        source()
    assert source(stand_in=lambda: ['x']) == ['x']
    assert capsys.readouterr().err.startswith(f'layercomb: no {what} here (Dataset {what}/')
    with pytest.raises(UsageError, match=r'Dataset .* not found'):
        source(stand_in=['x'], data_dir='/d')


def test_what_a_person_gets_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"split='test': choose 'train' or 'valid'"):
        data.c4(split='test')
    with pytest.raises(ValueError, match=r"split='dev': choose 'train', 'valid' or 'test'"):
        data.scientific_papers(split='dev')
    with pytest.raises(TypeError, match="path=3: give JSON lines with a field 'text', such as c4"):
        data.c4(3)
    with pytest.raises(UsageError, match=r"no file matches '.*none\.json': check the pattern"):
        data.c4(f'{tmp_path}/none.json', stand_in=['x'])
    with pytest.raises(
        UsageError, match=r"no file matches '.*/c4-train\.\*\.json\*': check the pa"
    ):
        data.c4(str(tmp_path))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'{"text": "a"}\nb\n', r'x\.jsonl:2 is no JSON: give JSON lines with a field'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r'x\.jsonl:2 is no JSON: give'),
        (b'{"text": "a"}\n\n{"txt": 1}\n', r"x\.jsonl:3 has no 'text': give"),
        (b'["text"]\n', r"x\.jsonl:1 has no 'text': give"),
        (b'{"text": 3}\n', r"'text' of .*x\.jsonl:1 is neither a string nor a list of them: give"),
        (b'\n \n', r'x\.jsonl has no line for this split: give files of more lines'),
    ],
)
def test_files_that_are_not_right(tmp_path, content, message):
    (tmp_path / 'x.jsonl').write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(data.c4(str(tmp_path / 'x.jsonl')))


def test_a_file_that_is_no_gzip_or_is_cut_off(tmp_path):
    write(tmp_path / 'a.json.gz', pages(TEXTS))
    whole = (tmp_path / 'a.json.gz').read_bytes()
    for name, content in [('b.json.gz', b'{"text": "a"}\n'), ('c.json.gz', whole[:-20])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf'cannot read .*{name} \(.+\): give JSON lines'):
            len(data.c4(str(tmp_path / name)))


def test_half_a_character_becomes_a_question_mark(tmp_path):
    (tmp_path / 'x.jsonl').write_bytes(b'{"text": "a\\ud800"}\n')
    assert list(data.c4(str(tmp_path / 'x.jsonl'))) == [b'a?']
