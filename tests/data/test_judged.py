"""Preferences and labelled texts, from rows to examples."""

import gzip
import json

import numpy as np
import pytest

from layercomb import data
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError, UsageWarning
from layercomb.interop.chat_template import ChatTemplate

BYTES = ByteTokenizer()
ROW = {'prompt': 'ab', 'chosen': 'good', 'rejected': 'no'}


class Letters:
    """Bytes as a model's tokenizer gives them: 1 starts a text, 2 ends it, and a turn."""

    vocab_size, eos_id, bos_id, stop_ids = 128, 2, 1, (2,)
    chat = ChatTemplate(
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\x02\n{% endfor %}"
        '{% if add_generation_prompt %}a:{% endif %}'
    )

    def encode(self, text, whole=True):
        ids = list(text.encode())
        return np.array([1, *ids, 2] if whole else ids, np.int32)

    def encode_chat(self, messages):
        return self.encode(self.chat.render(messages), whole=False)

    @property
    def vocabulary(self):
        return self


def plain(**changes):
    made = Letters()
    made.chat = None
    return made


def shown(example):
    """The tokens of both rows as text, and those that have weight."""
    _, targets, weights = example
    rows = zip(targets[..., 0], weights, strict=True)
    return [(bytes(x[x > 0].tolist()), bytes(x[w > 0].tolist())) for x, w in rows]


def test_only_answers_have_weight():
    inputs, targets, weights = data.preferences([ROW], BYTES, 9)[0]
    assert inputs[0].tolist() == [0, *b'abgood', 0, 0]
    assert targets[0, :, 0].tolist() == [*b'abgood', 0, 0, 0]
    assert weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0]]
    assert np.isnan(targets[..., 1].view(np.float32)[weights > 0]).all()  # no reference yet
    with_ends = data.preferences([ROW], plain(), 9)[0]
    assert with_ends[0][0].tolist() == [1, *b'abgood', 0, 0]
    assert shown(with_ends) == [(b'abgood\x02', b'good\x02'), (b'abno\x02', b'no\x02')]


def test_conversations_take_the_template():
    user, good = {'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'good'}
    bad = {'role': 'assistant', 'content': 'no'}
    whole = {'prompt': 'ab', 'chosen': [user, good], 'rejected': [user, bad]}
    forms = [ROW, whole, {'prompt': [user], 'chosen': [good], 'rejected': [bad]}]
    forms.append({'chosen': [user, good], 'rejected': [user, bad]})
    for row in forms:
        one, other = shown(data.preferences([row], Letters(), 30)[0])
        assert one == (b':ab\x02\na:good\x02', b'good\x02')
        assert other == (b':ab\x02\na:no\x02', b'no\x02')
    with pytest.raises(UsageError, match='row 0 holds messages, and the tokenizer has no chat'):
        data.preferences([whole], BYTES, 30)
    other_prompt = {**whole, 'rejected': [{'role': 'user', 'content': 'x'}, bad]}
    with pytest.raises(UsageError, match='of row 0 answer different prompts'):
        data.preferences([other_prompt], Letters(), 30)
    with pytest.raises(UsageError, match="'chosen' of row 0 must end with a message of the assis"):
        data.preferences([{**whole, 'chosen': [good, user]}], Letters(), 30)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'rejected': 'good'}, 'chosen and rejected of row 1 are the same in 9 tokens'),
        ({'chosen': ' '}, "'chosen' of row 1 is empty"),
        ({'prompt': ''}, "'prompt' of row 1 is empty"),
        ({'prompt': 'x' * 9}, 'the prompt of row 1 has 10 tokens, and length=9 leaves no room'),
        ({'rejected': None}, "row 1 has no 'rejected'"),
        ({'prompt': 3}, 'row 1 holds messages, and the tokenizer has no chat template'),
        ({'prompt': None}, "'prompt' of row 1 is None and no text"),
    ],
)
def test_a_preference_that_teaches_nothing_is_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        data.preferences([ROW, {**ROW, **changes}], BYTES, 9)


def test_long_prompts_are_left_out_and_long_answers_cut_aloud():
    rows = [ROW, {**ROW, 'prompt': 'x' * 9}, {**ROW, 'chosen': 'long' * 9}]
    with pytest.warns(
        UsageWarning, match=r'length=9: 1 of 2 pairs .* is cut; 1 pairs are left out'
    ):
        found = data.preferences(rows, BYTES, 9, drop_long=True)
    assert len(found) == 2 and found[1][0].shape == (2, 9)


def test_batches_take_turns_and_know_their_reference():
    rows = [{**ROW, 'prompt': f'{i}'} for i in range(5)]
    found = data.preferences(rows, BYTES, 8)
    reference = np.arange(10, dtype=np.float32).reshape(5, 2)
    batches = data.preference_batches(found, 2, num_epochs=1).referred(reference)
    prompts, totals = [], []
    for inputs, targets, weights in batches:
        assert inputs.shape == (4, 8) and targets.shape == (4, 8, 2)
        assert (inputs[::2, 1] == inputs[1::2, 1]).all()
        shares = targets[..., 1].view(np.float32)
        prompts += [int(chr(x)) for x in inputs[::2, 1] if x]
        totals += (shares * weights).sum(1).reshape(-1, 2).tolist()
    np.testing.assert_allclose(totals[:5], reference[prompts], rtol=1e-6)
    assert sorted(prompts) == list(range(5)) and totals[5] == [0, 0]  # the rest is padding


