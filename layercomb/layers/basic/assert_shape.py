"""`AssertShape`: expected shapes, written in the model and checked."""

from __future__ import annotations

import re
from typing import Any

import jax

from layercomb.layers.combinators.routing import Rearrange
from layercomb.layers.core.checks import check_inputs
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import call_text, named, set_field, show
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.shapes import Signature, describe
from layercomb.trees import Tree


class AssertShape(Wrapper, init=False):
    """Checks the shapes of values, or of a layer's inputs and outputs, and changes nothing.

    ``AssertShape('bld,b')`` takes two values off the stack and puts them back.
    ``AssertShape('bld,b->bd', layer)`` applies the layer, and checks its two inputs and its output.
    It adds no level to the paths of the weights, and costs nothing at run time: shapes are known
    when a function is compiled. It works wherever its layer does, in a reversible stack too.

    A letter is an axis, and equal letters are equal sizes; a digit is an axis of that size; ``...``
    is any number of axes, the same sizes everywhere; commas separate values; an empty value is a
    scalar. Sizes of letters are not kept between calls, because lengths change in ``PREDICT``.

    Attributes:
      spec: the shapes.
      layer: the layer to check; None checks values alone.

    Raises:
      ValueError: for a spec that cannot be read, or describes another number of values than the
        layer has; in `init` and `apply`, for shapes that do not fit.

    >>> from layercomb import tl
    >>> tl.AssertShape('bld->bd', tl.Mean())
    AssertShape('bld->bd', Mean())
    >>> tl.AssertShape('bld,b').n_in
    2
    """

    carries_counted = True

    spec: str

    def __init__(self, spec: str, layer: Layer | None = None, *, name: str | None = None):
        set_field(self, 'spec', spec)
        if layer is None:
            written = str(spec)
            if '->' in written:
                raise ValueError(
                    f'AssertShape: {spec!r} has an arrow, so it is about a layer: give the layer, '
                    f'AssertShape({spec!r}, layer), or check values alone, '
                    f'AssertShape({written.split("->")[0]!r})'
                )
            layer = _Unchanged(written.count(',') + 1)
        set_field(self, 'layer', layer)
        set_field(self, 'name', name)
        self.__post_init__()

    n_in = property(lambda self: self.layer.n_in)
    n_out = property(lambda self: self.layer.n_out)
    position_wise = property(of_sublayers)

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = self.spec.replace(' ', '')
        before, arrow, after = spec.partition('->')
        if not self.changes_nothing and not arrow:
            raise ValueError(
                f'AssertShape: {self.spec!r} says nothing of outputs: write inputs->outputs, such '
                "as 'bld->bd'"
            )
        sides = [('takes', before, self.layer.n_in), ('puts back', after, self.layer.n_out)]
        for verb, side, n in sides[: 2 if arrow else 1]:
            specs = _specs(side, n)
            for one in specs:
                if not re.fullmatch(r'[A-Za-z0-9]*(\.\.\.[A-Za-z0-9]*)?', one):
                    raise ValueError(
                        f'AssertShape: {self.spec!r} cannot be read at {one!r}: a value is '
                        "letters, digits and at most one '...'; values are separated by ','"
                    )
            if len(specs) != n:
                raise ValueError(
                    f'AssertShape: {self.spec!r} describes {_many(len(specs), "value")} that '
                    f'{type(self.layer).__name__} {verb}, there {"is" if n == 1 else "are"} {n}'
                )

    @property
    def changes_nothing(self) -> bool:
        """Whether it checks values alone, without a layer."""
        return isinstance(self.layer, _Unchanged)

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields."""
        return type(self)(**{'spec': self.spec, 'layer': self.layer, 'name': self.name, **changes})

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The inner layer's weights and state."""
        return self.init_with_outputs(tuple(signature), rng, mode)[1:]

    def init_with_outputs(self, signature: Signature, rng: Any, mode: Mode) -> Any:
        """The inner layer's outputs' signature, weights and state, with all shapes checked."""
        check_inputs(self, signature)
        sizes = self.check_before(signature)
        outputs, weights, state = self.layer.init_with_outputs(signature, rng, mode)
        self.check_after(outputs, sizes)
        return outputs, weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Checks the inputs, applies the layer, and checks the outputs."""
        sizes = self.check_before(inputs)
        outputs, state = self.layer.apply(weights, state, inputs, rng=rng, mode=mode)
        self.check_after(outputs, sizes)
        return outputs, state

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """The inner layer's; without a layer, the outputs and cotangents unchanged."""
        if self.changes_nothing:
            return tuple(outputs), tuple(cts), {}
        layer: Any = self.layer
        return layer.reverse_and_grad(
            weights, state, outputs, cts, rng=rng, mode=mode, state_cts=state_cts
        )

    def __repr__(self) -> str:
        parts = [repr(self.spec)]
        parts += [] if self.changes_nothing else [show(self.layer)]
        return call_text('AssertShape', [*parts, *named(self)])

    def check_before(self, values: Any) -> dict[str, Any]:
        """Checks the inputs, arrays or signatures, and returns the sizes of letters.

        Raises:
          ValueError: if the inputs do not fit the shapes.
        """
        sizes: dict[str, Any] = {}
        self._check('inputs', self.spec.partition('->')[0], values, sizes)
        return sizes

    def check_after(self, values: Any, sizes: dict[str, Any]) -> None:
        """Checks the outputs, arrays or signatures, given the sizes of letters in the inputs.

        Raises:
          ValueError: if the outputs do not fit the shapes.
        """
        if '->' in self.spec:
            self._check('outputs', self.spec.partition('->')[2], values, sizes)

    def _check(self, which: str, side: str, values: Any, sizes: dict[str, Any]) -> None:
        """Raises a ValueError unless values fit; writes what letters mean into `sizes`."""
        if self.changes_nothing:
            which = 'values'
        specs = _specs(side.replace(' ', ''), len(values))
        for i, (spec, x) in enumerate(zip(specs, values, strict=True)):
            wrong = _misfit(spec, tuple(x.shape), sizes)
            if wrong:
                of = '' if which == 'values' else f' of {type(self.layer).__name__}'
                raise ValueError(
                    f'AssertShape({self.spec!r}): the {which}{of} are {describe(values)}; '
                    f'value {i + 1} should fit {spec!r}: {wrong}'
                )


