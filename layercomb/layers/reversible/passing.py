"""Whether a block hands on its context as it is: asked of the routes alone, without arrays."""

from __future__ import annotations

from typing import Any

from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.residual import Residual
from layercomb.layers.combinators.routing import Rearrange
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.combinators.side_by_side import Branch, Parallel
from layercomb.layers.core.layer import Layer
from layercomb.layers.reversible.rules import Rules


def passes_on(layer: Layer) -> bool:
    """Whether each value but the first goes through a layer unchanged: (x, *c) → (y, *c).

    A layer that does so in an unknown way, such as one of your own with several outputs, counts as
    changing them.

    >>> from layercomb import tl
    >>> masked = tl.Serial(tl.Select([0, 1, 1]), tl.Residual(tl.SelfAttention(2, masked=True)))
    >>> passes_on(masked), passes_on(tl.Dense()), passes_on(tl.Swap())
    (True, True, False)
    """
    given = tuple(range(layer.n_in))
    return layer.n_in == layer.n_out > 0 and routed(layer, given)[1:] == given[1:]


@Rules
def routed(layer: Layer, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Which of its inputs a layer puts back, and where; new objects stand for other outputs.

    Args:
      layer: any layer; by default all its outputs are new.
      values: anything, one for each input.
    """
    return tuple(object() for _ in range(layer.n_out))


@routed.register(Rearrange, of=('apply',))
def _picked(layer, values):
    return layer.pick(values)


@routed.register(Serial, of=('route',))
@routed.register(Residual, of=('route',))
@routed.register(Parallel, of=('route',))
@routed.register(Branch, of=('route',))
def _by_route(layer, values):
    return layer.route(lambda i, taken: routed(layer.sublayers[i], taken), values)


@routed.register(Remat)
@routed.register(Chunk)
def _inside(layer, values):
    return routed(layer.layer, values)


@routed.register(Repeat, of=())
def _each_time(layer, values):
    return (object(), *values[1:]) if passes_on(layer.layer) else routed.default(layer, values)


@routed.register(AssertShape)
def _between_checks(layer, values):
    return values if layer.changes_nothing else routed(layer.layer, values)
