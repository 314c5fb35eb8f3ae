"""The examples in docstrings and in README run, in a user's settings."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import jax
import pytest

import layercomb

ROOT = Path(layercomb.__file__).parent
README = ROOT.parent / 'README.md'
MODULES = [
    '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts).removesuffix('.__init__')
    for path in sorted(ROOT.rglob('*.py'))
    if '>>>' in path.read_text()
]
PAGES = [README, *sorted(README.parent.glob('docs/*.md'))]


@pytest.fixture(autouse=True)
def _as_users_have_it():
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update('jax_numpy_dtype_promotion', 'standard')
    yield
    jax.config.update('jax_numpy_dtype_promotion', strict)


@pytest.mark.parametrize('name', MODULES)
def test_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.skipif(not README.exists(), reason='an installed package has no README')
@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_pages(page, tmp_path, monkeypatch, capsys):
    """Blocks of Python run in order, as one session, and print what stands beneath them."""
    monkeypatch.chdir(tmp_path)
    fence = r'^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?'
    session: dict[str, object] = {'__name__': 'page'}
    for code, printed in re.findall(fence, page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, page.name, 'exec'), session)
        assert capsys.readouterr().out == printed


@pytest.mark.skipif(not README.exists(), reason='an installed package has no README')
@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\((?!http)([^)#]+)', page.read_text()):
        assert (page.parent / target).exists(), target
