"""What clients send to a server: what asks for nothing is taken, what asks for more is refused."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

import layercomb as lc
from layercomb import cli, models, serving
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.serving import Limits, hosts
from layercomb.serving.openai.completions import parse
from layercomb.serving.protocol import Refusal

LIMITS = Limits(max_tokens=50, max_prompt=20, max_choices=4)


def read(body=b'', **fields):
    body = body or json.dumps({'prompt': 'a', **fields}).encode()
    return parse(body, ByteTokenizer(), 'tiny', 256, LIMITS)


def refused(body=b'', **fields):
    with pytest.raises(Refusal) as caught:
        read(body, **fields)
    assert caught.value.status == 400 and '\n' not in str(caught.value)
    return caught.value.body['error']


PLAIN = read(seed=1)

ASKS_FOR_NOTHING = [
    {'best_of': 1},
    {'best_of': 1.0},
    {'best_of': None},
    {'logprobs': None},
    {'logprobs': False},
    {'logit_bias': {}},
    {'logit_bias': None},
    {'logit_bias': {'50256': 0}},
    {'suffix': None},
    {'suffix': ''},
    {'presence_penalty': 0, 'frequency_penalty': -0.0},
    {'stop': None},
    {'stop': []},
    {'temperature': None},
    {'temperature': 1},
    {'echo': False},
    {'echo': None},
    {'max_tokens': None},
    {'max_tokens': 16.0},
    {'stream_options': None},
    {'stream_options': {}},
    {'stream_options': {'include_usage': None}},
    {'stream_options': {'include_obfuscation': False, 'include_usage': False}},
    {'model': None, 'user': {'any': 'thing'}},
    {'model': 'tiny', 'n': 1.0},
]


@pytest.mark.parametrize('fields', ASKS_FOR_NOTHING, ids=repr)
def test_what_asks_for_nothing_changes_nothing(fields):
    assert read(**{'seed': 1, **fields}) == PLAIN


def test_as_many_of_the_best_as_there_are_choices():
    for n, best_of in [(2, 2), (3, 1), (3, 3.0), (4, 2)]:
        assert read(n=n, best_of=best_of, seed=1) == read(n=n, seed=1)
    for n, best_of in [(1, 2), (2, 3), (3, 4.0)]:
        assert read(n=n, best_of=best_of).n_rows == best_of
    for n, best_of in [(2, 0), (2, True), (2, '2'), (2, 2.5), (2, -1)]:
        assert refused(n=n, best_of=best_of)['param'] == 'best_of'
    assert refused(n='2', best_of=2)['param'] == 'n'


ASKS_FOR_MORE = [
    ('logprobs', -1),
    ('logprobs', 21),
    ('logprobs', True),
    ('logit_bias', {'-5': 1}),
    ('logit_bias', {'5': 101}),
    ('logit_bias', {'٥': 1}),
    ('logit_bias', {'5': False}),
    ('logit_bias', []),
    ('suffix', ' '),
    ('suffix', 0),
    ('presence_penalty', 2.1),
    ('presence_penalty', False),
    ('frequency_penalty', '0'),
    ('stop', ''),
    ('stop', ['']),
    ('max_tokens', 0),
    ('max_tokens', 16.5),
    ('max_tokens', True),
    ('max_tokens', 1e300),
    ('seed', 2**63),
    ('seed', 1e30),
    ('n', 10**400),
    ('top_k', -1),
    ('temperature', True),
    ('stream_options', {'include_usage': 1}),
    ('stream_options', {'include_obfuscation': True}),
    ('stream_options', {'include_everything': None, 'x': 1}),
    ('functions', []),
    ('min_p', 0.1),
]


@pytest.mark.parametrize(('name', 'value'), ASKS_FOR_MORE, ids=repr)
def test_what_asks_for_more_is_refused_by_name(name, value):
    assert refused(**{name: value})['param'] == name


def test_nothing_new_may_be_asked_for_with_an_echo_alone():
    assert read(echo=True, max_tokens=0).max_tokens == 0
    for echo in (False, None):
        assert refused(echo=echo, max_tokens=0)['param'] == 'max_tokens'


def test_a_field_that_comes_twice_is_refused():
    for body in (
        b'{"prompt": "a", "n": 1, "n": 2}',
        b'{"prompt": "a", "logit_bias": {"5": 0, "5": 1}}',
        b'{"prompt": "a", "prompt": "a"}',
    ):
        assert 'is there twice: give it once' in refused(body)['message']
    error = refused(b'{"prompt": "a", "prompt": "a"}')
    assert error['message'] == "'prompt' is there twice: give it once"
    assert error['param'] == 'prompt' and error['code'] == 'duplicate_field'
    many = ','.join(f'"{i}": 0' for i in range(60_000))
    started = time.perf_counter()
    assert 'is there twice' in refused(f'{{{many}, "59999": 0}}'.encode())['message']
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    'fields',
    [
        {'prompt': [1e300]},
        {'prompt': [10**4000]},
        {'prompt': [[97, -(10**300)]]},
        {'x' * 10_000: 1},
        {'prompt': 'a' * 10_000},
        {'model': 'm' * 10_000},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_little_of_what_was_sent_is_sent_back(fields):
    with pytest.raises(Refusal) as caught:
        read(**fields)
    assert len(str(caught.value)) < 150 and len(caught.value.body['error']['param'] or '') < 70
    body = b'{"%b": 1, "%b": 2}' % (b'y' * 5000, b'y' * 5000)
    assert len(refused(body)['message']) < 150


def test_little_of_what_a_tokenizer_says_is_sent_back():
    class Verbose(ByteTokenizer):
        def encode(self, text):
            raise ValueError(f'cannot encode {text}')

    with pytest.raises(Refusal, match='is no text') as caught:
        parse(json.dumps({'prompt': 'a' * 5000}).encode(), Verbose(), 'tiny', 256, LIMITS)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    'body',
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "seed": ' + b'9' * 5000 + b'}',
        b'{"prompt": "a", "user": ' + b'[' * 50_000 + b']' * 50_000 + b'}',
        b'{"prompt": ' + b'{"a":' * 50_000 + b'}' * 50_000 + b'}',
        b'\x00',
        b'',
    ],
    ids=lambda body: body[:24],
)
def test_what_is_hardly_json_is_refused(body):
    with pytest.raises(Refusal) as caught:
        parse(body, ByteTokenizer(), 'tiny', 256, LIMITS)
    assert caught.value.body['error']['code'] == 'invalid_json'


def test_token_ids_may_be_written_as_whole_floats():
    assert read(prompt=[97.0, 98]).prompts == ((97, 98),)
    assert all(type(i) is int for i in read(prompt=[97.0]).prompts[0])
    assert refused(prompt=[97.5])['param'] == 'prompt'


def test_a_text_that_the_tokenizer_does_not_know():
    class Letters(ByteTokenizer):
        def encode(self, text):
            return [{'a': 1, 'b': 2}[c] for c in text if c != ' ']

    for prompt, said in [('abc', 'is no text (c)'), (' ', 'is empty: give a text that has')]:
        with pytest.raises(Refusal) as caught:
            parse(json.dumps({'prompt': prompt}).encode(), Letters(), 'tiny', 256, LIMITS)
        assert caught.value.status == 400 and said in str(caught.value)


# Names of hosts


@pytest.mark.parametrize(
    ('said', 'name'),
    [
        ('chat.example.org', 'chat.example.org'),
        ('Chat.Example.ORG:8443', 'chat.example.org'),
        ('chat.example.org.', 'chat.example.org'),
        ('chat.example.org.:80', 'chat.example.org'),
        ('[::1]:8000', '::1'),
        ('[0:0:0:0:0:0:0:1]', '::1'),
        ('127.0.0.1:', '127.0.0.1'),
        ('', ''),
        ('me@127.0.0.1', 'me@127.0.0.1'),  # no name that anybody allows
        ('127.0.0.1:80:90', '127.0.0.1:80:90'),
    ],
)
def test_the_name_in_a_host_header(said, name):
    assert hosts.name_of(said) == name


def test_names_that_may_be_allowed():
    assert hosts.allowed('A.example, b.example.,[::1],*') == ('a.example', 'b.example', '::1', '*')
    assert hosts.allowed('xn--Bcher-kva.example') == ('xn--bcher-kva.example',)
    assert hosts.allowed('a.example, ,') == hosts.allowed('a.example,') == ('a.example',)
    assert hosts.allowed(['_dmarc.a-b.example', 'a' * 63]) == ('_dmarc.a-b.example', 'a' * 63)
    for wrong in ('https://a.example', 'a.example:80', 'a.example/x', '*.example', 'a b', '', 5):
        with pytest.raises(ValueError, match='without scheme, port and path'):
            hosts.allowed([wrong])
    long = '.'.join(['a' * 63] * 4)
    for wrong in ('x:80', 'a..b', '.a', '-a.example', 'a-.example', 'a' * 64, long, '::1%$(x)'):
        with pytest.raises(ValueError, match='is no host name: give names as a browser sends them'):
            hosts.allowed(wrong)
    for wrong in ('', ',', ' , '):
        with pytest.raises(ValueError, match='is no host name'):
            hosts.allowed(wrong)
    assert hosts.allowed(long[:253]) == (long[:253],)


@pytest.mark.parametrize('name', ['bücher.example', 'straße.example', 'faß.de', '例え.jp', 'a。b'])
def test_names_beyond_ascii_are_given_as_browsers_send_them(name):
    """There are two rules for them: by the older one, 'faß.de' is the host of somebody else."""
    with pytest.raises(ValueError, match='give the name as the browser sends it, xn--…'):
        hosts.allowed(f'a.example,{name}')


@given(st.text(max_size=20))
def test_any_host_header_has_a_name(said):
    name = hosts.name_of(said)
    assert hosts.name_of(name) == name or ':' in name or name.endswith('.')


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(256, 8, 8, 1, 1, max_len=32)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


@contextlib.contextmanager
def served(model, *allowed, monkeypatch):
    """An address at which `serving.run` answers, on this machine alone."""
    servers = []

    class Server(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, 'Server', Server)
    monkeypatch.setattr(logging, 'basicConfig', lambda **how: None)
    with serving.bound('127.0.0.1', 0) as listener:
        args = (model, ByteTokenizer(), 'tiny', LIMITS, listener, *allowed)
        thread = threading.Thread(target=serving.run, args=args)
        thread.start()
        while thread.is_alive() and not (servers and servers[0].started):
            time.sleep(0.01)
        try:
            yield listener.getsockname()[:2]
        finally:
            servers[0].should_exit = True
            thread.join()


def status(address, host, path='/v1/models'):
    """Of a request with that Host, or with none."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.putrequest('GET', path, skip_host=True)
        if host is not None:
            connection.putheader('Host', host)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_a_proxy_that_hands_the_host_on(model, monkeypatch):
    with served(model, 'chat.example.org,[2001:db8::1]', monkeypatch=monkeypatch) as address:
        for host in (
            'chat.example.org',
            'CHAT.example.org:443',
            'chat.example.org.',
            '[2001:DB8::1]:80',
            'localhost',
            f'127.0.0.1:{address[1]}',
        ):
            assert status(address, host)[0] == 200, host
        for host in ('evil.example', 'xchat.example.org', 'chat.example.org.evil.example', ''):
            assert status(address, host)[0] == 403, host
        for path in ('/', '/healthz'):
            assert status(address, 'evil.example', path)[0] == 403
        said = status(address, 'New.example:8000')[1]
        assert 'start it with --allowed_hosts new.example' in json.loads(said)['error']['message']
        long = '.'.join(['a' * 63] * 3)
        for host, shown in [
            (f'{long}:80', long),
            ('[2001:DB8::2]:80', '2001:db8::2'),
            ('$(reboot)', 'NAME'),
            ('a;b', 'NAME'),
            ('*', 'NAME'),
            ('[fe80::1%25$(x)]', 'NAME'),
            ('-a', 'NAME'),
            ('', 'NAME'),
        ]:
            said = json.loads(status(address, host)[1])['error']['message']
            assert said.endswith(f' --allowed_hosts {shown}') and f'Host {shown}: ' in said, host
        with socket.create_connection(address) as client:  # as health checks of old protocols do
            client.sendall(b'GET /healthz HTTP/1.0\r\n\r\n')
            assert client.recv(100).startswith(b'HTTP/1.1 200')


