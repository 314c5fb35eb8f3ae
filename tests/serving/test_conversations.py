"""Conversations, keys and tokens over HTTP; the engine follows a script."""

import contextlib
import json
import threading
import time

import pytest
import uvicorn
from scripted import Engine
from test_serving import ask, events

from layercomb import serving
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.serving.access import check_access, checked_key
from layercomb.serving.protocol import Refusal
from layercomb.serving.routes import build
from layercomb.supervised.decoding.sampling import Sampler

LIMITS = serving.Limits(max_tokens=50, max_prompt=60, max_body=4000)
CHAT = '/v1/chat/completions'


class Talking(ByteTokenizer):
    """Bytes, with a template that wants turns in order."""

    chat = True
    generation = {'temperature': 0.25, 'top_k': 0, 'top_p': 0.75}
    stop_ids = (3,)

    def encode_chat(self, messages):
        if messages[-1]['role'] != 'user':
            raise UsageError('the chat template refuses these messages: the user has to speak')
        turns = ''.join(f'{m["role"][0]}:{m["content"]}\n' for m in messages)
        return self.encode(turns + 'a:')


@contextlib.contextmanager
def served(engine, tokenizer, key=None):
    application = build(engine, tokenizer, 'tiny', LIMITS, None, key)
    server = uvicorn.Server(uvicorn.Config(application, log_level='critical', ws='none'))
    with serving.bound('127.0.0.1', 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope='module')
def engine():
    return Engine([b'Hello\3', b'Hallo\3'], tokenizer=Talking(), max_len=100, n_cached=2)


@pytest.fixture(scope='module')
def address(engine):
    with served(engine, Talking()) as address:
        yield address


USER = {'role': 'user', 'content': 'hi'}


def talked(address, *messages, **fields):
    status, said, _ = ask(address, {'messages': list(messages), **fields}, CHAT)
    assert status == 200, said
    return json.loads(said)


def test_a_turn_of_a_conversation(address, engine):
    said = talked(
        address,
        {'role': 'developer', 'content': 'Be'},
        USER,
        {'role': 'assistant', 'content': 'yes', 'tool_calls': None, 'refusal': None},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]},
        model='tiny',
        n=2,
        stop='!',
        seed=3,
        frequency_penalty=1,
    )
    request = engine.asked[-1]
    assert bytes(request.prompts[0]) == b's:Be\nu:hi\na:yes\nu:ab\na:'
    assert request.sampling == Sampler(0.25, top_p=0.75, frequency_penalty=1.0)
    assert request.stop == ('!',) and request.seed == 3
    assert [c['message']['content'] for c in said['choices']] == ['Hello', 'Hallo']
    assert said['choices'][0]['finish_reason'] == 'stop' and said['choices'][0]['logprobs'] is None
    assert said['usage'] == {
        'prompt_tokens': 23, 'completion_tokens': 12, 'total_tokens': 35,
        'prompt_tokens_details': {'cached_tokens': 2},
    }  # fmt: skip


def test_a_turn_as_a_stream(address):
    fields = {'messages': [USER], 'stream': True, 'stream_options': {'include_usage': True}}
    status, said, headers = ask(address, fields, CHAT)
    assert status == 200 and headers['Content-Type'].startswith('text/event-stream')
    first, *pieces, end, usage = events(said.decode().splitlines())
    assert first['choices'][0]['delta'] == {'role': 'assistant', 'content': ''}
    assert ''.join(p['choices'][0]['delta']['content'] for p in pieces) == 'Hello'
    assert end['choices'][0]['delta'] == {} and end['choices'][0]['finish_reason'] == 'stop'
    assert usage['usage']['completion_tokens'] == 6


def test_an_answer_is_as_long_as_there_is_room(address, engine):
    for fields, wanted in [
        ({}, 50),
        ({'max_tokens': 3}, 3),
        ({'max_completion_tokens': 4}, 4),
        ({'max_completion_tokens': 4, 'max_tokens': 4}, 4),
    ]:
        talked(address, USER, **fields)
        assert engine.asked[-1].max_tokens == wanted
    talked(address, {'role': 'user', 'content': 'x' * 53})
    assert engine.asked[-1].max_tokens == 42


