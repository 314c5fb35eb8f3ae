"""jinja2 templates of strangers: sandboxed, and on a budget.

The sandbox of jinja2 keeps a template from Python, but not from running for ever or filling the
memory. So here whatever makes a value pays for its size, each turn of a loop and each call pays
too, and no value may pass `LARGEST`. Costs are counted and not timed: the same template and
messages always end in the same way.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from layercomb.errors import UsageError, require

LARGEST = 1 << 24  # of one value: its characters, and `_ELEMENT` for each element
_BUDGET = 1 << 28  # of all values together
_ELEMENT = 64
_STEP = 1024  # what one turn or call costs, beside the text of the template

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
_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar('budget')


class Refused(Exception):
    """A template called ``raise_exception``."""


class _Budget:
    def __init__(self, step: int) -> None:
        self.left, self.step = _BUDGET, step

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise UsageError(
                'the chat template runs for too long or makes too much text: take the template '
                'from the makers of the model'
            )


def compiled(source: str, **functions: Callable[..., Any]) -> Any:
    """A template, ready to `render`.

    Args:
      source: in the dialect of transformers: blocks take their line's end and indent away, there
        are ``break`` and ``continue``, ``tojson`` does not escape.
      **functions: further functions that it may call.

    Raises:
      UsageError: if jinja2 is not installed.
      jinja2.TemplateSyntaxError: if it cannot be read.
    """
    require('jinja2', 'pretrained')
    made = _environment()
    made.globals |= functions
    _budget.set(_Budget(_STEP))
    template = made.from_string(source)
    text = made.parse(source)
    from jinja2 import nodes

    static = sum(len(node.data) for node in text.find_all(nodes.TemplateData))
    return template, _STEP + static


def render(template: Any, names: Mapping[str, Any]) -> str:
    """The text of a template.

    Args:
      template: made by `compiled`.
      names: its variables: texts, numbers, lists and dicts.

    Raises:
      UsageError: if it takes more than its budget.
      Refused: if the template says so.
      Exception: whatever else it raises.
    """
    made, step = template
    budget = _Budget(step)
    held = _budget.set(budget)
    try:
        _paid(list(names.values()))
        parts = []
        for part in made.generate(**names):
            budget.spend(len(part))
            parts.append(part)
        return ''.join(parts)
    finally:
        _budget.reset(held)


def _paid(value: Any) -> Any:
    """The value itself, whose size has been paid; one that is too large is refused."""
    if isinstance(value, str):
        cost = len(value)
    else:
        if inspect.isgenerator(value):
            value = [_paid(each) for each in value]
        cost = _size(value, 0)
    if cost > LARGEST:
        raise UsageError('the chat template makes a value that is too large: mend the template')
    _budget.get().spend(1 + cost)
    return value


def _size(value: Any, depth: int) -> int:
    """The size of a value, in which each part counts as often as it is held."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return 1
    if isinstance(value, int):
        return 1 if value.bit_length() <= 4096 else LARGEST + 1
    if isinstance(value, range):
        return len(value)
    if depth > 100:
        raise RecursionError('values are nested too deeply')
    if isinstance(value, Mapping):
        parts: Any = (each for pair in value.items() for each in pair)
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    else:
        return 1
    total = _ELEMENT
    for part in parts:
        total += _ELEMENT + _size(part, depth + 1)
        if total > LARGEST:
            break
    return total