def test_any_name_and_none_but_this_machines(model, monkeypatch):
    with served(model, '*', monkeypatch=monkeypatch) as address:
        assert status(address, 'evil.example')[0] == 200
    with served(model, monkeypatch=monkeypatch) as address:
        assert status(address, 'chat.example.org')[0] == 403
        assert status(address, 'localhost:1')[0] == 200


def test_one_name_is_not_taken_for_its_letters(model):
    """A text among which another is looked for holds every part of itself."""
    application = serving.app(model, ByteTokenizer(), 'tiny', LIMITS, 'chat.example.org')

    async def call(host):
        sent = []
        scope = {
            'type': 'http', 'method': 'GET', 'path': '/healthz', 'raw_path': b'/healthz',
            'query_string': b'', 'headers': [(b'host', host)], 'scheme': 'http',
            'server': ('127.0.0.1', 80), 'http_version': '1.1', 'root_path': '',
        }  # fmt: skip

        async def receive():
            return {'type': 'http.request', 'body': b''}

        async def send(message):
            sent.append(message)

        await application(scope, receive, send)
        return sent[0]['status']

    assert asyncio.run(call(b'chat.example.org')) == 200
    assert asyncio.run(call(b'example.org')) == 403


def test_ports_are_whole_numbers_of_any_kind():
    with serving.bound('127.0.0.1', np.int64(0)) as listener:
        assert listener.getsockname()[1] > 0
    for wrong in (80.0, '80', None):
        with pytest.raises(UsageError, match='cannot be: choose --port'):
            serving.bound('127.0.0.1', wrong).__enter__()


def test_the_launcher_names_what_is_no_host(capsys):
    assert cli.main(['serve', 'no_run', '--allowed_hosts', 'http://a.example']) == 2
    said = capsys.readouterr().err
    assert "'http://a.example' is no host name" in said and said.count('\n') == 1
