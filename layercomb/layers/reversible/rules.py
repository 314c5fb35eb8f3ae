"""`Rules`: a function of a layer that has one rule for each class of layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

P = ParamSpec('P')
R = TypeVar('R')
Rule = TypeVar('Rule', bound=Callable[..., Any])


class Rules(Generic[P, R]):
    """A function of a layer with a rule for each class, over `functools.singledispatch`.

    A rule is written for the methods of its class. A subclass inherits the rule as long as it
    inherits these methods; a subclass with an `apply` or `route` of its own computes something
    else, so the default holds for it until it registers a rule.

    A rule is given all arguments: those that a call leaves out have the default's values.

    Attributes:
      default: what holds for a layer without a rule, from the layer and further arguments.

    >>> from layercomb import tl
    >>> @Rules
    ... def is_plain(layer):
    ...     return False
    >>> @is_plain.register(tl.Serial)
    ... def _(layer):
    ...     return all(map(is_plain, layer.layers))
    >>> is_plain(tl.Serial()), is_plain(tl.Serial(tl.Relu())), is_plain(tl.ReversibleSerial())
    (True, False, False)
    """

    def __init__(self, default: Callable[Concatenate[Any, P], R]) -> None:
        functools.update_wrapper(self, default)
        self.default = default
        self._signature = inspect.signature(default)
        unless_registered: Any = _Known(default, object, ())
        self._find = functools.singledispatch(unless_registered)

    def register(
        self, cls: type, *, of: tuple[str, ...] = ('apply', 'route')
    ) -> Callable[[Rule], Rule]:
        """A decorator that adds a rule.

        Args:
          cls: the class of layers that the rule is for.
          of: the methods of `cls` that the rule knows. The default holds for a subclass that has
            others. A rule that calls a method itself leaves it out.
        """

        def add(rule: Rule) -> Rule:
            known: Any = _Known(rule, cls, of)
            self._find.register(cls, known)
            return rule

        return add

    def rule(self, cls: type) -> Callable[Concatenate[Any, P], R]:
        """The rule that holds for a class of layers, by which a subclass may keep it.

        ``by_head.register(Mine)(by_head.rule(tl.MergeHeads))`` is for a subclass of `MergeHeads`
        whose own `apply` fits the rule as well.
        """
        found: Any = self._find.dispatch(cls)
        return found.rule if found.holds(cls) else self.default

    def __call__(self, layer: Any, *args: P.args, **given: P.kwargs) -> R:
        bound = self._signature.bind(layer, *args, **given)
        bound.apply_defaults()
        return self.rule(type(layer))(*bound.args, **bound.kwargs)


class _Known(NamedTuple):
    """A rule, and the class and methods that it is written for."""

    rule: Callable[..., Any]
    cls: type
    of: tuple[str, ...]

    def holds(self, cls: type) -> bool:
        """Whether a subclass has the same methods."""
        return all(getattr(cls, m, None) is getattr(self.cls, m, None) for m in self.of)
