"""The axes of a weight in letters, as its layer declares them: `Axes`.

A layer declares each weight once, in `Layer.weight_axes`. Optimizers, weight decay, quantization
and rules by letter read it. A declaration has one letter for each axis:

* ``'D->F'``: a matrix (D, F); a product sums over D and gives F. ``'D->HK'``, ``'HK->D'``: the same
  with two axes on one side. ``'F<-D'``: the matrix (F, D), whose first axis is the result's.
* ``'->F'``: a vector, such as a bias or a scale; ``'->'`` is one number.
* ``'V:D'``: a table (V, D), whose rows are looked up, or from which kernels are made.
* ``'E|D->F'``: one matrix for each E.
* ``'F*->D'``, ``'F*<-D'``: rows of F units, of which each position chooses few. Each row is read,
  rounded and scaled by itself. ``'E|M*->D'``: the same rows in experts of M units, which are chosen
  whole.

Letters of the library: D width of the model or input, F any other width, H heads, K depth of a
head, V vocabulary, L positions, E experts or blocks, M units of one of them or features of a
module, S modules, R rank, N outputs, W window along the length, Y and X window along height and
width, G groups that share a scale, U units of a memory. A layer of one's own may use
others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = '?'

_AXIS = r'\([A-Z]+\)|[A-Z?]'
_MATRIX = re.compile(rf'(?:([A-Z]+)\|)?((?:{_AXIS})*)(->|<-|:)((?:{_AXIS})*)')
_CHOSEN = re.compile(r'(?:([A-Z]+)\|)?([A-Z])\*(->|<-)([A-Z])')


@dataclasses.dataclass(frozen=True)
class Axes:
    """What each axis of a weight is.

    Attributes:
      spec: the declaration, as the module describes. For a narrow matrix, ``'(HK)'`` is one axis
        made of two; for an undeclared weight, each axis is ``'?'``.
      stacked: how many leading axes `Repeat` added.

    >>> kernel = Axes('D->HK', stacked=1)
    >>> kernel.letters, kernel.summed, kernel.given, kernel.ndim
    (('D', 'H', 'K'), (1,), (2, 3), 4)
    >>> Axes('V:D').is_table, Axes('->F').is_vector, Axes('E|F<-D').summed
    (True, True, (2,))
    """

    spec: str
    stacked: int = 0

    @property
    def letters(self) -> tuple[str, ...]:
        """The letter of each axis that is not stacked."""
        separate, first, _, second = self._parts
        return separate + first + second

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return self.stacked + len(self.letters)

    @property
    def separate(self) -> tuple[int, ...]:
        """The axes that count separate matrices: stacked ones, and those before the bar."""
        return tuple(range(self.stacked + len(self._parts[0])))

    @property
    def first(self) -> tuple[int, ...]:
        """The axes before the arrow or colon."""
        start = len(self.separate)
        return tuple(range(start, start + len(self._parts[1])))

    @property
    def second(self) -> tuple[int, ...]:
        """The axes after the arrow or colon."""
        return tuple(range(self.ndim - len(self._parts[3]), self.ndim))

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that a product sums over; none in vectors and tables."""
        return {'->': self.first, '<-': self.second}.get(self._parts[2], ())

    @property
    def given(self) -> tuple[int, ...]:
        """The axes of a product's result, or of a vector; none in tables."""
        return {'->': self.second, '<-': self.first}.get(self._parts[2], ())

    @property
    def is_known(self) -> bool:
        """Whether the kind is known: vector, matrix or table."""
        return self._parts[2] != UNKNOWN

    @property
    def is_declared(self) -> bool:
        """Whether the layer declared the axes."""
        return UNKNOWN not in self.spec

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias, a scale, or one number."""
        return self._parts[2] == '->' and not self.first

    @property
    def is_table(self) -> bool:
        """Whether it is a table of rows."""
        return self._parts[2] == ':'

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix: a product sums over some of its axes and keeps others."""
        return bool(self.summed and self.given)

    @property
    def has_chosen_rows(self) -> bool:
        """Whether its rows are units of which each position chooses few."""
        return '*' in self.spec

    @property
    def _parts(self) -> tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...]]:
        return _parsed(self.spec)


def undeclared(ndim: int, stacked: int) -> Axes:
    """The axes of a weight that no layer declares: a vector if it has at most one axis.

    Args:
      ndim: how many axes the weight has, stacked ones included.
      stacked: how many leading axes `Repeat` added.

    >>> undeclared(2, stacked=1).is_vector, undeclared(2, stacked=0).is_known
    (True, False)
    """
    own = ndim - stacked
    return Axes(('->' if own < 2 else '') + UNKNOWN * own, stacked)


def check_declared(owner: str, declared: Any) -> None:
    """Checks the `weight_axes` of a class, unless they are a property.

    Raises:
      TypeError: if they are no dict of strings.
      ValueError: if a declaration cannot be read; the message names class and weight.
    """
    if isinstance(declared, (property, functools.cached_property)):
        return
    if not isinstance(declared, Mapping):
        raise TypeError(
            f"{owner}: weight_axes={declared!r}: give a dict such as {{'kernel': 'D->F'}}"
        )
    for path, spec in declared.items():
        if not isinstance(spec, str):
            raise TypeError(
                f"{owner}: the axes of {path!r} must be a text such as 'D->F': {spec!r}"
            )
        try:
            _parsed(spec)
        except ValueError as e:
            raise ValueError(f'{owner}: the axes of {path!r}: {e}') from None


@functools.cache
def _parsed(spec: str) -> tuple[tuple[str, ...], tuple[str, ...], str, tuple[str, ...]]:
    """Separate letters, those before the arrow, the arrow, those after it."""
    if spec and not spec.strip(UNKNOWN):
        return (), tuple(spec), UNKNOWN, ()
    found = _CHOSEN.fullmatch(spec) or _MATRIX.fullmatch(spec)
    if found is None:
        raise ValueError(
            f"{spec!r} cannot be read: write capitals, such as 'D->F' for a kernel (D, F), '->F' "
            "for a bias, 'V:D' for a table, 'E|D->F' for a kernel of each E"
        )
    separate, first, arrow, second = found.groups()
    first, second = (tuple(re.findall(_AXIS, side)) for side in (first, second))
    letters = re.findall('[A-Z]', spec)
    if len(set(letters)) < len(letters):
        raise ValueError(f'{spec!r} has a letter twice: give each axis its own')
    if not second and (first or arrow != '->'):
        raise ValueError(f'{spec!r} says nothing after {arrow!r}: write a vector as {"->F"!r}')
    if not first and arrow != '->':
        raise ValueError(f'{spec!r} says nothing before {arrow!r}: write a vector as {"->F"!r}')
    return tuple(separate or ''), first, arrow, second
