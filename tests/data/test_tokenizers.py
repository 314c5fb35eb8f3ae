from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercomb import data

TOKENIZER = data.ByteTokenizer()


@given(st.text())
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text.encode()),)
    assert TOKENIZER.decode(ids) == text


@given(st.binary())
def test_bytes_are_taken_as_they_are(document):
    assert TOKENIZER.encode(document).tolist() == list(document)


@given(st.text(), st.integers(1, 5))
def test_pieces_of_a_stream_join_to_the_text(text, size):
    decoder = TOKENIZER.incremental_decoder()
    ids = TOKENIZER.encode(text)
    pieces = [decoder.decode(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert ''.join(pieces) + decoder.decode([], final=True) == text
    assert '\ufffd' in text or not any('\ufffd' in piece for piece in pieces)


def test_an_unfinished_character_is_marked_only_at_the_end():
    decoder = TOKENIZER.incremental_decoder()
    assert decoder.decode(np.int32(0xC3)) == ''
    assert decoder.decode([], final=True) == '\ufffd'


def test_what_is_no_utf8_is_replaced():
    assert TOKENIZER.decode([97, 255, 98]) == 'a\ufffdb'


def test_it_is_a_value():
    assert data.ByteTokenizer() == TOKENIZER and hash(TOKENIZER) == hash(data.ByteTokenizer())
    assert (TOKENIZER.vocab_size, TOKENIZER.eos_id, TOKENIZER.pad_id) == (256, 0, 0)


@pytest.mark.parametrize('ids', [[256], [-1], [1.5]])
def test_tokens_that_are_no_bytes(ids):
    with pytest.raises(ValueError, match=r'no bytes \(integers in 0 … 255\)'):
        TOKENIZER.decode(ids)


def test_a_document_that_is_no_text():
    with pytest.raises(TypeError, match='a document is a str or bytes, not int: 7'):
        TOKENIZER.encode(7)
