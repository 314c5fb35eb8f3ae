"""`Values`: a value on the stack of a model, of each of several batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import is_float
from layercomb.trees import Tree

Batches = tuple[Arrays, ...]
Stack = tuple[Any, ...]


class Values:
    """One value on the stack, as an array for each batch, computed when they are first asked for.

    So what nobody asks for, such as logits, is not computed. A route may read shape and dtype.

    Args:
      like: has the shape and dtype of the first batch's array.
      make: returns the arrays.
    """

    def __init__(self, like: Any, make: Callable[[], list[jax.Array]]) -> None:
        self.shape, self.dtype = like.shape, like.dtype
        self._make: Callable[[], list[jax.Array]] | None = make
        self._made: list[jax.Array] = []

    def arrays(self) -> list[jax.Array]:
        """The arrays, one for each batch."""
        if self._make is not None:
            self._made = self._make()
            self._make = None  # which holds the inputs that it read
        return self._made

    def float32(self) -> Values:
        """The same in float32, if they are floats, as the streams of a reversible stack are."""
        if not is_float(self) or self.dtype == jnp.float32:
            return self
        like = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        return Values(like, lambda: [x.astype(jnp.float32) for x in self.arrays()])


def batches_of(net: Layer, given: Any, what: str = 'quantize: calibrate=') -> Batches:
    """The batches that a user gives, each as the tuple of a model's inputs.

    Args:
      net: the model.
      given: an iterable of arrays, or of tuples of `net.n_in` arrays.
      what: who was given them, and as which argument.

    Raises:
      TypeError: if it is no iterable of such.
      ValueError: if there are none.
    """
    wanted = 'give a list of batches, such as [tokens] with int32 tokens (B, L)'
    if hasattr(given, 'shape') or isinstance(given, str | dict) or not isinstance(given, Iterable):
        raise TypeError(f'{what} is a {type(given).__name__}: {wanted}')
    batches = []
    for batch in given:
        arrays = batch if isinstance(batch, tuple) else (batch,)
        if len(arrays) != net.n_in:
            raise TypeError(
                f'{what}: a batch has {len(arrays)} values, and the model takes '
                f'{net.n_in}: give these alone, in a tuple if there are several'
            )
        batches.append(tuple(jnp.asarray(x) for x in arrays))
    if not batches:
        raise ValueError(f'{what} has no batches: {wanted}')
    return tuple(batches)


def stack_of(batches: Batches) -> Stack:
    """Batches as the stack of values that a model takes."""
    return tuple(Values(xs[0], functools.partial(list, xs)) for xs in zip(*batches, strict=True))


def rows_of_stack(values: Stack) -> list[Arrays]:
    """The inputs of a layer, as a tuple for each batch."""
    return list(zip(*(each.arrays() for each in values), strict=True))


def run(net: Layer, weights: Tree, state: Tree, values: Stack) -> Stack:
    """A layer's outputs for all batches, in ``EVAL``; nothing is computed yet.

    Args:
      net: any layer.
      weights, state: of it.
      values: its inputs, as many `Values` as it takes.
    """
    like = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in values)
    outputs = jax.eval_shape(functools.partial(_applied, net), weights, state, like)

    @functools.cache
    def made() -> list[Arrays]:
        return [_applied(net, weights, state, inputs) for inputs in rows_of_stack(values)]

    def output(i: int) -> list[jax.Array]:
        return [each[i] for each in made()]

    return tuple(Values(like, functools.partial(output, i)) for i, like in enumerate(outputs))


@functools.partial(jax.jit, static_argnums=0)
def _applied(net: Layer, weights: Tree, state: Tree, inputs: Arrays) -> Arrays:
    return net.apply(weights, state, inputs, mode=Mode.EVAL)[0]


def beside(a: Stack, b: Stack) -> Stack:
    """Stacks of as many values, with the batches of the one before those of the other."""

    def both(x: Values, y: Values) -> list[jax.Array]:
        return x.arrays() + y.arrays()

    return tuple(Values(x, functools.partial(both, x, y)) for x, y in zip(a, b, strict=True))


def apart(values: Stack, n: int) -> tuple[Stack, Stack]:
    """The first n batches, and those behind them: the inverse of `beside`."""

    def part(x: Values, which: slice) -> list[jax.Array]:
        return x.arrays()[which]

    first, second = (
        tuple(Values(x, functools.partial(part, x, which)) for x in values)
        for which in (slice(n), slice(n, None))
    )
    return first, second
