"""Folders of text as documents."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import data
from layercomb.data.finetuning import text
from layercomb.errors import UsageError

TOKENIZER = data.ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
    for name, content in (('a.txt', 'abcd'), ('b.md', ''), ('c/d.txt', 'né\n')):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, 'utf-8')
    return tmp_path


def texts(documents):
    return [bytes(ids.tolist()) for ids, _ in documents]


def test_a_file_is_a_document_of_which_all_is_learnt(folder):
    documents = data.text_folder(folder, TOKENIZER)
    assert texts(documents) == [b'abcd\0', b'', 'né\n\0'.encode()]
    ids, weights = documents[0]
    assert ids.dtype == np.int32 and weights.tolist() == [0, 1, 1, 1, 1]
    assert documents.where(2) == str(folder / 'c/d.txt')
    assert texts(data.text_folder(f'{folder}/*.txt', TOKENIZER)) == [b'abcd\0']


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text('ab\n', max_size=30), min_size=1, max_size=4).filter(any), st.integers(2, 9)
)
def test_pieces_lose_nothing_and_predict_each_token_once(tmp_path_factory, contents, max_len):
    folder = tmp_path_factory.mktemp('texts')
    for i, content in enumerate(contents):
        (folder / f'{i}.txt').write_bytes(content.encode())
    documents = pickle.loads(pickle.dumps(data.text_folder(folder, TOKENIZER, max_len)))
    found = {}
    for i, (ids, weights) in enumerate(documents):
        assert 2 <= ids.size <= max_len and ids.size == weights.size
        assert weights[0] == 0 and (weights[1:] == 1).all()
        made = found.setdefault(documents.where(i), ids[:1].tolist())
        assert made[-1] == ids[0]  # a piece starts at the last token of the one before
        made += ids[1:].tolist()
    wanted = [[*content.encode(), 0] for content in contents if content]
    assert list(found.values()) == wanted
    n = sum(len(ids) - 1 for ids in wanted)
    batches = list(data.packed_documents(documents, max_len - 1, 2, shuffle=False, num_epochs=1))
    assert sum(float(batch[3].sum()) for batch in batches) == n


def test_long_files_are_encoded_in_parts(folder, monkeypatch):
    monkeypatch.setattr(text, '_PART', 10)
    content = 'one two\nthree\n\n four\nfive ' + 40 * 'x' + '\n\n' + 12 * 'y'
    (folder / 'a.txt').write_text(content)
    encoded = []

    class Tokenizer(data.ByteTokenizer):
        def encode(self, part):
            encoded.append(part)
            return super().encode(part)

    ids, _ = data.text_folder(folder / 'a.txt', Tokenizer())[0]
    assert bytes(ids.tolist()) == content.encode() + b'\0'
    parts = encoded[-8:]
    assert ''.join(encoded).endswith(content) and all(len(part) <= 10 for part in parts)
    assert 'one two\n' in encoded and ' four\n' not in encoded


def test_what_cannot_be_read(folder):
    (folder / 'e.txt').write_bytes(b'caf\xe9 au lait')
    with pytest.raises(UsageError, match=r'e.txt is no text in UTF-8 \(byte 3\): convert it, or'):
        list(data.text_folder(f'{folder}/*.txt', TOKENIZER))
    with pytest.raises(UsageError, match='no file matches'):
        data.text_folder(folder / 'none', TOKENIZER)
    with pytest.raises(ValueError, match='text_folder: max_len must be at least 2, got 1'):
        data.text_folder(folder, TOKENIZER, 1)
    with pytest.raises(TypeError, match='text_folder: tokenizer must have encode'):
        data.text_folder(folder, None)


def test_a_file_may_have_the_signs_of_patterns_in_its_name(tmp_path):
    path = tmp_path / 'notes [2].txt'
    path.write_text('abc')
    (tmp_path / 'notes 2.txt').write_text('other')
    assert [bytes(ids.tolist()) for ids, _ in data.text_folder(path, data.ByteTokenizer())] == [
        b'abc\0'
    ]
