"""What a template of strangers may spend: the size of its values, and its steps.

Whatever makes a value pays for its size, each turn of a loop and each call pays too, and no value
may pass `LARGEST`. Costs are counted and not timed: the same template and messages always end in
the same way.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from layercomb.errors import UsageError

LARGEST = 1 << 24  # of one value: its characters, and `_ELEMENT` for each element
STEP = 1024  # what one turn or call costs, beside the text of the template
_BUDGET = 1 << 28  # of all values together
_ELEMENT = 64
_DEEPEST = 100  # values in values


class Refused(Exception):
    """A template called ``raise_exception``."""


class Budget:
    """What is left to spend.

    Args:
      step: the cost of a turn of a loop, or of a call.
    """

    def __init__(self, step: int = STEP) -> None:
        self._left, self._step = _BUDGET, step

    def spend(self, cost: int) -> None:
        """Pays for a value.

        Raises:
          UsageError: if nothing is left.
        """
        self._left -= cost
        if self._left < 0:
            raise UsageError(
                'the chat template runs for too long or makes too much text: take the template '
                'from the makers of the model'
            )

    def step(self) -> None:
        """Pays for a turn or a call."""
        self.spend(self._step)


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar('budget')


@contextlib.contextmanager
def budgeted(step: int) -> Iterator[Budget]:
    """A new budget, of which everything in this module takes."""
    made = Budget(step)
    held = _budget.set(made)
    try:
        yield made
    finally:
        _budget.reset(held)


def step() -> None:
    """Pays for a turn or a call."""
    _budget.get().step()


def paid(value: Any) -> Any:
    """The value itself, whose size has been paid; one that is too large is refused."""
    if isinstance(value, str):
        cost = len(value)
    else:
        if inspect.isgenerator(value):
            value = [paid(each) for each in value]
        cost = size(value, 0)
    if cost > LARGEST:
        raise UsageError('the chat template makes a value that is too large: mend the template')
    _budget.get().spend(1 + cost)
    return value


def size(value: Any, depth: int) -> int:
    """The size of a value, in which each part counts as often as it is held."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return 1
    if isinstance(value, int):
        return 1 if value.bit_length() <= 4096 else LARGEST + 1
    if isinstance(value, range):
        return len(value)
    if depth > _DEEPEST:
        raise RecursionError('values are nested too deeply')
    if isinstance(value, Mapping):
        parts: Any = (each for pair in value.items() for each in pair)
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    else:
        return 1
    total = _ELEMENT
    for part in parts:
        total += _ELEMENT + size(part, depth + 1)
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
            budget.step()
            yield value


class _Sized(_Turns):
    def __len__(self) -> int:
        return len(self._values)


def turns(values: Any) -> Any:
    """What a loop runs over, of which each turn will be paid."""
    return _Sized(values) if hasattr(values, '__len__') else _Turns(values)


def concatenated(*values: Any) -> str:
    """The text of values one after the other."""
    return str(paid(''.join(_text(value) for value in values)))


def _text(value: Any) -> str:
    made = str(value)
    _budget.get().spend(len(made))
    return made


def check_width(width: Any) -> None:
    """Refuses a wide indent."""
    if isinstance(width, str) and len(width) <= 64:
        return
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise UsageError(f'the chat template indents by {width!r:.20}: mend the template')


def check_made(n: int) -> None:
    """Refuses a value of so many characters or elements if they are too many."""
    if n > LARGEST:
        raise UsageError('the chat template makes a value that is too large: mend the template')


def check_growth(name: str, value: Any, args: tuple[Any, ...], more: Mapping[str, Any]) -> None:
    """Refuses what would make a large value of a small one, before it is made."""
    if name == 'replace':
        text, (old, new) = str(value), (str(each) for each in args[:2])
        check_made(len(text) + text.count(old) * len(new))
    elif name == 'join' and hasattr(value, '__len__'):
        glue = args[0] if args else more.get('d', '')
        check_made(len(value) * len(str(glue)))
    elif name == 'indent':
        width = args[0] if args else more.get('width', 4)
        check_width(width)
        check_made(len(str(value)) * (1 + (width if isinstance(width, int) else len(width))))
    elif name == 'format' and re.search(r'\*|\d{3}|\{[^}]*\{', str(value)):
        raise UsageError(f'the chat template formats by {str(value)!r:.40}: mend the template')
