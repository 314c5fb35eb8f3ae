"""Arguments of the `init` and `apply` that a class writes, found by the names that `Layer` uses.

So they can be checked and passed on as they came, by place or by name, whatever the class calls
them, and whether the method is a function or a static method.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

ABSENT: Any = object()

Args = tuple[Any, ...]
Given = dict[str, Any]


class Method:
    """A method as a class's body has it, which is asked for arguments by their usual names.

    Args:
      method: a function, a static method, or another callable.
      usual: what `Layer` calls the arguments, in their order.
    """

    def __init__(self, method: Any, usual: tuple[str, ...]):
        self._method = method
        parameters = _parameters(self._of(object()))
        kinds = {p.kind for p in parameters}
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        own = [p.name for p in parameters if p.kind in by_place]
        names = [*own, *usual[len(own) :]]
        # The name and the place of each; one that the method calls otherwise stands in its place.
        self._at = {
            name: names.index(name) if name in names else place for place, name in enumerate(usual)
        }
        self._names = names
        self._n_places = len(names) if inspect.Parameter.VAR_POSITIONAL in kinds else len(own)
        self._takes_names = {p.name for p in parameters}
        self._takes_any_name = inspect.Parameter.VAR_KEYWORD in kinds

    def find(self, name: str, args: Args, given: Given) -> Any:
        """The argument that usually has a name, or `ABSENT`."""
        place = self._at[name]
        return args[place] if place < len(args) else given.get(self._names[place], ABSENT)

    def put(self, name: str, value: Any, args: Args, given: Given) -> tuple[Args, Given]:
        """The arguments, with another value for one that is there."""
        place = self._at[name]
        if place < len(args):
            return (*args[:place], value, *args[place + 1 :]), given
        return args, {**given, self._names[place]: value}

    def as_taken(self, name: str, args: Args, given: Given) -> tuple[Args, Given]:
        """The arguments, with one by name if it has no place, and without it if it has neither."""
        place = self._at[name]
        if place < self._n_places:
            return args, given
        value = self.find(name, args, given)
        args = args[:place] + args[place + 1 :]
        given = {key: x for key, x in given.items() if key != name}
        takes = name in self._takes_names or self._takes_any_name
        return args, {**given, name: value} if takes else given

    def __call__(self, layer: Any, args: Args, given: Given) -> Any:
        """Calls the method of a layer."""
        return self._of(layer)(*args, **given)

    def wrapper(self, checking: Any) -> Any:
        """A function in the method's place, with its name and documentation."""
        made = functools.wraps(self._method)(checking)
        if not inspect.isfunction(self._method):
            del made.__wrapped__  # a static method's signature has no self, which `made` has
        return made

    def _of(self, layer: Any) -> Any:
        """What the class would give for ``layer.method``: a static method knows no layer."""
        bind = getattr(type(self._method), '__get__', None)
        return bind(self._method, layer, type(layer)) if bind else self._method


def _parameters(f: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(f).parameters.values())
    except ValueError:  # a builtin, which does not say what it takes
        return list(inspect.signature(lambda *args, **given: None).parameters.values())
