"""jinja2 templates of strangers: sandboxed, and on a budget.

The sandbox of jinja2 keeps a template from Python, but not from running for ever or filling the
memory. So here whatever makes a value, a turn or a call takes from the template's `budget`. This
module needs jinja2 when it is imported.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Template, filters, nodes, pass_context
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from layercomb.errors import UsageError
from layercomb.interop import budget

# Filters and methods whose results are as large as what goes in, or are checked before they run.
_FILTERS = (
    'abs', 'capitalize', 'count', 'd', 'default', 'dictsort', 'e', 'escape', 'first', 'float',
    'format', 'forceescape', 'groupby', 'indent', 'int', 'items', 'join', 'last', 'length',
    'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr', 'replace', 'reverse', 'safe',
    'select', 'selectattr', 'sort', 'string', 'title', 'trim', 'truncate', 'unique', 'upper',
    'wordcount',
)  # fmt: skip
_METHODS = frozenset((
    'strip', 'lstrip', 'rstrip', 'split', 'rsplit', 'splitlines', 'partition', 'rpartition',
    'startswith', 'endswith', 'upper', 'lower', 'title', 'capitalize', 'swapcase', 'casefold',
    'replace', 'join', 'find', 'rfind', 'index', 'rindex', 'count', 'format', 'removeprefix',
    'removesuffix', 'isdigit', 'isalpha', 'isalnum', 'isspace', 'isupper', 'islower', 'istitle',
    'isnumeric', 'isdecimal', 'isidentifier', 'get', 'items', 'keys', 'values', 'copy',
))  # fmt: skip


def compiled(source: str, **functions: Callable[..., Any]) -> tuple[Template, int]:
    """A template, ready to `render`, and what a step of it costs.

    Args:
      source: in the dialect of transformers: blocks take their line's end and indent away, there
        are ``break`` and ``continue``, ``tojson`` does not escape.
      **functions: further functions that it may call.

    Raises:
      jinja2.TemplateSyntaxError: if it cannot be read.
    """
    made = _environment()
    made.globals |= functions
    with budget.budgeted(budget.STEP):
        text = made.parse(source)
        static = sum(len(node.data) for node in text.find_all(nodes.TemplateData))
        return made.from_string(source), budget.STEP + static


def render(template: tuple[Template, int], names: Mapping[str, Any]) -> str:
    """The text of a template.

    Args:
      template: made by `compiled`.
      names: its variables: texts, numbers, lists and dicts.

    Raises:
      UsageError: if it takes more than its budget.
      budget.Refused: if the template says so.
      Exception: whatever else it raises.
    """
    made, step = template
    with budget.budgeted(step) as left:
        budget.paid(list(names.values()))
        parts = []
        for part in made.generate(**names):
            left.spend(len(part))
            parts.append(part)
        return ''.join(parts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    budget.check_width(indent or 0)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any = '') -> None:
    raise budget.Refused(str(message))


def _budgeted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its result."""
    n_given = int(hasattr(function, 'jinja_pass_arg'))  # the environment or the context comes first

    @functools.wraps(function)
    def run(*args: Any, **more: Any) -> Any:
        budget.step()
        value, *rest = args[n_given:]
        if inspect.isgenerator(value):
            value = budget.paid(value)
        budget.check_growth(name, value, tuple(rest), more)
        return budget.paid(function(*args[:n_given], value, *rest, **more))

    return run


class Generation(Extension):
    """``{% generation %}``, which marks an answer for training: its text."""

    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(('name:endgeneration',), drop_needle=True)


class Names(Namespace):
    """A namespace whose text does not show what is in it, which may be itself."""

    def __repr__(self) -> str:
        return '<namespace>'


class Paying(NodeTransformer):
    """Puts `budget.paid` around what makes values, and `turns` around what loops run over."""

    def _call(self, name: str, *args: Any) -> Any:
        function = nodes.EnvironmentAttribute(name)
        return nodes.Call(function, list(args), [], None, None, lineno=args[0].lineno)

    def visit_For(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.iter = self._call('turns', node.iter)
        return node

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._call('concatenated', *node.nodes)

    def visit_List(self, node: Any) -> Any:
        return self._call('paid', self.generic_visit(node))

    visit_Dict = visit_List

    def visit_Tuple(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return self._call('paid', node) if node.ctx == 'load' else node


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which all that makes values pays for them."""

    intercepted_binops = frozenset(('+', '-', '*', '**', '%', '/', '//'))
    paid, turns, concatenated = map(staticmethod, (budget.paid, budget.turns, budget.concatenated))

    def _parse(self, *args: Any) -> Any:
        return Paying().visit(super()._parse(*args))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == '**' and not (numbers and abs(left) <= 1e9 and abs(right) <= 64):
            raise UsageError('the chat template takes a power too high: mend the template')
        if operator == '%' and not numbers:
            budget.check_growth('format', left, (), {})
        if operator == '*' and not numbers:
            n, held = (left, right) if isinstance(left, int) else (right, left)
            budget.check_made(budget.size(held, 0) * (n if isinstance(n, int) else 1))
        return budget.paid(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        plain = isinstance(obj, str | bytes | int | float | list | tuple | Mapping)
        if plain and attr not in _METHODS:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))

    def call(self, context: Any, function: Any, *args: Any, **more: Any) -> Any:
        if any(function is ours for ours in (budget.paid, budget.turns, budget.concatenated)):
            return function(*args)
        budget.step()
        method = getattr(function, '__wrapped__', function)  # the sandbox wraps str.format
        owner, name = getattr(method, '__self__', None), getattr(method, '__name__', '')
        if isinstance(owner, str):
            if name == 'join':
                args = tuple(budget.paid(each) for each in args)
                budget.check_growth(name, args[0] if args else (), (owner,), more)
            else:
                budget.check_growth(name, owner, args, more)
        return budget.paid(super().call(context, function, *args, **more))


@pass_context  # or it would be called while compiling, too
def _finalize(context: Any, value: Any) -> Any:
    """A value that will be written, once it has been paid."""
    del context
    return budget.paid(value)


def _environment() -> Environment:
    """An environment with what transformers gives to templates, and no more."""
    made = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants would be computed while compiling
        finalize=_finalize,
        extensions=['jinja2.ext.loopcontrols', Generation],
    )
    known = {name: filters.FILTERS[name] for name in _FILTERS} | {'tojson': _tojson}
    made.filters = {name: _budgeted_filter(name, function) for name, function in known.items()}
    made.globals = {
        'range': safe_range,
        'dict': dict,
        'namespace': Names,
        'raise_exception': _raise_exception,
    }
    return made
