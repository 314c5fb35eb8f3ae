"""Code and its docstrings: pairs from Python's own library."""

from __future__ import annotations

import ast
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from layercomb.data.sources import python_stdlib
from layercomb.errors import UsageError

Pair = tuple[bytes, bytes]


def python_docstrings(split: str = 'train', of: str = 'functions') -> Sequence[Pair]:
    """Returns code of this Python's own library with its docstrings: real pairs on every machine.

    They can stand in for articles and abstracts. One version of Python always gives the same pairs,
    in the order of the files of `python_stdlib(split)`. Making them takes a few seconds.

    Args:
      split: 'train', 'valid' or 'test'.
      of: 'functions' for many short sources: functions and methods, except those inside other
        functions or statements; or 'modules' for long sources.

    Returns:
      A list of (source without its docstring, docstring), UTF-8 bytes without NUL. A source keeps
      its indentation, a docstring has none.

    Raises:
      ValueError: if there is no such split, or `of` is something else.
      UsageError: as `python_stdlib`.
    """
    if of not in _NODES:
        raise ValueError(f"of={of!r}: choose 'functions' or 'modules'")
    found = [pair for document in python_stdlib(split) for pair in _pairs(document, _NODES[of])]
    if not found:
        raise UsageError(f'no docstrings of {of} in split {split!r}: give pairs of your own')
    return found


def docstrings_of(document: bytes) -> list[str]:
    """The docstrings of functions and methods in a source file, in their order.

    Args:
      document: the file, UTF-8.
    """
    return [docstring.decode() for _, docstring in _pairs(document, _functions)]


def _pairs(document: bytes, nodes: Callable[[ast.Module], Iterator[Any]]) -> Iterator[Pair]:
    text = document.decode('utf-8-sig')
    if '"""' not in text and "'''" not in text:
        return  # mostly tables of characters, which take long to parse
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about escapes in the library's own strings
            module = ast.parse(text)
    except (SyntaxError, ValueError):  # the tests of 2to3 are Python 2
        return
    source = text.encode()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for node in nodes(module):
        docstring = (ast.get_docstring(node) or '').encode('utf-8', 'replace')
        if docstring and b'\0' not in docstring:
            yield _without(source, starts, node), docstring


def _without(source: bytes, starts: list[int], node: Any) -> bytes:
    """The source of a node without the lines of its docstring."""
    start, stop = 0, len(source)
    if not isinstance(node, ast.Module):
        start, stop = starts[node.lineno - 1], starts[node.end_lineno - 1] + node.end_col_offset
    string = node.body[0]
    before = source[start : starts[string.lineno - 1] + string.col_offset]
    after = source[starts[string.end_lineno - 1] + string.end_col_offset : stop]
    rest = after.lstrip(b' \t')
    if rest[:1] in b'\r\n':  # the docstring ends its line, or the file
        before, after = before.rstrip(b' \t'), rest.removeprefix(b'\r').removeprefix(b'\n')
    return before + after


def _modules(module: ast.Module) -> Iterator[ast.Module]:
    yield module


def _functions(node: Any) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods in a module or class, in their order."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child)


_NODES: dict[str, Callable[[ast.Module], Iterator[Any]]] = {
    'functions': _functions,
    'modules': _modules,
}
