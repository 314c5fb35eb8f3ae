"""Pairs of code and docstrings."""

from __future__ import annotations

import ast

import pytest

from layercomb import data
from layercomb.data.corpora.docstrings import _functions, _modules, _pairs
from layercomb.errors import UsageError

MODULE = '''\
#!/usr/bin/env python
"""A module
    of two lines."""  # a remark

X = 'né'; Y = 1

class Point:
    """A point."""

    @property
    def x(self):
        """Its first place: né."""
        return 'é'

    async def y(self): """In one line."""; return 2

    def none(self):
        return 'none'

def f():
    \'\'\'Does nothing.

        But so it is said.
    \'\'\'
    def g():
        """Inside."""
'''


def found(text, nodes):
    return list(_pairs(text.encode(), nodes))


def test_functions_and_methods():
    assert found(MODULE, _functions) == [
        ("    def x(self):\n        return 'é'".encode(), 'Its first place: né.'.encode()),
        (b'    async def y(self): ; return 2', b'In one line.'),
        (
            b'def f():\n    def g():\n        """Inside."""',
            b'Does nothing.\n\nBut so it is said.',
        ),
    ]


def test_a_module():
    ((source, docstring),) = found(MODULE, _modules)
    assert docstring == b'A module\nof two lines.'
    rest = MODULE.replace('"""A module\n    of two lines."""', '')
    assert source == rest.encode()


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_ends_of_lines_and_marks_of_byte_order(end):
    text = '\ufeff' + end.join(['"""Né."""  ', 'x = 1', ''])
    assert found(text, _modules) == [(f'x = 1{end}'.encode(), 'Né.'.encode())]
    text = end.join(['def f():', '    """Né."""', '    return 1', ''])
    source = end.join(['def f():', '    return 1']).encode()
    assert found(text, _functions) == [(source, 'Né.'.encode())]


@pytest.mark.parametrize(
    'text', ['"""a\\0b"""', '"""  """', "'''é''' + ''", 'x = """', 'print """old"""', 'x = 1']
)
def test_what_gives_no_pair(text):
    assert found(text, _modules) == []


def test_nothing_but_a_docstring():
    assert found('"""All."""', _modules) == [(b'', b'All.')]
    assert found('def f():\n    """All."""', _functions) == [(b'def f():\n', b'All.')]


@pytest.mark.parametrize(('of', 'nodes'), [('functions', _functions), ('modules', _modules)])
def test_the_library_has_pairs(of, nodes):
    """Sources mean what they meant, without their docstrings."""
    pairs = data.python_docstrings('valid', of)
    assert len(pairs) > 10 and pairs == data.python_docstrings('valid', of)
    modules = [ast.parse(document) for document in data.python_stdlib('valid')]
    documented = [x for module in modules for x in nodes(module) if ast.get_docstring(x)]
    assert len(documented) == len(pairs)
    for (source, docstring), node in zip(pairs, documented, strict=True):
        assert ast.get_docstring(node) == docstring.decode() and b'\0' not in source
        del node.body[0]
        if node.body:
            assert ast.dump(parsed(source, node)) == ast.dump(node)


def parsed(source, node):
    """A module, or a function with its decorators, which stand before its source."""
    if isinstance(node, ast.Module):
        return ast.parse(source)
    inside = source.startswith(b' ')
    tree = ast.parse(b'if 1:\n' + source if inside else source).body[0]
    tree = tree.body[0] if inside else tree
    tree.decorator_list = node.decorator_list
    return tree


def test_a_mistake(monkeypatch):
    with pytest.raises(ValueError, match="of='classes': choose 'functions' or 'modules'"):
        data.python_docstrings(of='classes')
    with pytest.raises(ValueError, match=r"split='dev': choose 'train', 'valid' or 'test'"):
        data.python_docstrings('dev')
    monkeypatch.setattr('layercomb.data.corpora.docstrings.python_stdlib', lambda split: [b'x = 1'])
    with pytest.raises(UsageError, match=r"no docstrings of modules in split 'test': give pairs"):
        data.python_docstrings('test', 'modules')