def test_files_of_rows(tmp_path):
    lines, packed = tmp_path / 'a.jsonl', tmp_path / 'a.jsonl.gz'
    text = ''.join(json.dumps({'text': t, 'label': y}) + '\n' for t, y in [('é', 'x'), ('b', 'y')])
    lines.write_text(text + '\n', encoding='utf-8')
    packed.write_bytes(gzip.compress(text.encode()))
    comma, tab = tmp_path / 'a.csv', tmp_path / 'a.tsv'
    comma.write_text('text,label\n"é, or\nmore",0\nb,1\n', encoding='utf-8')
    tab.write_text('sentence\tlabel\né\t10\nb\t9\n', encoding='utf-8')
    for path in (lines, packed, comma):
        assert len(data.labelled(path, BYTES, 12)) == 2
    assert data.labels(str(comma)) == (0, 1) and data.labels(tab) == (9, 10)
    assert data.labelled(tab, BYTES, 12).targets.tolist() == [1, 0]
    assert data.labelled(comma, BYTES, 12, labels=(1, 0)).targets.tolist() == [1, 0]
    (tmp_path / 'a.json').write_text('[{"text": "a", "label": 0}, {"text": "b", "label": 1}]')
    assert data.labels(tmp_path / 'a.json') == (0, 1)
    comma.write_text('text,label\na,b,c\n')
    with pytest.raises(UsageError, match=r'a.csv:2 has not the 2 columns of the first line'):
        data.labels(comma)
    lines.write_text('{"text": 1\n')
    with pytest.raises(UsageError, match=r'a.jsonl:1 is no JSON: give an object in each line'):
        data.labels(lines)
    with pytest.raises(UsageError, match=r'a.txt.* is none of .jsonl, .jsonl.gz, .json, .pa'):
        data.labels(tmp_path / 'a.txt')


def test_two_texts_are_read_as_one():
    row = {'text_a': 'abc', 'text_b': 'defgh', 'label': 1}
    rows = [row, {**row, 'label': 0}]
    ids, types, mask, target, weight = data.labelled(rows, Letters(), 12, typed=True)[0]
    assert ids.tolist() == [1, *b'abc', 2, *b'defgh', 2, 0] and int(target) == 1
    assert types.tolist() == [0] * 5 + [1] * 6 + [0] and mask.tolist() == [True] * 11 + [False]
    with pytest.warns(UsageWarning, match='2 of 2 texts are longer than 8 tokens, and are cut'):
        cut = data.labelled(rows, Letters(), 8)[0]
    assert cut[0].tolist() == [1, *b'ab', 2, *b'def', 2] and weight == 1
    single = data.labelled([{'text': t, 'label': t} for t in ('abc', 'd')], BYTES, 4)[0]
    assert single[0].tolist() == [*b'abc', 0] and single[1].tolist() == [True] * 3 + [False]


@pytest.mark.parametrize(
    ('rows', 'said'),
    [
        ([{'text': 'a'}], "'label' of row 0 is None: give a string or an integer"),
        ([{'text': 'a', 'label': 1.5}], "'label' of row 0 is 1.5"),
        ([{'text': 'a', 'label': 'x'}] * 2, "all 2 rows have the label 'x'"),
        (
            [{'text': 'a', 'label': 'x'}, {'text': 'a', 'label': 1}],
            'labels are strings in 1 rows and integers in 1',
        ),
        ([{'words': 'a', 'label': 0}, {'text': 'a', 'label': 1}], 'row 0 has no text: name the'),
        ([{'text': '', 'label': 0}, {'text': 'a', 'label': 1}], "'text' of row 0 is empty"),
    ],
)
def test_rows_without_a_use_are_refused(rows, said):
    with pytest.raises(UsageError, match=said):
        data.labelled(rows, BYTES, 4)


def test_labels_that_training_does_not_know_are_refused():
    rows = [{'text': 'a', 'label': 'x'}, {'text': 'b', 'label': 'z'}]
    with pytest.raises(UsageError, match="the label 'z' of row 1 is none of 'x', 'y'"):
        data.labelled(rows, BYTES, 4, labels=('x', 'y'))
    assert str(data.labelled(rows, BYTES, 4)) == '2 texts of 2 labels: x 1, z 1'


def test_topics_are_apart_and_of_every_label():
    splits = [data.python_topics(split) for split in ('train', 'valid', 'test')]
    texts = [{row['text'] for row in rows} for rows in splits]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert len(splits[0]) > 800 and all(len(data.labels(rows)) == 8 for rows in splits)
