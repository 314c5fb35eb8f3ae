"""What is said of an answer: scores, the best of several, usage, and streams that say the same."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Engine, flat

from layercomb.data import ByteTokenizer
from layercomb.serving.engine import TokenScore
from layercomb.serving.openai.answers import Answer
from layercomb.serving.openai.scores import Names, best
from layercomb.serving.protocol import Request
from layercomb.supervised.decoding.sampling import Sampler

NAMES = Names(ByteTokenizer())


def whole(engine, request, names=NAMES):
    async def ask():
        return await Answer(await engine.start(request), 'tiny', names).whole()

    return asyncio.run(ask())


def streamed(engine, request, names=NAMES):
    async def ask():
        answer = Answer(await engine.start(request), 'tiny', names)
        return [event async for event in answer.events()]

    *events, last = asyncio.run(ask())
    assert last == 'data: [DONE]\n\n'
    return [json.loads(event.removeprefix('data: ')) for event in events]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def ids(text):
    return tuple(text.encode())


def test_the_scores_of_prompt_and_answer():
    request = Request((ids('ab'),), 2, echo=True, logprobs=2, of_text=(True,))
    (choice,) = whole(Engine([ids('ca')]), request)['choices']
    assert choice['text'] == 'abca'
    scores = choice['logprobs']
    assert scores['tokens'] == ['a', 'b', 'c', 'a'] and scores['text_offset'] == [0, 1, 2, 3]
    assert scores['token_logprobs'] == [None, -1.125, -1.125, -1.25]
    assert scores['top_logprobs'][0] is None
    assert scores['top_logprobs'][1] == {'a': -1.0, '`': -1.125, 'b': -1.125}
    assert scores['top_logprobs'][3] == {'c': -1.0, 'b': -1.125, 'a': -1.25}


def test_scores_without_alternatives_and_none_at_all():
    for logprobs, shows in [(0, True), (None, True), (0, False)]:
        request = Request((ids('ab'),), 2, logprobs=logprobs, shows_logprobs=shows)
        (choice,) = whole(Engine([ids('ca')]), request)['choices']
        if logprobs is None or not shows:
            assert choice['logprobs'] is None
        else:
            assert choice['logprobs']['top_logprobs'] is None
            assert choice['logprobs']['token_logprobs'] == [-1.125, -1.25]
            assert choice['logprobs']['text_offset'] == [0, 1]


def test_a_prompt_alone_has_scores():
    request = Request((ids('ab'), ids('xyz')), 0, echo=True, logprobs=1)
    said = whole(Engine(), request)
    assert [c['text'] for c in said['choices']] == ['ab', 'xyz']
    assert [c['finish_reason'] for c in said['choices']] == ['length', 'length']
    assert said['choices'][1]['logprobs']['token_logprobs'] == [None, -1.125, -1.125]
    assert said['usage']['completion_tokens'] == 0


def test_parts_of_a_character_are_named_by_their_bytes():
    request = Request((ids('a'),), 4, logprobs=0)
    (choice,) = whole(Engine([ids('n€')]), request)['choices']
    scores = choice['logprobs']
    assert choice['text'] == 'n€'
    assert scores['tokens'] == ['n', r'bytes:\xe2', r'bytes:\x82', r'bytes:\xac']
    assert scores['text_offset'] == [0, 1, 1, 1]


def test_an_answer_goes_on_within_a_character_of_the_prompt():
    request = Request(((110, 0xC3),), 2, echo=True, logprobs=0)
    (choice,) = whole(Engine([(0xA9, 33)]), request)['choices']
    assert choice['text'] == 'né!'
    assert choice['logprobs']['text_offset'] == [0, 1, 1, 2]


def test_tokens_of_a_stop_text_have_no_scores_and_the_last_token_has():
    stopped = Request((ids('a'),), 9, stop=('cd',), logprobs=0)
    ended = Request((ids('a'),), 9, logprobs=0)
    for request, answer, tokens in [
        (stopped, 'bcde', ['b']),
        (stopped, 'bcxcd', ['b', 'c', 'x']),
        (ended, 'bc\0', ['b', 'c', 'token_id:0']),  # which programs such as lm_eval count
    ]:
        engine = Engine([ids(answer)])
        (choice,) = whole(engine, request)['choices']
        assert choice['logprobs']['tokens'] == tokens and choice['finish_reason'] == 'stop'
        parts = [event['choices'][0] for event in streamed(engine, request)]
        assert joined(part['logprobs']['tokens'] for part in parts) == tokens
        assert all(p['text'] or p['finish_reason'] for p in parts)


@given(
    st.text('ab€', max_size=6),
    st.lists(st.text('ab€\0', min_size=1, max_size=9), min_size=1, max_size=2),
    st.lists(st.text('ab€', min_size=1, max_size=3), max_size=2),
    st.booleans(),
    st.integers(0, 12),
)
def test_a_stream_says_what_the_whole_answer_says(prompt, answers, stop, echo, max_tokens):
    request = Request(
        (ids(prompt + 'a'),), max_tokens or (not echo), 2, echo=echo, logprobs=1,
        stop=tuple(stop), include_usage=True,
    )  # fmt: skip
    engine = Engine([ids(answer) for answer in answers])
    said = whole(engine, request)
    *pieces, last = streamed(engine, request)
    assert last['usage'] == said['usage'] and all(p['usage'] is None for p in pieces)
    for choice in said['choices']:
        parts = [p['choices'][0] for p in pieces if p['choices'][0]['index'] == choice['index']]
        assert ''.join(part['text'] for part in parts) == choice['text']
        assert [p['finish_reason'] for p in parts][-1:] == [choice['finish_reason']]
        for name, values in choice['logprobs'].items():
            assert joined(part['logprobs'][name] for part in parts) == values, name
        offsets = choice['logprobs']['text_offset']
        assert offsets == sorted(offsets) and max(offsets, default=0) <= len(choice['text'])
        for token, at in zip(choice['logprobs']['tokens'], offsets, strict=True):
            whole_token = not token.startswith(('bytes:', 'token_id:'))
            assert not whole_token or choice['text'][at : at + 1] == token


def test_the_best_of_several_are_shown():
    answers = [ids('zzz'), ids('aab'), ids('aaa'), ids('a\0')]
    request = Request((ids('a'), ids('a')), 3, 2, 4, logprobs=0, shows_logprobs=False)
    said = whole(Engine(answers), request)
    assert [c['text'] for c in said['choices']] == ['aaa', 'aab'] * 2
    assert [c['index'] for c in said['choices']] == [0, 1, 2, 3]
    assert said['usage']['completion_tokens'] == 22 and said['usage']['prompt_tokens'] == 2
    told = whole(Engine(answers), Request((ids('a'),), 3, 1, 4, logprobs=1, echo=True))
    assert told['choices'][0]['logprobs']['tokens'] == ['a', 'a', 'a', 'a']


def test_the_best_have_the_highest_mean():
    rows = [[TokenScore(1, x) for x in row] for row in ([-1, -5], [-2], [], [-2, -2])]
    assert best(rows, 4) == [2, 1, 3, 0] and best(rows, 1) == [2]


def test_tokens_that_were_known_are_counted():
    said = whole(Engine([ids('b')], n_cached=5), Request((ids('abcdef'),), 1))
    assert said['usage']['prompt_tokens_details'] == {'cached_tokens': 5}


def test_what_has_no_probability_is_written_as_a_number():
    def impossible(tokens):
        values = flat(tokens)
        values[98] = -float('inf')
        return values

    said = whole(Engine([ids('b')], impossible), Request((ids('a'),), 1, logprobs=0))
    assert said['choices'][0]['logprobs']['token_logprobs'] == [-9999.0]
    json.dumps(said, allow_nan=False)


def test_a_message():
    request = Request((ids('u:hi\na:'),), 9, logprobs=1, chat=True, of_text=(True,))
    said = whole(Engine([ids('€\0')]), request)
    assert said['object'] == 'chat.completion' and said['id'].startswith('chatcmpl-')
    (choice,) = said['choices']
    assert choice['message'] == {'role': 'assistant', 'content': '€', 'refusal': None}
    assert choice['finish_reason'] == 'stop'
    content = choice['logprobs']['content']
    assert [token['bytes'] for token in content] == [[0xE2], [0x82], [0xAC]]
    assert bytes(joined(token['bytes'] for token in content)).decode() == '€'
    assert content[0]['top_logprobs'] == [{'token': ':', 'logprob': -1.0, 'bytes': [58]}]


def test_a_message_in_pieces():
    request = Request((ids('a:'),), 2, 2, chat=True, include_usage=True)
    *pieces, last = streamed(Engine([ids('x€'), ids('y\0')]), request)
    assert {piece['object'] for piece in pieces} == {'chat.completion.chunk'}
    assert last['choices'] == [] and last['usage']['completion_tokens'] == 4
    deltas = {0: [], 1: []}
    for piece in pieces:
        (choice,) = piece['choices']
        deltas[choice['index']].append((choice['delta'], choice['finish_reason']))
    start = ({'role': 'assistant', 'content': ''}, None)
    assert deltas[0] == [start, ({'content': 'x'}, None), ({'content': '\ufffd'}, None),
                         ({}, 'length')]  # fmt: skip
    assert deltas[1] == [start, ({'content': 'y'}, None), ({}, 'stop')]


class Words:
    """Only decodes: a piece holds the space before it, and the first space is dropped."""

    vocab_size, eos_id = 6, 0
    pieces = ('', '▁the', '▁cat', 's', '▁', '\ufffd')

    def encode(self, text):
        return [self.pieces.index('▁' + word) for word in text.split()]

    def decode(self, ids):
        return ''.join(self.pieces[i] for i in ids).replace('▁', ' ').removeprefix(' ')


def test_names_of_tokens_that_are_only_decoded():
    names = Names(Words())
    wanted = ['token_id:0', ' the', ' cat', 's', ' ', 'token_id:5']
    assert [names.of(i) for i in range(6)] == wanted
    assert names.bytes_of(2) == list(b' cat') and names.bytes_of(5) is None
    assert names.bytes_of(0) == []


def test_offsets_where_pieces_hold_spaces():
    def even(tokens):
        return flat(tokens)[:6]

    engine = Engine([(2, 3, 0)], even, Words(), 6)
    request = Request(((1, 2),), 5, echo=True, logprobs=1, of_text=(True,))
    (choice,) = whole(engine, request, Names(Words()))['choices']
    assert choice['text'] == 'the cat cats'
    assert choice['logprobs']['text_offset'] == [0, 3, 7, 11, 12]


def test_sampling_is_part_of_a_request():
    assert Request(((1,),)).sampling == Sampler()
    with pytest.raises(TypeError):
        Request(((1,),), temperature=1.0)
