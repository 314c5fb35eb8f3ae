"""The embedded questions about the library: every name in them exists, and the key is not told."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import json
import re
from importlib import resources

import pytest

import layercomb as lc
from layercomb import cli, data, tl
from layercomb.data.corpora.about import facts
from layercomb.launcher import sources
from layercomb.serving import access, routes
from layercomb.supervised import reports
from layercomb_kernels import build

PLACES = {
    'lc': lc,
    'tl': tl,
    **{
        name: importlib.import_module(f'layercomb.{name}')
        for name in ('data', 'interop', 'models', 'optimizers', 'supervised', 'transforms')
    },
}
FACTS = facts()


@functools.cache
def help_of(command):
    """What `layercomb COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main([command, '--help'])
    return printed.getvalue()


def exists(name):
    """Whether what a fact is about is there."""
    kind, _, rest = name.partition(':')
    if not rest:
        first, *parts = name.split('.')
        return functools.reduce(getattr, parts, PLACES[first]) is not None
    command, _, option = rest.partition(' ')
    checks = {
        'gin': lambda: resources.files('layercomb.gin_configs').joinpath(f'{rest}.gin').is_file(),
        'cli': lambda: f'layercomb {rest} ' in help_of(rest),
        'opt': lambda: option in help_of(command),
        'env': lambda: rest in (access.VARIABLE, build.SWITCH),
        'mode': lambda: rest in tl.Mode.__members__,
        'fact': lambda: hasattr(tl.Dense, rest),
        'file': lambda: repr(rest) in inspect.getsource(reports),
        'path': lambda: repr(rest) in inspect.getsource(routes),
        'pip': lambda: sources.PACKAGES['smollm2'].install.endswith(rest),
    }
    return checks[kind]()


@pytest.mark.parametrize('fact', FACTS, ids=lambda fact: fact['name'])
def test_what_a_fact_names_exists(fact):
    assert exists(fact['name'])
    for first, rest in re.findall(r'\b(tl|lc|models|transforms|data)\.(\w+)', fact['answer']):
        assert hasattr(PLACES[first], rest)
    if fact['key'].endswith('='):
        first, *parts = fact['name'].split('.')
        made = functools.reduce(getattr, parts, PLACES[first])
        assert fact['key'][:-1] in inspect.signature(made).parameters


def test_the_answer_has_the_key_and_no_question_tells_it():
    questions = [question for fact in FACTS for question in fact['questions']]
    assert len(FACTS) >= 100
    assert len(set(questions)) == len(questions) == 4 * len(FACTS)
    for fact in FACTS:
        assert fact['key'] in fact['answer']
        assert not any(fact['key'].lower() in question.lower() for question in fact['questions'])


def test_splits_are_parts():
    whole = data.about_layercomb()
    parts = [data.about_layercomb(split) for split in ('train', 'valid')]
    assert [len(rows) for rows in parts] == [3 * len(FACTS), len(FACTS)]
    assert sorted(map(json.dumps, [*parts[0], *parts[1]])) == sorted(map(json.dumps, whole))
    with pytest.raises(ValueError, match="choose 'train' or 'valid', or None for both"):
        data.about_layercomb('test')
