"""Layers without weights that move, join and split values: `Select`, `Dup`, `Drop` …"""

from __future__ import annotations

import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.core.layer import POSITION_AXES, Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import call_text, named, set_field
from layercomb.shapes import check_axis, describe
from layercomb.trees import Tree


class Rearrange(Layer):
    """A layer whose outputs are its inputs, rearranged; subclasses write `pick`."""

    computes_in = ('apply', 'pick')
    float32 = True

    def pick(self, values: Arrays) -> Arrays:
        """The outputs.

        Args:
          values: a tuple of `n_in` inputs, of any shapes and dtypes.

        Returns:
          A tuple of `n_out` of these values.
        """
        raise NotImplementedError

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """`pick` of the inputs; the state is unchanged."""
        return self.pick(tuple(inputs)), state


class Select(Rearrange):
    """Takes `n_in` values off the stack and puts back those at `indices`, in their order.

    ``Select([1, 0])`` swaps, ``Select([0, 0])`` duplicates, ``Select([], n_in=1)`` drops.

    Attributes:
      indices: positions from the top of the stack, 0 … n_in − 1.
      n_in: how many values to take; by default one more than the largest index.

    Raises:
      ValueError: if an index lies outside 0 … n_in − 1.
    """

    indices: tuple[int, ...]
    n_in: int | None = None  # type: ignore[assignment]

    position_wise = True
    n_out = property(lambda self: len(self.indices))

    def __post_init__(self) -> None:
        super().__post_init__()
        reach = max(self.indices, default=-1) + 1
        n_in = reach if self.n_in is None else self.n_in
        if min(self.indices, default=0) < 0 or reach > n_in or n_in < 0:
            raise ValueError(
                f'Select: indices {list(self.indices)} must lie between 0 and n_in - 1 = {n_in - 1}'
            )
        set_field(self, 'n_in', n_in)

    def pick(self, values: Arrays) -> Arrays:
        """The values at `indices`."""
        return tuple(values[i] for i in self.indices)

    def __repr__(self) -> str:
        reach = max(self.indices, default=-1) + 1
        more = [] if self.n_in == reach else [f'n_in={self.n_in}']
        return call_text('Select', [repr(list(self.indices)), *more, *named(self)])


class Dup(Rearrange):
    """Duplicates the top `n` values of the stack: (a, b) → (a, b, a, b) for n = 2."""

    n: Size = 1

    position_wise = True
    n_in = property(lambda self: self.n)
    n_out = property(lambda self: 2 * self.n)

    def pick(self, values: Arrays) -> Arrays:
        """The values, twice."""
        return values + values


class Drop(Rearrange):
    """Drops the top `n` values of the stack."""

    n: Size = 1

    position_wise = True
    n_in = property(lambda self: self.n)
    n_out = 0

    def pick(self, values: Arrays) -> Arrays:
        """An empty tuple."""
        return ()


class Swap(Rearrange):
    """Swaps the top two values of the stack."""

    position_wise = True
    n_in = 2
    n_out = 2

    def pick(self, values: Arrays) -> Arrays:
        """(a, b) → (b, a)."""
        return values[1], values[0]


class Multiply(Layer):
    """a · b, elementwise, for gates.

    Both have the same number of axes. One has the shape of the product. The other may have size 1
    along any axis, such as a gate (B, 1, D) that is the same at all positions.

    Raises:
      ValueError: when applied to other shapes.
    """

    position_wise = True
    n_in = 2

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(a, b) → a · b, in the dtype to which both promote."""
        a, b = inputs
        sizes = tuple(zip(a.shape, b.shape, strict=False))
        gates = [all(m in (n, 1) for n, m in sizes), all(n in (m, 1) for n, m in sizes)]
        if len(a.shape) != len(b.shape) or not any(gates):
            raise ValueError(
                f'Multiply: cannot multiply {tuple(a.shape)} by {tuple(b.shape)}: give a gate the '
                'shape of what it gates, or 1 along an axis'
            )
        return (a * b,), state


class Concatenate(Layer):
    """Joins `n_items` values along `axis`; the first is the top of the stack.

    Attributes:
      n_items: how many values to join.
      axis: the axis along which sizes are added; all others must agree.

    Raises:
      ValueError: when applied to values that differ along another axis, or lack this one.

    >>> from layercomb import tl, shape_dtype
    >>> tl.Concatenate().output_signature((shape_dtype((2, 3)), shape_dtype((2, 5))))
    (ShapeDtypeStruct(shape=(2, 8), dtype=float32),)
    """

    n_items: Size = 2
    axis: int = -1

    n_in = property(lambda self: self.n_items)
    position_wise = property(lambda self: self.axis not in POSITION_AXES)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """`n_items` arrays (…, Dᵢ, …) → (…, Σ Dᵢ, …), joined along `axis`."""
        self._check(inputs)
        return (jnp.concatenate(inputs, self.axis),), state

    def _check(self, inputs: Arrays) -> None:
        """Raises a ValueError unless shapes are alike but for the axis that is joined."""
        shapes, n = [tuple(x.shape) for x in inputs], len(inputs[0].shape)
        alike = -n <= self.axis < n and all(len(shape) == n for shape in shapes)
        if alike:
            at = self.axis % n
            alike = len({shape[:at] + shape[at + 1 :] for shape in shapes}) == 1
        if not alike:
            raise ValueError(
                f'Concatenate: cannot join {describe(inputs)} along axis {self.axis}: they must '
                'have that axis, and agree on all others'
            )


class Split(Layer):
    """Cuts a value into `n_items` equal parts along `axis`, the first on top of the stack.

    Attributes:
      n_items: how many parts.
      axis: the axis to cut; parts are 1 / `n_items` as long.

    Raises:
      ValueError: when applied to an axis whose length `n_items` does not divide.
    """

    n_items: Size = 2
    axis: int = -1

    n_out = property(lambda self: self.n_items)
    position_wise = property(lambda self: self.axis not in POSITION_AXES)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D, …) → `n_items` arrays (…, D / n_items, …), cut along `axis`."""
        (x,) = inputs
        check_axis('Split', x, self.axis)
        if x.shape[self.axis] % self.n_items:
            raise ValueError(
                f'Split: {self.n_items} does not divide the length {x.shape[self.axis]} of axis '
                f'{self.axis}'
            )
        return tuple(jnp.split(x, self.n_items, self.axis)), state
