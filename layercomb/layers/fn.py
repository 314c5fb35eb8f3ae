"""`Fn`: a function of arrays as a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from layercomb.layers.base import Layer, Mode, _call_text, _named, _set, _show


class Fn(Layer):
    """A function of arrays as a layer: ``Fn('Sum', lambda x, y: x + y)``.

    Equal functions make equal layers, and every ``lambda`` is a function of its own: name a
    module-level function where the model is to equal itself when built again.

    Attributes:
      label: what `repr` and the paths call it.
      f: a function of `n_in` arrays that gives an array, or a tuple of `n_out`.
      n_in: by default the number of required positional parameters of `f`.
      n_out: how many arrays `f` gives.

    >>> import jax.numpy as jnp
    >>> Fn('Max', jnp.maximum).n_in
    2
    """

    label: str
    f: Callable[..., Any]
    n_in: int | None = None  # type: ignore[assignment]
    n_out: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_in is None:
            counted = _count_parameters(self.f)
            if counted is None:
                raise TypeError(
                    f'Fn({self.label!r}): {_show(self.f)} does not say how many arguments it takes '
                    '(*args, or a builtin): say how many with n_in='
                )
            _set(self, 'n_in', counted)

    @property
    def _class_name(self) -> str:
        return self.label

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        made = self.f(*inputs)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,), state

    def __repr__(self) -> str:
        parts = [repr(self.label), _show(self.f)]
        if self.n_in != _count_parameters(self.f):
            parts.append(f'n_in={self.n_in}')
        parts += [f'n_out={self.n_out}'] if self.n_out != 1 else []
        return _call_text('Fn', [*parts, *_named(self)])


def _count_parameters(f: Callable[..., Any]) -> int | None:
    """How many positional parameters a function requires; None if it does not say."""
    if isinstance(f, jnp.ufunc):  # jnp.add and its like: their signature is *args
        return f.nin
    try:
        parameters = inspect.signature(f).parameters.values()
    except ValueError:  # a builtin without a signature
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    wanted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in wanted and p.default is p.empty for p in parameters)
