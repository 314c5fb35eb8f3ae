"""A server and its clients, over real sockets."""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_answers
import uvicorn
from scripted import Engine

import layercomb as lc
from layercomb import models, serving
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.serving.openai.completions import parse
from layercomb.supervised import decoding

MAX_LEN = 600
NET = models.TransformerLM(256, d_model=8, d_ff=8, n_layers=1, n_heads=1, max_len=MAX_LEN)
LIMITS = serving.Limits(
    max_tokens=MAX_LEN, max_body=4000, max_concurrent=2, max_queue=8, patience=20
)


@pytest.fixture(scope='module')
def model():
    return lc.Model(NET).init(lc.shape_dtype((1, 8), 'int32'))


@contextlib.contextmanager
def served(application):
    """An address at which an application answers."""
    config = uvicorn.Config(
        application, log_level='critical', ws='none', timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
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
def server(model):
    """An address, and the engine behind it."""
    application = serving.app(model, ByteTokenizer(), 'tiny', LIMITS, ['127.0.0.1'])
    with served(application) as address:
        yield address, application.state.engine


def ask(address, body=None, path='/v1/completions', method=None, headers=None):
    """(status, body, headers) of one request."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {'Content-Type': 'application/json'} if headers is None else headers
        connection.request(method or ('GET' if body is None else 'POST'), path, data, sent)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def completed(address, **body):
    status, said, _ = ask(address, body)
    assert status == 200, said
    return json.loads(said)


def events(lines):
    """The values of server-sent events, without the last, which is [DONE]."""
    datas = [line[6:] for line in lines if line.startswith('data: ')]
    assert datas[-1] == '[DONE]'
    return [json.loads(data) for data in datas[:-1]]


def idle(engine, seconds=10):
    """Whether all places are free within some time."""
    end = time.monotonic() + seconds
    while engine.n_running and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.n_running


def test_a_completion_is_what_decoding_makes(server, model):
    address, _ = server
    said = completed(address, model='tiny', prompt='cat', max_tokens=9, temperature=0.7, seed=5)
    tokens = decoding.generate(
        model, [list(b'cat')], 9, temperature=0.7, rng=5, eos_id=ByteTokenizer.eos_id
    )[0]
    made = list(tokens).index(0) if 0 in tokens else 9
    (choice,) = said['choices']
    assert choice['text'] == ByteTokenizer().decode(tokens[:made])
    assert choice['index'] == 0 and choice['logprobs'] is None
    assert choice['finish_reason'] == ('length' if made == 9 else 'stop')
    assert said['object'] == 'text_completion' and said['model'] == 'tiny'
    assert said['usage']['prompt_tokens'] == 3 and said['usage']['total_tokens'] <= 12


def test_a_stream_says_the_same(server):
    address, _ = server
    asked = {'prompt': ['cat', 'do'], 'n': 2, 'max_tokens': 12, 'seed': 3, 'echo': True}
    whole = completed(address, **asked)
    asked |= {'stream': True, 'stream_options': {'include_usage': True}}
    status, said, headers = ask(address, asked)
    assert status == 200 and headers['Content-Type'].startswith('text/event-stream')
    *pieces, last = events(said.decode().splitlines())
    assert last['choices'] == [] and last['usage'] == whole['usage']
    texts = [''] * 4
    for piece in pieces:
        (choice,) = piece['choices']
        texts[choice['index']] += choice['text']
    assert texts == [choice['text'] for choice in whole['choices']]
    assert texts[0].startswith('cat') and texts[3].startswith('do')
    assert texts[0] != texts[1]


def test_a_stream_arrives_while_it_is_made(server):
    address, engine = server
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        body = json.dumps({'prompt': 'x', 'max_tokens': 500, 'stream': True, 'seed': 1})
        connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        response = connection.getresponse()
        assert response.readline().startswith(b'data: {')
        assert engine.n_running == 1
    assert idle(engine)


def test_stop_texts_end_a_choice(server):
    address, _ = server
    asked = {'prompt': 'cat', 'max_tokens': 40, 'temperature': 0, 'echo': False}
    text = completed(address, **asked)['choices'][0]['text']
    stop = text[5:8]
    (choice,) = completed(address, **asked, stop=['never', stop])['choices']
    assert choice['text'] == text[: text.find(stop)] and choice['finish_reason'] == 'stop'


def test_models_health_and_page(server):
    address, _ = server
    status, said, _ = ask(address, path='/v1/models')
    assert status == 200 and [m['id'] for m in json.loads(said)['data']] == ['tiny']
    assert json.loads(ask(address, path='/healthz')[1])['status'] == 'ok'
    status, page, headers = ask(address, path='/')
    assert status == 200 and b'<textarea' in page
    assert b'http://' not in page and b'https://' not in page and b'innerHTML' not in page
    assert "default-src 'none'" in headers['Content-Security-Policy']
    assert 'Access-Control-Allow-Origin' not in headers


JSON = {'Content-Type': 'application/json'}
WRONG = [
    (400, {'body': b'{'}),
    (400, {'body': {'prompt': 'a', 'n': 'many'}}),
    (400, {'body': {'prompt': 'a' * 590, 'max_tokens': 11}}),
    (404, {'body': {'prompt': 'a', 'model': 'gpt'}}),
    (404, {'path': '/v1/chat/completions', 'body': {}}),
    (404, {'path': '/../etc/passwd'}),
    (405, {'method': 'GET'}),
    (405, {'method': 'OPTIONS'}),
    (403, {'body': {'prompt': 'a'}, 'headers': {**JSON, 'Host': 'elsewhere.example'}}),
    (415, {'body': {'prompt': 'a'}, 'headers': {'Content-Type': 'text/plain'}}),
    (413, {'body': b' ' * 4001}),
    (413, {'body': b' ' * 400_000}),
]


@pytest.mark.parametrize(('status', 'wrong'), WRONG)
def test_what_is_wrong_is_said_in_json(server, status, wrong):
    address, engine = server
    got, said, headers = ask(address, **wrong)
    assert got == status and headers['Content-Type'] == 'application/json'
    error = json.loads(said)['error']
    assert error['message'] and error['code'] and error['type'] == 'invalid_request_error'
    assert engine.n_running == 0


def test_a_body_without_a_length_is_counted_as_it_comes(server):
    address, _ = server
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        pieces = (b' ' * 1000 for _ in range(50))
        connection.request('POST', '/v1/completions', pieces, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413


@pytest.mark.parametrize('stream', [True, False])
def test_who_hangs_up_frees_the_place(server, stream, forced):
    address, engine = server
    asked = json.dumps({'prompt': 'x', 'max_tokens': 590, 'seed': 1, 'stream': stream}).encode()
    head = f'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(asked)}\r\n'
    head += 'Content-Type: application/json\r\n\r\n'
    n_made = []
    forced.slow(lambda: n_made.append(1))
    with socket.create_connection(address) as client:
        client.sendall(head.encode() + asked)
        while len(n_made) < 3:
            time.sleep(0.01)
        assert engine.n_running == 1
    left = len(n_made)
    assert idle(engine) and len(n_made) < left + 25


def test_who_hangs_up_in_the_queue_leaves_it(server, forced):
    address, engine = server
    asked = json.dumps({'prompt': 'x', 'max_tokens': 590, 'seed': 1}).encode()
    head = f'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(asked)}\r\n'
    head += 'Content-Type: application/json\r\n\r\n'
    go_on = threading.Event()
    forced.slow(until=go_on.is_set)

    def until(said):
        end = time.monotonic() + 10
        while not said() and time.monotonic() < end:
            time.sleep(0.01)
        assert said()

    try:
        with contextlib.ExitStack() as clients:
            for _ in range(LIMITS.max_concurrent):
                clients.enter_context(socket.create_connection(address)).sendall(
                    head.encode() + asked
                )
            until(lambda: engine.n_running == LIMITS.max_concurrent)
            with socket.create_connection(address) as client:
                client.sendall(head.encode() + asked)
                until(lambda: engine.n_waiting == 1)
            until(lambda: engine.n_waiting == 0)
            assert engine.n_running == LIMITS.max_concurrent
    finally:
        go_on.set()
    assert idle(engine)


def test_others_are_answered_while_a_prompt_is_made_tokens_of(model):
    going, go_on = threading.Event(), threading.Event()

    class Slow(ByteTokenizer):
        def encode(self, text):
            if text == 'slow':
                going.set()
                go_on.wait(20)
            return super().encode(text)

    application = serving.app(model, Slow(), 'tiny', LIMITS)
    with served(application) as address, ThreadPoolExecutor(1) as clients:
        slow = clients.submit(ask, address, {'prompt': 'slow', 'max_tokens': 1})
        assert going.wait(20)
        assert ask(address, path='/healthz')[0] == 200 and not slow.done()
        go_on.set()
        assert slow.result()[0] == 200


def test_how_tokens_are_drawn_compiles_nothing(server):
    address, engine = server
    sizes, programs = [], engine.model.programs
    for how in ({}, {'top_k': 3}, {'top_p': 0.5, 'temperature': 0.3}, {'repetition_penalty': 2}):
        completed(address, prompt='cat', max_tokens=2, **how)
        made = programs.read, programs.first, programs.step
        sizes.append(tuple(program._cache_size() for program in made))
    assert len(set(sizes)) == 1


def test_an_encoder_decoder_is_refused():
    net = models.Reformer(16, 8, 8, 1, 1, 1, max_len=8)
    with pytest.raises(UsageError, match='serve takes a language model: this one has 2 inputs'):
        serving.app(lc.Model(net, {}, {}), ByteTokenizer(), 'tiny')


def test_two_hundred_at_once_are_answered_or_sent_away(server):
    address, engine = server

    def one(i):
        status, said, headers = ask(address, {'prompt': f'{i}', 'max_tokens': 4, 'seed': i})
        if status == 429:
            assert (
                headers['Retry-After'] and json.loads(said)['error']['type'] == 'rate_limit_error'
            )
        return status

    with ThreadPoolExecutor(200) as clients:
        statuses = list(clients.map(one, range(200)))
    assert set(statuses) <= {200, 429} and statuses.count(200) >= LIMITS.max_concurrent
    assert idle(engine)
    assert completed(address, prompt='still', max_tokens=2)


def test_a_failure_of_the_model_is_not_told_in_detail(server, caplog, forced):
    address, engine = server
    forced.failing(RuntimeError('a secret'))
    with caplog.at_level(logging.CRITICAL, 'layercomb'):
        status, said, _ = ask(address, {'prompt': 'a'})
        _, streamed, _ = ask(address, {'prompt': 'a', 'stream': True})
    assert status == 500 and json.loads(said)['error']['type'] == 'server_error'
    assert b'secret' not in said and b'secret' not in streamed
    assert 'error' in events(streamed.decode().splitlines())[0]
    assert idle(engine)


def test_the_server_stops_while_a_text_is_made(model):
    application = serving.app(model, ByteTokenizer(), 'tiny', LIMITS)
    client = None
    with served(application) as address:
        client = http.client.HTTPConnection(*address, timeout=60)
        body = json.dumps({'prompt': 'x', 'max_tokens': 590, 'stream': True})
        client.request('POST', '/v1/completions', body, JSON)
        client.getresponse().readline()
    client.close()
    assert application.state.engine.n_running == 0


def test_an_address_that_cannot_be_had():
    with serving.bound('127.0.0.1', 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = (
            rf'cannot listen on 127.0.0.1:{port} \(Address already in use\): choose another --port'
        )
        with pytest.raises(UsageError, match=said), serving.bound('127.0.0.1', port):
            pass
    for host, port, said in [
        ('127.0.0.1', 70_000, 'port 70000 cannot be: choose --port from 0'),
        ('a..b', 80, r"'a..b' is no address .*: choose another --host"),
        ('192.0.2.1', 0, r'cannot listen on 192.0.2.1:0 .*: choose another --host'),
    ]:
        with pytest.raises(UsageError, match=said), serving.bound(host, port):
            pass


def by_hand(model):
    """An engine that reads the whole text anew for each token."""

    def logprobs(tokens):
        logits, _ = model.layer.apply(
            model.weights, model.state, (np.asarray([tokens], np.int32),), mode=lc.Mode.EVAL
        )
        return np.asarray(jax.nn.log_softmax(logits[0][0, -1].astype(jnp.float32)))

    return Engine(None, logprobs)


SCORED = [
    {'prompt': 'cat', 'max_tokens': 4, 'logprobs': 3},
    {'prompt': ['cat', [99, 97, 195, 169]], 'max_tokens': 0, 'logprobs': 2, 'echo': True},
    {'prompt': 'ca', 'max_tokens': 3, 'logprobs': 1, 'echo': True},
]


@pytest.mark.parametrize('asked', SCORED, ids=str)
def test_scores_are_those_of_the_model_by_hand(server, model, asked):
    address, _ = server
    said = completed(address, temperature=0, **asked)
    request = parse(json.dumps(asked).encode(), ByteTokenizer(), 'tiny', 256, LIMITS)
    wanted = test_answers.whole(by_hand(model), request)
    for made, slow in zip(said['choices'], wanted['choices'], strict=True):
        assert made['text'] == slow['text'] and made['finish_reason'] == slow['finish_reason']
        made, slow = made['logprobs'], slow['logprobs']
        assert made['tokens'] == slow['tokens'] and made['text_offset'] == slow['text_offset']
        for name in ('token_logprobs', 'top_logprobs'):
            assert (made[name][0] is None) == (slow[name][0] is None)
        start = 1 if asked.get('echo') else 0
        near = pytest.approx(slow['token_logprobs'][start:], abs=1e-4)
        assert made['token_logprobs'][start:] == near
        for ours, theirs in zip(made['top_logprobs'], slow['top_logprobs'], strict=True):
            assert ours == (theirs and pytest.approx(theirs, abs=1e-4))


def test_the_best_of_several_and_what_is_favoured(server):
    address, _ = server
    asked = {'prompt': 'cat', 'max_tokens': 4, 'seed': 5, 'logprobs': 0}
    several = completed(address, **asked, n=4)['choices']
    (best,) = completed(address, **asked, best_of=4)['choices']
    means = [np.mean(choice['logprobs']['token_logprobs']) for choice in several]
    assert best['text'] == several[int(np.argmax(means))]['text']
    (biased,) = completed(address, **asked, logit_bias={'120': 100})['choices']
    assert biased['text'] == 'xxxx'
    (varied,) = completed(
        address, **asked, logit_bias={'120': 3, '121': 3}, presence_penalty=2, frequency_penalty=2,
        temperature=0,
    )['choices']  # fmt: skip
    assert set('xy') <= set(varied['text'])


def test_each_token_that_is_made_has_a_score_the_one_that_ends_it_too(server):
    """lm_eval asks for one token more than it wants, and drops the last score."""
    address, _ = server
    asked = {'prompt': 'cat', 'max_tokens': 3, 'echo': True, 'logprobs': 1}
    (choice,) = completed(address, **asked, logit_bias={'0': 100})['choices']
    assert choice['text'] == 'cat' and choice['finish_reason'] == 'stop'
    assert choice['logprobs']['tokens'] == ['c', 'a', 't', 'token_id:0']
    assert choice['logprobs']['text_offset'] == [0, 1, 2, 3]
