"""Chat templates: transformers' dialect, and what strangers' templates may not do."""

from __future__ import annotations

import pickle
import time

import pytest

from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate, template_in

HELLO = [{'role': 'user', 'content': 'Hi'}]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(source, messages=HELLO, tokens=(), **more):
    return ChatTemplate(source, tokens).render(messages, **more)


def test_a_conversation():
    told = [*HELLO, {'role': 'assistant', 'content': 'Hello {{ x }}'}]
    start = '<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    assert render(CHATML) == start + '<|im_start|>assistant\n'
    assert render(CHATML, told, add_generation_prompt=False) == (
        start + '<|im_start|>assistant\nHello {{ x }}<|im_end|>\n'
    )


# What transformers makes of the same, recorded from transformers 5 (`apply_chat_template`).
@pytest.mark.parametrize(
    'source, text',
    [
        ('{{ bos_token }}|{{ eos_token }}', '<s>|</s>'),
        ('{% if true %}\n  a\n{% endif %}\nb', '  a\nb'),
        ('  {% if true %}\na{% endif %}', 'a'),
        ('{{ "é<&>"|tojson }}{{ {"b": 1, "a": [2]}|tojson(indent=1) }}',
         '"é<&>"{\n "b": 1,\n "a": [\n  2\n ]\n}'),
        ('{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}'
         '{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}', '013'),
        ('{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}'
         '{% endfor %}{{ ns.n }}', '1'),
        ('{% macro f(x, y="!") %}{{ x|trim ~ y }}{% endmacro %}{{ f(" a ") }}{{ f("b", y=1) }}',
         'a!b1'),
        ('{% generation %}{{ messages[0].content }}{% endgeneration %}', 'Hi'),
        ('{{ messages[0]["content"].split("i")[0] ~ "x".upper() }}', 'HX'),
        ('{% for a, b in {"k": [1, 2]}.items() %}{{ a }}{{ b[::-1] }}{% endfor %}', 'k[2, 1]'),
        ('{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}',
         '1/1True'),
        ('{% if tools is none and documents is not defined or true %}{{ none }}{% endif %}',
         'None'),
        ('{{ missing }}{{ "%s-%s" | format(1, 2) }}{{ "{}".format(3) }}{{ "%d" % 4 }}', '1-234'),
        ('{{ [1, 2]|map("string")|join(", ") }}{{ "a" * 3 }}{{ 2 ** 3 }}{{ 7 // 2 }}',
         '1, 2aaa83'),
        ('{{ messages|selectattr("role", "equalto", "user")|list|length }}', '1'),
        ('{% for m in messages recursive %}{{ m.role }}{% endfor %}', 'user'),
        ('{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ "a b"|replace(" ", "_") }}', 'a1a_b'),
    ],
)  # fmt: skip
def test_the_dialect(source, text):
    assert render(source, tokens={'bos_token': '<s>', 'eos_token': '</s>'}) == text


def test_the_date():
    assert render('{{ strftime_now("%Y") }}') == time.strftime('%Y')


def test_further_variables():
    assert render('{{ enable_thinking }}', enable_thinking=False) == 'False'


def test_a_template_that_raises():
    with pytest.raises(UsageError, match=r'refuses these messages: no system prompts$'):
        render('{{ raise_exception("no system prompts\nat all") }}')