class _Unchanged(Rearrange):
    """Passes `n` values on; it stands in an `AssertShape` that is around nothing."""

    n: int

    position_wise = True
    n_in = property(lambda self: self.n)
    n_out = property(lambda self: self.n)

    @property
    def _class_name(self) -> str:
        return 'AssertShape'

    def pick(self, values: Arrays) -> Arrays:
        return values


def _specs(side: str, n: int) -> list[str]:
    """The shapes of `n` values; of none, if there is none and nothing is written."""
    return [] if n == 0 and not side else side.split(',')


def _many(n: int, one: str, several: str | None = None) -> str:
    return f'{n} {one if n == 1 else several or one + "s"}'


def _misfit(spec: str, shape: tuple[int, ...], sizes: dict[str, Any]) -> str:
    """What is wrong with a shape, in words; empty if nothing is. Fills `sizes`."""
    before, dots, after = spec.partition('...')
    n = len(before) + len(after)
    if len(shape) < n or (len(shape) > n and not dots):
        least, are = 'at least ' if dots else '', 'is' if len(shape) == 1 else 'are'
        return f'there should be {least}{_many(n, "axis", "axes")}, there {are} {len(shape)}'
    stop = len(shape) - len(after)
    pairs: list[Any] = [*zip(before, shape, strict=False), *zip(after, shape[stop:], strict=True)]
    pairs += [('...', shape[len(before) : stop])] if dots else []
    for letter, size in pairs:
        wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if size != wanted:
            return f'{letter!r} is {size} and should be {wanted}'
    return ''