def test_scores_of_a_message(address, engine):
    said = talked(address, USER, logprobs=True, top_logprobs=2, max_tokens=1)
    (token,) = said['choices'][0]['logprobs']['content']
    assert token['token'] == 'H' and len(token['top_logprobs']) == 2
    talked(address, USER, logprobs=True)
    assert engine.asked[-1].logprobs == 0
    talked(address, USER, logprobs=False, top_logprobs=0)
    assert engine.asked[-1].logprobs is None


def test_what_asks_for_nothing_more_is_taken(address):
    talked(
        address, USER, tools=[], tool_choice='none', response_format={'type': 'text'}, store=False,
        modalities=['text'], metadata={'a': 'b'}, user='me', functions=None, logit_bias={},
        prompt_cache_key='a', safety_identifier='b',
    )  # fmt: skip


WRONG = [
    ({}, 'messages', "'messages' must be a list such as"),
    ({'messages': []}, 'messages', 'must be a list'),
    ({'messages': 'hi'}, 'messages', 'must be a list'),
    ({'messages': [3]}, 'messages[0]', 'must be an object with a role and a content'),
    ({'messages': [{'role': 'x', 'content': 'a'}]}, 'messages[0]', "has the role 'x': there are"),
    ({'messages': [{'role': ['x'], 'content': 'a'}]}, 'messages[0]', 'has the role'),
    ({'messages': [USER, {'role': 'tool', 'content': 'a'}]}, 'messages[1]', 'tools are not'),
    ({'messages': [{'role': 'user'}]}, 'messages[0]', 'has no content'),
    ({'messages': [{**USER, 'tool_calls': [1]}]}, 'messages[0]', "'tool_calls', which is not"),
    (
        {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}]},
        'messages[0]',
        "a part of the type 'image_url': only texts are supported",
    ),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]}, 'messages[0]', 'part'),
    ({'messages': [{'role': 'assistant', 'content': 'a'}]}, 'messages', 'the user has to speak'),
    ({'messages': [{'role': 'user', 'content': '\ud800'}]}, 'messages', 'are no text'),
    ({'messages': [{'role': 'user', 'content': 'x' * 61}]}, 'messages', 'are allowed here'),
    ({'messages': [USER], 'prompt': 'a'}, 'prompt', 'is not a field'),
    ({'messages': [USER], 'echo': True}, 'echo', 'is not a field'),
    ({'messages': [USER], 'tools': [{}]}, 'tools', 'the model calls no tools'),
    ({'messages': [USER], 'tool_choice': 'required'}, 'tool_choice', 'the model calls no tools'),
    ({'messages': [USER], 'response_format': {'type': 'json_object'}}, 'response_format', 'not'),
    ({'messages': [USER], 'modalities': ['audio']}, 'modalities', 'is not supported'),
    ({'messages': [USER], 'logprobs': 1}, 'logprobs', 'must be true or false'),
    ({'messages': [USER], 'top_logprobs': 1}, 'top_logprobs', "needs 'logprobs': true"),
    ({'messages': [USER], 'max_tokens': 0}, 'max_tokens', 'must be at least 1'),
    ({'messages': [USER], 'max_tokens': 51}, 'max_tokens', 'must be at most 50'),
    ({'messages': [USER], 'max_tokens': 5, 'max_completion_tokens': 6}, None, 'differ'),
    ({'messages': [USER], 'logit_bias': {'256': 1}}, 'logit_bias', 'outside the vocabulary'),
]


@pytest.mark.parametrize(('body', 'param', 'said'), WRONG)
def test_mistakes(address, body, param, said):
    status, answer, _ = ask(address, body, CHAT)
    error = json.loads(answer)['error']
    assert status == 400 and said in error['message'] and '\n' not in error['message']
    assert param in (None, error['param'])


def test_a_model_without_a_template_says_so():
    with served(Engine(), ByteTokenizer()) as address:
        status, said, _ = ask(address, {'messages': [USER]}, CHAT)
        assert status == 404 and 'has no chat template' in json.loads(said)['error']['message']
        assert b'data-kind="text"' in ask(address, path='/')[1]