class _Turns:
    """What a loop runs over; each turn is paid."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for value in self._values:
            budget.spend(budget.step)
            yield value


class _Sized(_Turns):
    def __len__(self) -> int:
        return len(self._values)


def _turns(values: Any) -> Any:
    return _Sized(values) if hasattr(values, '__len__') else _Turns(values)


def _concatenated(*values: Any) -> str:
    return str(_paid(''.join(_text(value) for value in values)))


def _text(value: Any) -> str:
    text = str(value)
    _budget.get().spend(len(text))
    return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    _check_width(indent or 0)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any = '') -> None:
    raise Refused(str(message))


def _check_width(width: Any) -> None:
    if isinstance(width, str) and len(width) <= 64:
        return
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise UsageError(f'the chat template indents by {width!r:.20}: mend the template')


def _check_made(n: int) -> None:
    if n > LARGEST:
        raise UsageError('the chat template makes a value that is too large: mend the template')


def _check_growth(name: str, value: Any, args: tuple[Any, ...], more: Mapping[str, Any]) -> None:
    """Refuses what would make a large value of a small one, before it is made."""
    if name == 'replace':
        text, (old, new) = str(value), (str(each) for each in args[:2])
        _check_made(len(text) + text.count(old) * len(new))
    elif name == 'join' and hasattr(value, '__len__'):
        glue = args[0] if args else more.get('d', '')
        _check_made(len(value) * len(str(glue)))
    elif name == 'indent':
        width = args[0] if args else more.get('width', 4)
        _check_width(width)
        _check_made(len(str(value)) * (1 + (width if isinstance(width, int) else len(width))))
    elif name == 'format' and re.search(r'\*|\d{3}|\{[^}]*\{', str(value)):
        raise UsageError(f'the chat template formats by {str(value)!r:.40}: mend the template')


def _budgeted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its result."""
    n_given = int(hasattr(function, 'jinja_pass_arg'))  # the environment or the context comes first

    @functools.wraps(function)
    def run(*args: Any, **more: Any) -> Any:
        budget = _budget.get()
        budget.spend(budget.step)
        value, *rest = args[n_given:]
        if inspect.isgenerator(value):
            value = _paid(value)
        _check_growth(name, value, tuple(rest), more)
        return _paid(function(*args[:n_given], value, *rest, **more))

    return run


@functools.cache
def _classes() -> Any:
    """The environment's class, which exists once jinja2 is imported."""
    from jinja2 import nodes, pass_context
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

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
        """Puts `_paid` around what makes values, and `_turns` around what loops run over."""

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
        intercepted_binops = frozenset(('+', '-', '*', '**', '%', '/', '//'))
        paid, turns, concatenated = map(staticmethod, (_paid, _turns, _concatenated))

        def _parse(self, *args: Any) -> Any:
            return Paying().visit(super()._parse(*args))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == '**' and not (numbers and abs(left) <= 1e9 and abs(right) <= 64):
                raise UsageError('the chat template takes a power too high: mend the template')
            if operator == '%' and not numbers:
                _check_growth('format', left, (), {})
            if operator == '*' and not numbers:
                n, held = (left, right) if isinstance(left, int) else (right, left)
                _check_made(_size(held, 0) * (n if isinstance(n, int) else 1))
            return _paid(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            plain = isinstance(obj, str | bytes | int | float | list | tuple | Mapping)
            if plain and attr not in _METHODS:
                return False
            return bool(super().is_safe_attribute(obj, attr, value))

        def call(self, context: Any, function: Any, *args: Any, **more: Any) -> Any:
            if any(function is ours for ours in (_paid, _turns, _concatenated)):
                return function(*args)
            budget = _budget.get()
            budget.spend(budget.step)
            method = getattr(function, '__wrapped__', function)  # the sandbox wraps str.format
            owner, name = getattr(method, '__self__', None), getattr(method, '__name__', '')
            if isinstance(owner, str):
                values = (args[0], owner) if name == 'join' and args else (owner, *args)
                if name == 'join' and inspect.isgenerator(values[0]):
                    values = args = (_paid(values[0]),)
                _check_growth(name, values[0], tuple(values[1:]), more)
            return _paid(super().call(context, function, *args, **more))

    @pass_context
    def finalize(context: Any, value: Any) -> Any:
        del context
        _budget.get().spend(len(value) if isinstance(value, str) else _size(value, 0))
        return value

    return Environment, Generation, Names, finalize


def _environment() -> Any:
    """An environment with what transformers gives to templates, and no more."""
    from jinja2 import filters
    from jinja2.sandbox import safe_range

    kind, generation, names, finalize = _classes()
    made = kind(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # constants would be computed while compiling
        finalize=finalize,
        extensions=['jinja2.ext.loopcontrols', generation],
    )
    known = {name: filters.FILTERS[name] for name in _FILTERS} | {'tojson': _tojson}
    made.filters = {name: _budgeted_filter(name, function) for name, function in known.items()}
    made.globals = {
        'range': safe_range,
        'dict': dict,
        'namespace': names,
        'raise_exception': _raise_exception,
    }
    return made
