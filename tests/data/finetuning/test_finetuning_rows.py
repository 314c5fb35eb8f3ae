"""Where rows come from: files of several kinds, lists, and data sets of other libraries."""

from __future__ import annotations

import gzip
import json
import pickle

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from layercomb import data
from layercomb.data.finetuning import parquet as tables
from layercomb.data.finetuning.rows import rows_of
from layercomb.errors import UsageError

ROWS = [{'prompt': f'{i} + 1 is ', 'completion': f'{i + 1}'} for i in range(9)]


def as_lines(path, rows=ROWS):
    path.write_text('\n\n'.join(map(json.dumps, rows)))  # blank lines do not count


def as_gzip(path, rows=ROWS):
    path.write_bytes(gzip.compress('\n\n'.join(map(json.dumps, rows)).encode()))


def as_list(path, rows=ROWS):
    path.write_text('\ufeff ' + json.dumps(rows, indent=1), 'utf-8')


def as_parquet(path, rows=ROWS, **more):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **more)


FILES = {
    'a.jsonl': as_lines,
    'b.jsonl.gz': as_gzip,
    'c.json': as_list,
    'd.json': as_lines,
    'e.parquet': as_parquet,
}
WHERE = {'a.jsonl': 'a.jsonl:5', 'b.jsonl.gz': 'b.jsonl.gz:5', 'c.json': 'c.json, entry 3',
         'd.json': 'd.json:5', 'e.parquet': 'e.parquet, row 3'}  # fmt: skip


class Dataset:
    """What a `datasets.Dataset` offers: a length, rows by int, and columns by name."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, str):
            return [row[index] for row in self.rows]
        assert type(index) is int
        return dict(self.rows[index])


@pytest.mark.parametrize('name', FILES)
def test_files_of_every_kind(tmp_path, name):
    FILES[name](tmp_path / name)
    rows = pickle.loads(pickle.dumps(rows_of(tmp_path / name, 'chat')))
    assert [rows[i] for i in (8, *range(9))] == [ROWS[8], *ROWS]
    assert rows.where(2) == str(tmp_path / WHERE[name])
    rows = pickle.loads(pickle.dumps(rows))  # after reading, too
    assert len(rows) == 9 and rows[3] == ROWS[3]


def test_several_files_in_the_order_of_their_names(tmp_path):
    for name, write in FILES.items():
        write(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no row')
    (tmp_path / 'd.jsonl').write_text('\n')
    rows = rows_of(str(tmp_path), 'chat')
    assert [rows[i] for i in range(len(rows))] == 5 * ROWS
    assert rows.where(9 + 2) == str(tmp_path / WHERE['b.jsonl.gz'])
    assert len(rows_of(str(tmp_path / '*.json'), 'chat')) == 18


def test_sequences_as_they_are():
    for source in (ROWS, tuple(ROWS), Dataset(ROWS)):
        rows = rows_of(source, 'chat')
        assert len(rows) == 9 and rows[np.int64(3)] == ROWS[3] and rows.where(3) == 'source[3]'
        assert len(data.instructions(source, data.ByteTokenizer())) == 9


@pytest.mark.parametrize(
    'source, cause',
    [
        ({'train': ROWS, 'test': ROWS}, "source is a dict of train, test, and no rows: choose one"),
        (iter(ROWS), 'must be a path or a sequence of rows, got list_iterator: load a data set'),
        (b'a.jsonl', 'must be a path or a sequence of rows, got bytes'),
        (3, 'must be a path or a sequence of rows, got int'),
    ],
)  # fmt: skip
def test_what_is_no_source(source, cause):
    with pytest.raises(TypeError, match=f'^instructions: .*{cause}'):
        data.instructions(source, data.ByteTokenizer())


@pytest.mark.parametrize(
    'name, content, cause',
    [
        ('a.jsonl', b'{"text": "a"}\n{"text": ', r'a.jsonl:2 is no JSON \(Expecting value\): mend'),
        ('a.jsonl', b'{"text": "a"}\n["b"]', r"a.jsonl:2 is \['b'\] and no object: give rows such"),
        ('a.jsonl', b'\n \n', 'has no rows: give files that hold some'),
        ('a.json', b'[{"text": "a"}, 3]', 'a.json, entry 2 is 3 and no object'),
        ('a.json', b'[{"text": "a"}', 'a.json is no JSON'),
        ('a.json', b'[]', 'has no rows'),
        ('a.json', b'[' * 99_999, 'a.json is no JSON'),
        ('a.jsonl.gz', b'{"text": "a"}', r'cannot read .*a.jsonl.gz \(Not a gzipped file'),
        ('a.parquet', b'PAR1', r'a.parquet cannot be read as Parquet \(.*\): give another file'),
        ('a.csv', b'text\na', 'a.csv is no table that can be read: give files of .jsonl,'),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=cause) as e:
        list(data.instructions(tmp_path / name, data.ByteTokenizer()))
    assert '\n' not in str(e.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match=r'no file matches .*none.jsonl'):
        rows_of(tmp_path / 'none.jsonl', 'chat')
    with pytest.raises(UsageError, match=r'no table in .*: give a directory that holds files of'):
        rows_of(tmp_path, 'chat')
    with pytest.raises(UsageError, match='chat: source has no rows: give at least one'):
        rows_of([], 'chat')


def test_parquet_is_read_in_groups_and_only_the_columns_that_matter(tmp_path, monkeypatch):
    rows = [{**row, 'embedding': [0.0] * 64} for row in ROWS]
    as_parquet(tmp_path / 'a.parquet', rows, row_group_size=2)
    monkeypatch.setattr(tables, '_HELD', 1)
    found = rows_of(tmp_path / 'a.parquet', 'chat', ('prompt', 'completion'))
    assert [found[i] for i in (8, 0, 3, 4)] == [ROWS[i] for i in (8, 0, 3, 4)]
    assert len(found._kept) == 1  # the latest
    other = rows_of(tmp_path / 'a.parquet', 'chat', ('messages',))
    assert set(other[0]) == {'prompt', 'completion', 'embedding'}  # for the message


def test_conversations_in_parquet(tmp_path):
    turns = [
        {'role': 'user', 'content': 'a', 'tool_calls': None},
        {'role': 'assistant', 'content': 'b', 'tool_calls': None},
    ]
    as_parquet(tmp_path / 'a.parquet', [{'messages': turns, 'id': i} for i in range(3)])
    assert rows_of(tmp_path / 'a.parquet', 'chat', ('messages',))[2] == {'messages': turns}


@pytest.mark.slow
@pytest.mark.parametrize('kept', ['rows', 'parquet'])
def test_data_sets_of_hugging_face(tmp_path, kept):
    datasets = pytest.importorskip('datasets')
    if kept == 'rows':
        found = datasets.Dataset.from_list(ROWS)
    else:
        as_parquet(tmp_path / 'a.parquet')
        found = datasets.load_dataset(
            'parquet', data_files=str(tmp_path / 'a.parquet'), cache_dir=str(tmp_path / 'cache')
        )
        with pytest.raises(TypeError, match=r'is a DatasetDict of train, and no rows: choose'):
            rows_of(found, 'chat')
        found = found['train']
    documents = data.instructions(found, data.ByteTokenizer())
    assert bytes(documents[3][0].tolist()) == b'3 + 1 is 4\0'
    batches = list(data.packed_documents(documents, 32, 2, num_epochs=1))
    assert sum(float(batch[3].sum()) for batch in batches) == 9 * 2
    with pytest.raises(TypeError, match='IterableDataset: load a data set without streaming'):
        rows_of(found.to_iterable_dataset(), 'chat')
