"""The page in a browser, as a person uses it: types, watches the answer, stops it, talks."""

import contextlib
import time

import pytest
from browser import CHROMIUM, Page
from scripted import Engine
from test_conversations import Talking
from test_conversations import served as scripted
from test_serving import LIMITS, model, served  # noqa: F401

from layercomb import serving
from layercomb.data import ByteTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed that runs'),
]
TEXT = "document.getElementById('{}').textContent"


@pytest.fixture(scope='module')
def address(model):  # noqa: F811
    with served(serving.app(model, ByteTokenizer(), 'tiny', LIMITS)) as (host, port):
        yield f'http://{host}:{port}/'


def test_a_prompt_is_continued(address):
    with Page(address) as page:
        page.until(f'{TEXT.format("model")} === "tiny"')
        page.type('<b>a</b> ')  # the prompt has the focus
        page.js("document.getElementById('seed').value = 1")  # others may end after one token
        page.js("document.getElementById('max_tokens').value = 30")
        page.press('Enter', modifiers=2)
        page.until(f'/^\\d+ tokens?, [\\d.]+ tokens.s$/.test({TEXT.format("status")})')
        assert page.js(TEXT.format('answer')).startswith('<b>a</b> ')
        assert page.js("document.querySelectorAll('#answer b').length") == 0
        assert page.js(TEXT.format('error')) == ''


def test_tokens_that_arrive_at_once_have_no_rate(address):
    with Page(address) as page:
        page.until(f'{TEXT.format("model")} === "tiny"')
        assert page.js('speed(0, 0, 0)') == '0 tokens'
        assert page.js('speed(1, 5, 5)') == '1 token'
        assert page.js('speed(30, 5, 5)') == '30 tokens'
        assert page.js('speed(31, 5, 1005)') == '31 tokens, 30.0 tokens/s'


def test_an_answer_is_stopped_with_a_key(address):
    with Page(address) as page:
        page.type('x')
        page.js("document.getElementById('max_tokens').value = 590")
        page.js("document.getElementById('seed').value = 1")
        page.js("document.getElementById('go').click()")
        page.until(f'{TEXT.format("answer")}.length > 3')
        page.press('Escape')
        page.until(f'{TEXT.format("status")}.endsWith(", stopped")')
        assert not page.js("document.getElementById('go').disabled")


def test_errors_are_shown_and_the_page_is_narrow_enough(address):
    with Page(address, width=320) as page:
        page.type('x' * 599)
        page.js("document.getElementById('go').click()")
        page.until(f'{TEXT.format("error")}.includes("the model reaches 600")')
        assert page.js('document.documentElement.scrollWidth') <= 320
        labels = "[...document.querySelectorAll('textarea, input')].every(x => x.labels.length)"
        assert page.js(labels)


# Conversations

SAID = "[...document.querySelectorAll('#turns li')].map(x => x.className + ' ' + x.innerText)"
DONE = f'/^\\d+ tokens?(, [\\d.]+ tokens.s)?$/.test({TEXT.format("status")})'


@pytest.fixture
def talks():
    engine = Engine([b'<b>yes</b>\3'], tokenizer=Talking(), max_len=600)
    with scripted(engine, Talking()) as (host, port):
        yield f'http://{host}:{port}/', engine


def asked(engine):
    return bytes(engine.asked[-1].prompts[0]).decode()


def test_a_conversation(talks):
    address, engine = talks
    with Page(address) as page:
        page.until(f'{TEXT.format("model")} === "tiny"')
        page.js("document.getElementById('system').value = 'Be'")
        page.type('<i>hi</i>')  # the message has the focus
        page.press('Enter')
        page.until(DONE)
        turns = page.js(SAID)
        assert turns == ['user You\n<i>hi</i>', 'assistant Model\n<b>yes</b>']
        assert page.js("document.querySelectorAll('#turns i, #turns span b').length") == 0
        assert page.js("document.activeElement.id + document.getElementById('prompt').value") == (
            'prompt'
        )
        assert asked(engine) == 's:Be\nu:<i>hi</i>\na:'
        request = engine.asked[-1]
        assert request.sampling.temperature == 0.25 and request.max_tokens == 50
        page.js("document.getElementById('temperature').value = 0.5")
        page.type('more')
        page.js("document.getElementById('go').click()")
        page.until(f'{SAID}.length === 4 && {DONE}')
        assert asked(engine) == 's:Be\nu:<i>hi</i>\na:<b>yes</b>\nu:more\na:'
        assert engine.asked[-1].sampling.temperature == 0.5
        page.js("document.getElementById('reset').click()")
        page.type('new')
        page.press('Enter')
        page.until(f'{SAID}.length === 2 && {DONE}')
        assert asked(engine) == 's:Be\nu:new\na:'
        assert page.js(TEXT.format('error')) == ''


def test_a_turn_is_stopped_and_stays(talks):
    address, engine = talks
    slow, makes = [], engine._pieces

    def pieces(running):
        for piece in makes(running):
            slow.append(time.sleep(0.2))
            yield piece

    engine._pieces = pieces
    with Page(address) as page:
        page.type('hi')
        page.press('Enter')
        page.until("document.querySelector('#turns li.assistant span')?.textContent.length > 1")
        page.press('Escape')
        page.until(f'{TEXT.format("status")}.endsWith(", stopped")')
        assert page.js(SAID)[1].startswith('assistant Model\n<b')
        engine._pieces = makes
        page.type('more')
        page.press('Enter')
        page.until(f'{SAID}.length === 4 && {DONE}')
        assert asked(engine).startswith('u:hi\na:<b') and asked(engine).endswith('\nu:more\na:')


def test_a_turn_that_is_refused_can_be_sent_again(talks):
    address, _ = talks
    with Page(address, width=320) as page:
        page.type('x' * 70)
        page.press('Enter')
        page.until(f'{TEXT.format("error")}.includes("are allowed here")')
        assert page.js(SAID) == []
        assert page.js("document.getElementById('prompt').value") == 'x' * 70
        assert page.js('document.documentElement.scrollWidth') <= 320
        labels = "[...document.querySelectorAll('textarea, input')].every(x => x.labels.length)"
        assert page.js(labels)


def test_the_page_asks_for_the_key_and_keeps_it_in_memory():
    with contextlib.ExitStack() as stack:
        host, port = stack.enter_context(scripted(Engine([b'ok\3']), Talking(), 'k-1'))
        page = stack.enter_context(Page(f'http://{host}:{port}/'))
        shown = "!document.getElementById('key_form').hidden"
        page.until(f'{shown} && document.activeElement.id === "key"')
        page.type('wrong')
        page.press('Enter')
        page.until(f'{shown} && {TEXT.format("error")}.includes("the API key is wrong")')
        page.until('document.activeElement.id === "key"')
        page.type('k-1')
        page.press('Enter')
        page.until(f'{TEXT.format("model")} === "tiny" && !({shown})')
        assert page.js(TEXT.format('error')) == ''
        page.until('document.activeElement.id === "prompt"')
        page.type('hi')
        page.press('Enter')
        page.until(f'{SAID}.length === 2 && {DONE}')
        kept = 'localStorage.length + sessionStorage.length + document.cookie.length'
        assert page.js(kept) == 0 and page.js("document.getElementById('key').value") == ''
