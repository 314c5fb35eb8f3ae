"""The report of lengths before training."""

from __future__ import annotations

import numpy as np
import pytest

from layercomb import data
from layercomb.errors import UsageError


def documents(lengths, tokenizer=data.ByteTokenizer(), max_len=None):
    rows = [{'prompt': 'a' * (n - 3), 'completion': 'bc'} for n in lengths]
    return data.instructions(rows, tokenizer, max_len)


def test_a_report_by_hand():
    made = documents([4, 5, 10, 6, 30], max_len=9)
    report = data.length_report(made, 8)
    # The last two are cut to 9 tokens. Nothing that is learnt is left of the last.
    assert (report.n_documents, report.n_seen, report.length) == (5, 5, 8)
    assert report.n_tokens == 4 + 5 + 9 + 6 + 9 and report.n_learnt == 3 + 3 + 2 + 3 + 0
    assert report.lengths == (4, 6, 30, 30)
    assert (report.n_truncated, report.n_cut, report.n_dropped) == (2, 1 + 21, 1)
    # 3 + 5, 4, 8 positions: three rows.
    assert report.n_rows == 3 and report.packed == 20 / 24 and report.unpacked == 20 / 32
    assert str(report).splitlines() == [
        '5 documents: prompt → completion, as a plain text',
        '33 tokens, 11 of them learnt',
        'tokens of a document: at least 4, half of them up to 6, 90 % up to 30, at most 30',
        '2 cut off, by 22 tokens in all; 1 left out, with nothing to learn in them',
        '3 rows of 8, 83.3% full; a document in each row would fill 62.5%',
    ]
    batches = list(
        data.packed_documents(documents([4, 5, 10, 6, 30], max_len=9), 8, 1, num_epochs=1)
    )
    assert len(batches) == report.n_rows


def test_documents_that_are_too_long_for_a_row():
    report = data.length_report(documents([4, 30]), 8)
    assert report.n_too_long == 1 and '1 too long for a row: give max_len' in str(report)


def test_large_sources_are_looked_at_in_part():
    report = data.length_report(documents(range(4, 1004)), 2000, limit=100)
    assert (report.n_documents, report.n_seen, report.lengths[:2]) == (1000, 100, (4, 494))
    assert str(report).startswith('100 of 1,000 documents: prompt')


def test_all_rows_are_checked_even_so():
    rows = [{'text': 'a'}] * 40
    rows[33] = {'text': ''}
    made = data.instructions(rows, data.ByteTokenizer())
    with pytest.raises(UsageError, match=r"source\[33\]: 'text' is empty"):
        data.length_report(made, 8, limit=4)


def test_plain_sequences_of_documents_and_folders(tmp_path):
    plain = [(np.arange(n), np.ones(n, np.float32)) for n in (3, 0, 2)]
    report = data.length_report(plain, 8)
    assert report.n_dropped == 1 and report.lengths == (0, 2, 3, 3) and report.n_rows == 1
    (tmp_path / 'a.txt').write_text('abcdefgh')
    folder = data.text_folder(tmp_path, data.ByteTokenizer(), max_len=4)
    report = data.length_report(folder, 3)
    assert report.n_documents == 3 and report.n_learnt == 8 and report.n_rows == 3
    assert str(report).startswith('3 documents: pieces of 1 files of text, all of which is learnt')
    nothing = data.length_report([(np.arange(2), np.zeros(2, np.float32))], 8)
    assert nothing.n_rows == 0 and '1 left out' in str(nothing)


def test_a_part_of_the_documents_knows_what_they_know(tmp_path):
    made = documents([4, 5, 10, 6, 30], max_len=9)[2:]
    report = data.length_report(made, 8)
    assert (report.n_documents, report.n_truncated, report.n_cut) == (3, 2, 22)
    assert report.said == 'prompt → completion, as a plain text'
    assert made.where(1) == made[1:].where(0) == 'source[3]' and made[-1][0].size == 9
    (tmp_path / 'a.txt').write_text('abcdefgh')
    folder = data.text_folder(tmp_path, data.ByteTokenizer(), max_len=4)[::2]
    assert [bytes(ids.tolist()) for ids, _ in folder] == [b'abcd', b'gh\0']
    rows = [{'text': 'a'}, {'text': ''}, {'text': 'b'}]
    made = data.instructions(rows, data.ByteTokenizer())
    assert data.length_report(made[::2], 8, limit=1).n_documents == 2
    with pytest.raises(UsageError, match=r'source\[1\]: '):
        data.length_report(made[1:], 8, limit=1)


def test_arguments():
    with pytest.raises(ValueError, match='length_report: documents is empty'):
        data.length_report([], 8)
    with pytest.raises(TypeError, match='length_report: documents must be a sequence'):
        data.length_report('text', 8)
