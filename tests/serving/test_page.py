"""The page in a browser, as a person uses it: types a prompt, watches the answer, stops it."""

import pytest
from browser import CHROMIUM, Page
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
        page.js("document.getElementById('max_tokens').value = 30")
        page.press('Enter', modifiers=2)
        page.until(f'/^\\d+ tokens?, [\\d.]+ tokens.s$/.test({TEXT.format("status")})')
        assert page.js(TEXT.format('answer')).startswith('<b>a</b> ')
        assert page.js("document.querySelectorAll('#answer b').length") == 0
        assert page.js(TEXT.format('error')) == ''


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
