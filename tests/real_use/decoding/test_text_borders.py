"""Text at borders: between prompt and answer, between tokens, and where a text must end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import re
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
from layercomb.launcher import terminal
from layercomb.serving.openai.completions import parse
from layercomb.serving.protocol import Refusal, Request
from layercomb.serving.texts import Text


class Pieces:
    """As SentencePiece has it: a piece holds the space before it, and the first one is dropped."""

    vocab_size, eos_id = 8, 0
    pieces = ('', '▁the', '▁cat', 's', '▁', '▁sat', 'END', '▁E')

    def encode(self, text):
        return [self.pieces.index('▁' + word) for word in text.split()]

    def decode(self, ids):
        return ''.join(self.pieces[i] for i in ids).replace('▁', ' ').removeprefix(' ')


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(256, 8, 8, 1, 1, max_len=64)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


@pytest.fixture(scope='module')
def engine(model):
    return serving.app(model, ByteTokenizer(), 'tiny').state.engine


def answered(engine, request):
    """The pieces of each choice, and why it ended."""

    async def ask():
        try:
            running = await engine.start(request)
            return [piece async for piece in running.pieces()], running.n_made
        finally:
            while engine.n_running:
                await asyncio.sleep(0.001)

    pieces, n_made = asyncio.run(ask())
    texts = [[p.text for p in pieces if p.index == i] for i in range(len(request.rows))]
    reasons = [p.finish_reason for p in pieces if p.finish_reason]
    return texts, reasons, n_made


def first_stop(text, stop):
    """Where a text ends before the stop text that is complete first, if there is one."""
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    if not ends:
        return len(text)
    return min(ends[0] - len(s) for s in stop if text[: ends[0]].endswith(s))


# Prompt and answer are one stream


def test_an_answer_that_begins_in_the_middle_of_a_character(engine, forced):
    prompt, answer = list('né'.encode()[:-1]), ['é'.encode()[-1], *b'e!']
    for echo, wanted in [(True, 'née!'), (False, 'ée!')]:
        forced.making(answer)
        ((text,), reasons, n_made) = answered(engine, Request((tuple(prompt),), 3, echo=echo))
        assert ''.join(text) == wanted and '\ufffd' not in wanted
        assert reasons == ['length'] and n_made == 3


@given(
    st.lists(st.sampled_from(list('aé€😀'.encode())), min_size=1, max_size=12),
    st.lists(st.sampled_from(list('aé€😀'.encode())), min_size=1, max_size=12),
    st.lists(st.text('aé€', min_size=1, max_size=3), max_size=4),
)
def test_pieces_join_to_the_whole_text(prompt, answer, stop):
    """Beside it: all bytes at once, less those of the prompt that are whole, up to the stop."""
    text = Text(ByteTokenizer(), stop, len(answer), prompt)
    pieces = [text.add(i) for i in answer]
    whole = bytes(prompt + answer).decode(errors='replace')
    assert whole.startswith(text.prompt)
    rest = whole[len(text.prompt) :]
    assert ''.join(pieces) == rest[: first_stop(rest, stop)]
    assert text.finish_reason == ('stop' if any(s in rest for s in stop) else 'length')


@given(
    st.lists(st.integers(1, 7), max_size=9),
    st.lists(st.integers(1, 7), min_size=1, max_size=40),
    st.lists(st.sampled_from(['the', ' E', 'END', 's s', 'cats']), max_size=3),
)
def test_pieces_of_words_join_to_the_whole_text(prompt, answer, stop):
    tokenizer = Pieces()
    text = Text(tokenizer, stop, len(answer), prompt)
    pieces = [text.add(i) for i in answer]
    rest = tokenizer.decode(prompt + answer)[len(tokenizer.decode(prompt)) :]
    assert text.prompt == tokenizer.decode(prompt)
    assert ''.join(pieces) == rest[: first_stop(rest, stop)]


def test_the_space_between_prompt_and_answer_is_shown(forced):
    net = models.TransformerLM(8, 8, 8, 1, 1, max_len=32)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    engine = serving.app(model, Pieces(), 'words').state.engine
    for echo, wanted in [(True, 'the cat sats'), (False, ' cat sats')]:
        forced.making([2, 5, 3])
        ((text,), *_) = answered(engine, Request(((1,),), 3, echo=echo))
        assert ''.join(text) == wanted


@pytest.mark.parametrize('show', ['stream', 'beams'])
def test_the_launcher_shows_prompt_and_answer_as_one_text(show, capsys):
    tokens = np.array([2, 3, 0, 5])
    if show == 'stream':
        terminal.write_stream([1], iter(tokens[:, None]), Pieces())
    else:
        terminal.write_text([1], tokens, Pieces())
    shown = capsys.readouterr().out
    assert shown == ('the cats sat\n' if show == 'stream' else 'the cats\n')


def test_the_launcher_ends_a_text_in_the_middle_of_a_character(capsys):
    prompt, tokens = list(b'n'), np.array(list('é€'.encode()[:-1]))
    terminal.write_stream(prompt, iter(tokens[:, None]), ByteTokenizer())
    terminal.write_text(prompt, tokens, ByteTokenizer())
    assert capsys.readouterr().out == 2 * 'né\ufffd\n'


@pytest.mark.parametrize('option', [['--temperature', '0'], ['--beams', '2']])
def test_generate_goes_on_with_the_space_that_a_piece_holds(option, capsys, monkeypatch):
    net = models.TransformerLM(8, 8, 8, 1, 1, max_len=32)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    monkeypatch.setattr(cli, 'trained', lambda *args, **how: (model, Pieces()))
    asked = ['generate', 'run', '--prompt', 'the cat', '--n_tokens', '8']
    assert cli.main([*asked, *option]) == 0
    said = capsys.readouterr().out
    words = said.removesuffix('\n')
    assert words.startswith('the cat') and '▁' not in words
    assert re.fullmatch(r'the cat(s| |END| the| cat| sat| E)*', words)


class Replaced:
    """Letters, and U+FFFD among them, as a tokenizer has it that was made of damaged text."""

    vocab_size, eos_id = 8, 0
    letters = '_ab\ufffdc'

    def encode(self, text):
        return [self.letters.index(c) for c in text]

    def decode(self, ids):
        return ''.join(self.letters[i] for i in ids)


def test_a_mark_that_a_prompt_has_itself_stays_in_it():
    """As text it ends with a whole character; as tokens it may end within one."""
    body = {'prompt': ['a\ufffd', [1, 3], 'b', [2]], 'n': 2}
    request = parse(json.dumps(body).encode(), Replaced(), 'own', 8, serving.Limits())
    assert request.of_text == (True, False, True, False)
    assert request.rows_of_text == [True, True, False, False] * 2
    for whole, prompt, answer in [(True, 'a\ufffd', 'c'), (False, 'a', '\ufffdc')]:
        text = Text(Replaced(), [], 1, [1, 3], whole)
        assert (text.prompt, text.add(4)) == (prompt, answer)
    assert Text(Replaced(), ['\ufffd'], 1, [1, 3], True).add(4) == 'c'


def test_an_answer_to_a_text_that_ends_with_a_mark(forced):
    net = models.TransformerLM(8, 8, 8, 1, 1, max_len=32)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    engine = serving.app(model, Replaced(), 'own').state.engine
    for echo in (True, False):
        forced.making([4, 3])
        request = Request(((1, 3),), 2, echo=echo, of_text=(True,))
        ((text,), *_) = answered(engine, request)
        assert ''.join(text) == 'a\ufffd' * echo + 'c\ufffd'


def test_a_decoder_of_ones_own_is_not_ended_by_the_prompt():
    """What `final` means to it is that nothing follows."""
    text = Text(ByteTokenizer(), [], 2, 'a\ufffd'.encode(), whole=True)
    assert text.prompt == 'a\ufffd' and text.add(98) == 'b'


# Stop texts


@pytest.mark.parametrize(
    ('answer', 'stop', 'wanted'),
    [
        ('a END b', ['END'], 'a '),
        ('abcd', ['bcd', 'c'], 'ab'),  # complete first
        ('abcd', ['c', 'bc'], 'a'),  # both at once: from the earlier
        ('aab', ['ab'], 'a'),
        ('ababac', ['abac'], 'ab'),
        ('EN', ['END'], 'EN'),
        ('xé', ['é'], 'x'),
        ('x€y', ['€y'], 'x'),
        ('END', ['END'], ''),
    ],
)
@pytest.mark.parametrize('size', [1, 2, 9])
def test_a_stop_text_ends_the_answer_however_it_is_cut(answer, stop, wanted, size):
    """Into tokens of one character, of two, or one of all."""

    class Cut(ByteTokenizer):
        def decode(self, ids):
            return ''.join(answer[i - 1 : i - 1 + size] for i in ids)

    text = Text(Cut(), stop, 99)
    pieces = [text.add(i) for i in range(1, len(answer) + 1, size)] + [text.add(0)]
    assert ''.join(pieces) == wanted and text.finish_reason == 'stop'


def test_a_stop_text_is_not_looked_for_in_the_prompt(engine, forced):
    """Neither within it nor from its last characters on."""
    for echo in (True, False):
        forced.making(list(b'D. END'))
        request = Request((tuple(b'END EN'),), 6, stop=('END',), echo=echo)
        ((text,), reasons, _) = answered(engine, request)
        assert ''.join(text) == 'END EN' * echo + 'D. ' and reasons == ['stop']


def test_a_character_that_the_prompt_began_may_end_the_answer(engine, forced):
    forced.making([0xA9, 97])
    ((text,), reasons, _) = answered(engine, Request(((0xC3,),), 2, stop=('é',)))
    assert ''.join(text) == '' and reasons == ['stop']


# Ends


def test_a_limit_in_the_middle_of_a_character(engine, forced):
    """Streamed and whole: what is unfinished is marked, once."""
    forced.making(list('a€'.encode()[:-1]))
    ((text,), reasons, n_made) = answered(engine, Request(((97,),), 3))
    assert text == ['a', '\ufffd'] and reasons == ['length'] and n_made == 3


def test_the_end_of_a_document_in_the_middle_of_a_character(engine, forced):
    forced.making([0xE2, 0x82, 0, 97])
    ((text,), reasons, n_made) = answered(engine, Request(((97,),), 9))
    assert text == ['\ufffd'] and reasons == ['stop'] and n_made == 3


def test_tokens_are_counted_until_each_choice_ends(engine, forced):
    forced.making([97, 98, 99, 100], [97, 0, 98, 99])
    (texts, reasons, n_made) = answered(engine, Request(((1,), (2, 3)), 4, stop=('d',)))
    assert [''.join(t) for t in texts] == ['abc', 'a']
    assert reasons == ['stop', 'stop'] and n_made == 4 + 2


@pytest.mark.parametrize(
    ('error', 'status', 'said'),
    [
        (UsageError('the logits are NaN at token 2 of row 0'), 500, 'the logits are NaN'),
        (RuntimeError('a secret'), 500, 'its log says why'),
    ],
)
def test_a_model_that_fails_in_the_middle_of_a_text(engine, forced, caplog, error, status, said):
    forced.failing(error, after=2)
    with caplog.at_level(logging.CRITICAL, 'layercomb'), pytest.raises(Refusal) as caught:
        answered(engine, Request(((97,),), 9))
    assert caught.value.status == status and said in str(caught.value)


def test_ids_that_the_model_does_not_know_are_the_clients_fault(engine):
    with pytest.raises(Refusal, match='token id 256 is outside the vocabulary') as caught:
        answered(engine, Request(((97,), (97, 256)), 9, echo=True))
    assert caught.value.status == 400


def test_a_client_is_told_of_a_failure_and_of_the_end(model, forced):
    application = serving.app(model, ByteTokenizer(), 'tiny')
    error = UsageError('the logits are NaN at token 2 of row 0')
    forced.failing(error, after=2)
    server = uvicorn.Server(
        uvicorn.Config(application, log_level='critical', ws='none', timeout_graceful_shutdown=1)
    )
    with serving.bound('127.0.0.1', 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = listener.getsockname()[:2]
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            body = {'prompt': [0xC3], 'stream': True, 'echo': True, 'stop': 'b'}
            body |= {'stream_options': {'include_usage': True}}
            json_type = {'Content-Type': 'application/json'}
            connection.request('POST', '/v1/completions', json.dumps(body), json_type)
            response = connection.getresponse()
            lines = response.read().decode().split('\n\n')
        server.should_exit = True
        thread.join()
    assert response.status == 200 and lines[-2:] == ['data: [DONE]', '']
    *pieces, failure = [json.loads(line.removeprefix('data: ')) for line in lines[:-2]]
    assert ''.join(p['choices'][0]['text'] for p in pieces) == '\ufffda' + 'a'
    assert failure['error']['type'] == 'server_error' and 'NaN' in failure['error']['message']