def test_advice_that_cannot_be_is_refused_at_once():
    class Wrong(Talking):
        generation = {'top_p': 3.0}

    with pytest.raises(UsageError, match=r'generation settings cannot be used .*top_p'):
        build(Engine(), Wrong(), 'tiny', LIMITS, None)


def test_advice_holds_for_completions_too(address, engine):
    ask(address, {'prompt': 'a', 'temperature': 0.5})
    assert engine.asked[-1].sampling == Sampler(0.5, top_p=0.75)


# Keys


def test_who_does_not_send_the_key_is_refused():
    with served(Engine([b'x']), Talking(), 'k-1') as address:
        for path, body in [
            ('/v1/models', None),
            ('/v1/completions', {'prompt': 'a', 'max_tokens': 1}),
            (CHAT, {'messages': [USER], 'max_tokens': 1}),
            ('/tokenize', {'prompt': 'a'}),
            ('/detokenize', {'tokens': [97]}),
            ('/tokenizer_info', None),
        ]:
            sent = {'Content-Type': 'application/json'}
            for wrong in ({}, {'Authorization': 'Bearer k-2'}, {'Authorization': 'Basic k-1'}):
                status, said, headers = ask(address, body, path, headers={**sent, **wrong})
                error = json.loads(said)['error']
                assert status == 401 and error['code'] == 'invalid_api_key', path
                assert error['type'] == 'invalid_request_error' and 'k-1' not in said.decode()
                assert headers['WWW-Authenticate'] == 'Bearer'
            sent['Authorization'] = 'Bearer k-1'
            assert ask(address, body, path, headers=sent)[0] == 200, path
        assert ask(address, path='/')[0] == ask(address, path='/healthz')[0] == 200


def test_keys_are_what_a_header_can_hold():
    assert checked_key(None) is None and checked_key('aB-1!') == 'aB-1!'
    for wrong in ('', ' ', 'a b', 'ä', 'a\n', 'x' * 513, 5):
        with pytest.raises(ValueError, match='the API key must be 1 to 512 letters'):
            checked_key(wrong)
    for said in ('', 'bearer', 'Bearer', 'Bearer ', 'Bearer \xe4\udc80', 'Bearer aa'):
        with pytest.raises(Refusal, match='key'):
            check_access({'authorization': said}, 'a')
    check_access({'authorization': 'bearer  a '}, 'a')
    check_access({}, None)


# Tokens


def test_the_tokenizer_is_served(address):
    _, said, _ = ask(address, {'prompt': 'né', 'model': 'tiny'}, '/tokenize')
    assert json.loads(said) == {'tokens': [110, 195, 169], 'count': 3, 'max_model_len': 100}
    assert json.loads(ask(address, {'tokens': [110, 195, 169]}, '/detokenize')[1])['prompt'] == 'né'
    info = json.loads(ask(address, path='/tokenizer_info')[1])
    assert info['eos_token'] == '\0' and info['bos_token'] is None
    assert info['chat_template'] is None


def test_a_text_without_what_starts_and_ends_it():
    class Bordered(ByteTokenizer):
        def encode(self, text):
            return [1, *super().encode(text).tolist(), 2]

    with served(Engine(), Bordered()) as address:
        for special, wanted in [(True, [1, 97, 2]), (False, [97])]:
            body = {'prompt': 'a', 'add_special_tokens': special}
            assert json.loads(ask(address, body, '/tokenize')[1])['tokens'] == wanted


@pytest.mark.parametrize(
    ('path', 'body', 'param'),
    [
        ('/tokenize', {}, 'prompt'),
        ('/tokenize', {'prompt': ['a']}, 'prompt'),
        ('/tokenize', {'prompt': '\ud800'}, 'prompt'),
        ('/tokenize', {'prompt': 'a', 'add_special_tokens': 1}, 'add_special_tokens'),
        ('/detokenize', {'tokens': 'a'}, 'tokens'),
        ('/detokenize', {'tokens': [256]}, 'tokens'),
        ('/detokenize', {'tokens': [True]}, 'tokens'),
        ('/detokenize', {'tokens': [1], 'x': 1}, 'x'),
    ],
)
def test_mistakes_about_tokens(address, path, body, param):
    status, said, _ = ask(address, body, path)
    assert status == 400 and json.loads(said)['error']['param'] == param
