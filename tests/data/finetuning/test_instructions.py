"""Instructions and their answers as tokens: the columns they stand in, and what is refused."""

from __future__ import annotations

import pytest
from toy_chats import TURNS, bot, marked, refused, user, words

from layercomb import data
from layercomb.data.adapted import adapted
from layercomb.data.finetuning.answers import Texts
from layercomb.errors import UsageError


@pytest.mark.parametrize(
    'row, chat, plain',
    [
        (
            {'instruction': 'a', 'input': 'b', 'output': 'c', 'text': 'd'},
            'U a b . B [c] [.]',
            'a b [c] [.]',
        ),
        ({'instruction': 'a', 'input': '', 'output': 'c'}, 'U a . B [c] [.]', 'a [c] [.]'),
        ({'instruction': '', 'input': 'b', 'output': 'c'}, 'U b . B [c] [.]', 'b [c] [.]'),
        ({'instruction': 'a', 'context': 'b', 'response': 'c'}, 'U a b . B [c] [.]', 'a b [c] [.]'),
        ({'prompt': 'a', 'completion': 'c d'}, 'U a . B [c] [d] [.]', 'a [c] [d] [.]'),
        ({'question': 'a', 'answer': 'c'}, 'U a . B [c] [.]', 'a [c] [.]'),
        ({'input': 'a', 'output': 'c'}, 'U a . B [c] [.]', 'a [c] [.]'),
        ({'text': 'a b c'}, 'a [b] [c] [.]', 'a [b] [c] [.]'),
    ],
)  # fmt: skip
def test_forms_of_instructions(row, chat, plain):
    for tokenizer, wanted in ((words(TURNS), chat), (words(), plain)):
        assert marked(data.instructions([row], tokenizer)[0], tokenizer) == wanted


def test_plain_prompts_and_answers():
    def text(row):
        ids, weights = data.instructions([row], data.ByteTokenizer())[0]
        return bytes(ids.tolist()), bytes(ids[weights > 0].tolist())

    asked = {'instruction': 'Add.', 'input': '1, 2', 'output': '3'}
    assert text(asked) == (b'Add.\n\n1, 2\n\n3\0', b'3\0')
    assert text({'prompt': 'The c', 'completion': 'at'}) == (b'The cat\0', b'at\0')
    halves = {'prompt': '\ud83c\udf89', 'completion': '\ud800'}  # as JSON may hold
    assert text(halves) == ('🎉\ufffd\0'.encode(), '\ufffd\0'.encode())


def test_a_bos_stands_before_plain_texts_if_the_tokenizer_puts_it_there():
    for bos, wanted in ((True, '<s> [a] [b] [.]'), (False, 'a [b] [.]')):
        tokenizer = words(bos=bos)
        assert marked(data.instructions([{'text': 'a b'}], tokenizer)[0], tokenizer) == wanted
        assert Texts(adapted(tokenizer)).start.tolist() == [0] * bos


def test_how_rows_are_read_is_said():
    said = data.instructions([{'question': 'a', 'answer': 'c'}], words(TURNS)).said
    assert said == 'question (and context) → answer, as a conversation'
    assert data.instructions([{'text': 'a'}], words()).said == 'text, all of which is learnt'
    asked = data.instructions([{'instruction': 'a', 'output': 'c'}], words()).said
    assert asked == 'instruction (and input or context) → output, as a plain text'


@pytest.mark.parametrize(
    'row, cause',
    [
        ({'messages': [user('a'), bot('b')]}, 'holds a conversation: data.chat takes it'),
        ({'title': 'a', 'body': 'b'}, "has the columns 'title', 'body': name them instruction"),
        ({'question': 'a', 'answer': ' '}, "'answer' is empty: write it, or remove the row"),
        ({'question': ' ', 'answer': 'b'}, "'question' is empty: write it, or remove the row"),
        (
            {'prompt': [user('a')], 'completion': 'b'},
            "'prompt' is .*: give a text; data.chat takes",
        ),
    ],
)
def test_rows_that_are_no_instruction(row, cause):
    refused(row, cause, data.instructions)


def test_all_rows_have_the_columns_of_the_first():
    rows = [{'prompt': 'a', 'completion': 'b'}, {'question': 'a', 'completion': 'b'}]
    with pytest.raises(UsageError, match=r"^source\[1\] has no 'prompt', but 'question', 'compl"):
        list(data.instructions(rows, words()))
