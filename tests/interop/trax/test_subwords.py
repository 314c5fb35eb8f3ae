"""Subwords of Trax: ids that Trax itself made, and what holds for every text."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.interop import trax
from layercomb.interop.trax.subwords import SubwordTokenizer, read_subwords

DATA = Path(__file__).parents[2] / 'data' / 'trax'
TINY = read_subwords(DATA / 'tiny.subword')
SAID = json.loads((DATA / 'tiny.subword.json').read_text())


@pytest.mark.parametrize(('text', 'ids'), SAID)
def test_ids_are_those_of_trax(text, ids):
    made = TINY.encode(text)
    assert made.dtype == np.int32 and made.tolist() == ids
    assert TINY.encode(text.encode()).tolist() == ids
    assert TINY.decode(made) == text


@given(text=st.text() | st.text(string.ascii_letters + ' _\\1;,'))
def test_every_text_comes_back(text):
    ids = TINY.encode(text)
    assert all(0 <= i < TINY.vocab_size for i in ids)
    assert TINY.decode(ids) == text
    decoder = TINY.incremental_decoder()
    pieces = [decoder.decode(int(i)) for i in ids] + [decoder.decode([], final=True)]
    assert ''.join(pieces) == text


def test_a_word_is_shown_when_it_is_whole():
    decoder = TINY.incremental_decoder()
    the, h, e, end = 2, *(TINY.subwords.index(x) for x in 'he_')
    assert [decoder.decode(i) for i in (the, h, e, end, the)] == ['the', '', '', ' he', ' the']
    assert TINY.decode([the, h, 10**6, -1, e]) == 'the he'


def test_an_escape_that_stands_for_nothing_is_marked():
    assert TINY.decode([TINY.subwords.index(x) for x in ['\\', *'9' * 9, ';', '_']]) == '\u3013'


def test_it_is_a_tokenizer():
    assert (TINY.vocab_size, TINY.bos_id, TINY.eos_id) == (len(TINY.subwords), 0, 1)
    adapted(TINY)
    assert read_subwords(DATA / 'tiny.subword') == TINY


def test_it_comes_with_a_model():
    model, tokenizer = trax.load(DATA / 'lm', vocab=DATA / 'tiny.subword')
    assert tokenizer == TINY and model.n_weights == 2060


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / 'x.subword'
    with pytest.raises(UsageError, match='No such file'):
        read_subwords(path)
    for data in (b'', b'one', b'\xff\n\xfe\n'):
        path.write_bytes(data)
        with pytest.raises(
            UsageError, match=r'x\.subword is no vocabulary of subwords, one a line'
        ):
            read_subwords(path)
    with pytest.raises(ValueError, match=r"no subwords for '0123456789;\\\\_u'"):
        SubwordTokenizer(('<pad>_', '<EOS>_', 'a_')).encode('b')


def test_lines_end_as_text_files_do(tmp_path):
    """A subword may hold separators that `str.splitlines` would cut at."""
    path = tmp_path / 'x.subword'
    path.write_text("'<pad>_'\r\n'<EOS>_'\r\n'a\u2028b\x85_'\r\nplain_  \n''\n", newline='')
    assert read_subwords(path).subwords == ('<pad>_', '<EOS>_', 'a\u2028b\x85_', 'plain_', '')