DOUBLING = '{% set ns = namespace(x=%s) %}{% for i in range(60) %}{% set ns.x = '
HOSTILE = {
    'endless': '{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}',
    'range': '{% for a in range(999999999) %}{% endfor %}',
    'recursion': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'tree': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}'
            '{{ f(60) }}',
    'times': '{{ "a" * 999999999999 }}',
    'list times': '{{ [1] * 999999999 }}',
    'center': '{{ "a".center(9999999999) }}',
    'center filter': '{{ "a"|center(9999999999) }}',
    'ljust': '{{ "a".ljust(9999999999) }}',
    'zfill': '{{ "1".zfill(9999999999) }}',
    'plus': DOUBLING.replace('%s', '"ab"') + 'ns.x + ns.x %}{% endfor %}',
    'tilde': DOUBLING.replace('%s', '"ab"') + 'ns.x ~ ns.x %}{% endfor %}',
    'lists': DOUBLING.replace('%s', '1') + '[ns.x, ns.x] %}{% endfor %}{{ ns.x }}',
    'dicts': DOUBLING.replace('%s', '1') + '{"a": ns.x, "b": ns.x} %}{% endfor %}',
    'tuples': DOUBLING.replace('%s', '1') + '(ns.x, ns.x) %}{% endfor %}{{ ns.x|tojson }}',
    'calls': DOUBLING.replace('%s', '1') + 'dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|string }}',
    'replace': '{% set s = "a" * 99999 %}{{ s|replace("", s) }}',
    'replace method': '{% set s = "a" * 99999 %}{{ s.replace("a", s) }}',
    'join': '{% set s = "a" * 99999 %}{{ range(99999)|join(s) }}',
    'join method': '{% set s = "a" * 99999 %}{{ s.join(s) }}',
    'map': '{% set s = "a" * 99999 %}{{ range(99999)|map(attribute="x", default=s)|join }}',
    'format': '{{ "%0999999999d"|format(1) }}',
    'format star': '{{ "%*d" % (999999999, 1) }}',
    'format method': '{{ "{:999999999}".format(1) }}',
    'nested format': '{{ "{:{}}".format(1, 999999999) }}',
    'indent': '{{ "a"|indent(999999999, true) }}',
    'tojson': '{{ [1]|tojson(indent=999999999) }}',
    'power': '{{ 9 ** 999999999 }}',
    'float power': '{{ 2.5 ** 9999999 }}',
    'squares': DOUBLING.replace('%s', '9') + 'ns.x * ns.x %}{% endfor %}',
    'output': '{% for a in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}',
    'block': '{% set x %}{% for a in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}'
             '{% endset %}',
    'static': '{% set x %}{% for a in range(99999) %}' + 'a' * 99999 + '{% endfor %}{% endset %}',
    'attribute': '{{ messages.__class__.__mro__ }}{{ "".__class__.__subclasses__() }}',
    'globals': '{{ raise_exception.__globals__["os"].system("true") }}',
    'mutation': '{{ messages.append(1) }}{{ messages[0].update(a=1) }}',
    'include': '{% include "/etc/passwd" %}',
    'import': '{% from "/etc/passwd" import x %}',
    'lipsum': '{{ lipsum(99999) }}',
    'undefined': '{{ missing.x }}',
    'a wrong filter': '{{ 1|nothing }}',
    'division': '{{ 1 / 0 }}',
    'syntax': '{% for %}',
    'deep': '{{ ' + '(' * 9999 + '1' + ')' * 9999 + ' }}',
    'long': 'a' * 2000000,
    'nested lists': '{% set ns = namespace(x=1) %}{% for i in range(9999) %}'
                    '{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}',
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_template(name):
    began = time.monotonic()
    with pytest.raises(UsageError, match=r'^the chat template ') as e:
        render(HOSTILE[name])
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    assert time.monotonic() - began < 20


def test_a_long_conversation_is_within_the_budget():
    told = [{'role': r, 'content': 'word ' * 2000} for r in ('user', 'assistant') * 100]
    assert len(render(CHATML, told)) > 2_000_000


@pytest.mark.parametrize(
    'messages, error',
    [
        ([], 'there are no messages'),
        ('Hello', 'messages must be a list, got str'),
        ({'role': 'user'}, 'messages must be a list, got dict'),
        (['Hello'], "message 0 is 'Hello' and no object"),
        ([{'content': 'a'}], 'message 0 has the role None'),
        ([*HELLO, {'role': 'user'}], 'the content of message 1 is None'),
        ([{'role': 'user', 'content': 3}], 'the content of message 0 is 3'),
    ],
)
def test_wrong_messages(messages, error):
    with pytest.raises(UsageError, match=error):
        render(CHATML, messages)


def test_templates_are_values():
    one = ChatTemplate(CHATML, {'eos_token': 'e', 'bos_token': 'b'})
    assert one == ChatTemplate(CHATML, (('bos_token', 'b'), ('eos_token', 'e')))
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))


def test_named_templates():
    assert (
        template_in([{'name': 'a', 'template': 'A'}, {'name': 'default', 'template': 'B'}]) == 'B'
    )
    assert template_in('C') == 'C' and template_in(None) is None
    with pytest.raises(UsageError, match=r"\(a, b\) none is named 'default'"):
        template_in([{'name': 'a', 'template': 'A'}, {'name': 'b', 'template': 'B'}])
    with pytest.raises(UsageError, match='none is named'):
        template_in({'x': 1})
