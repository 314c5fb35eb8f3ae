"""`Fn`: a function of arrays as a layer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import call_text, named, set_field, show
from layercomb.shapes import describe
from layercomb.trees import Tree

Count = Annotated[int, Bound(0)]

# Functions that are known to work on each position by itself.
POSITION_WISE = (jnp.zeros_like, jnp.ones_like)


class Fn(Layer):
    """A function of arrays as a layer: ``Fn('Sum', lambda x, y: x + y, position_wise=True)``.

    Layers are equal if their functions are. Two lambdas never are, so give a module-level function
    if a model built again must equal the first.

    Attributes:
      label: its name in `repr`, and in snake_case in paths.
      f: a function of `n_in` arrays, to an array or a tuple of `n_out` arrays.
      n_in: how many arrays `f` takes; by default its number of required positional parameters. Give
        it if `f` has no signature, or requires no parameter, such as
        ``functools.partial(jnp.clip, min=0, max=1)``.
      n_out: how many arrays `f` returns.
      position_wise: whether `f` works on each position of axis 1 by itself. `Chunk` and decoding
        take the layer only if True. It is known of `POSITION_WISE`.

    Raises:
      TypeError: at construction, if the number of arguments of `f` is unknown, or `f` cannot be
        called with `n_in`; when applied, if `f` does not return `n_out` arrays.

    >>> import jax.numpy as jnp
    >>> Fn('Max', jnp.maximum).n_in
    2
    """

    label: str
    f: Callable[..., Any]
    n_in: Count | None = None  # type: ignore[assignment]
    n_out: Count = 1
    position_wise: bool | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.f, Layer) or (isinstance(self.f, type) and issubclass(self.f, Layer)):
            raise TypeError(f'Fn({self.label!r}): {show(self.f)} is a layer: use it as it is')
        if self.n_in is None:
            counted, why = _count_parameters(self.f)
            if counted is None:
                raise TypeError(
                    f'Fn({self.label!r}): {show(self.f)} {why}: say how many with n_in='
                )
            set_field(self, 'n_in', counted)
        if self.position_wise is None and self.f in POSITION_WISE:
            set_field(self, 'position_wise', True)
        self._check_call()

    @property
    def _class_name(self) -> str:
        return self.label

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """`f` of the `n_in` inputs; a Python number that it returns becomes an array."""
        made = self.f(*inputs)
        outputs = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        outputs = tuple(jnp.asarray(y) if isinstance(y, (int, float)) else y for y in outputs)
        if any(not isinstance(y, (jax.Array, np.ndarray, np.generic)) for y in outputs):
            raise TypeError(
                f'Fn({self.label!r}): {show(self.f)} must give an array, or a tuple of arrays, '
                f'and gave {describe(outputs)}: return arrays alone'
            )
        if len(outputs) != self.n_out:
            raise TypeError(
                f'Fn promises n_out={self.n_out} and returned {len(outputs)} values: give '
                f'Fn({self.label!r}, …) n_out={len(outputs)}, or return as many'
            )
        return outputs, state

    def _check_call(self) -> None:
        """Raises a TypeError if `f` is known not to take `n_in` positional arguments."""
        signature = _signature(self.f)
        if signature is None:
            return
        try:
            signature.bind(*[None] * (self.n_in or 0))
        except TypeError as e:
            only = [
                p.name
                for p in signature.parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.default is p.empty
            ]
            cure = (
                f'{only[0]!r} must be given by keyword: bind it, functools.partial(f, '
                f'{only[0]}=…), or wrap f in a function of arrays'
                if only
                else 'set n_in= to what it takes'
            )
            raise TypeError(
                f'Fn({self.label!r}): {show(self.f)}{signature} cannot be called with '
                f'n_in={self.n_in} arrays ({e}): {cure}'
            ) from None

    def __repr__(self) -> str:
        parts = [repr(self.label), show(self.f)]
        if self.n_in != _count_parameters(self.f)[0]:
            parts.append(f'n_in={self.n_in}')
        parts += [f'n_out={self.n_out}'] if self.n_out != 1 else []
        said = None if self.f in POSITION_WISE and self.position_wise else self.position_wise
        parts += [] if said is None else [f'position_wise={said}']
        return call_text('Fn', [*parts, *named(self)])


def _signature(f: Callable[..., Any]) -> inspect.Signature | None:
    """A function's signature; None of a builtin without one."""
    try:
        return inspect.signature(f)
    except (ValueError, TypeError):
        return None


def _count_parameters(f: Callable[..., Any]) -> tuple[int | None, str]:
    """How many positional parameters a function requires; or None, and why that is not known."""
    inside = inspect.unwrap(f)  # of jit and its like
    if isinstance(inside, (jnp.ufunc, np.ufunc)):  # their signature is *args
        return inside.nin, ''
    signature = _signature(f)
    if signature is None:
        return None, 'does not say how many arguments it takes (a builtin)'
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None, 'does not say how many arguments it takes (*args)'
    wanted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    defaults = [p.default for p in parameters if p.kind in wanted]
    required = sum(default is inspect.Parameter.empty for default in defaults)
    if defaults and not required:
        return None, f'has a default for every argument, {signature}'
    return required, ''
