"""How far around a position layers look: `reach`, with a rule for each class of layers."""

from __future__ import annotations

import math
from typing import NamedTuple

from layercomb.layers.attention.cores import DotProductAttention, LocalAttention
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.residual import Residual
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Layer
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.reversible.rules import Rules
from layercomb.transforms.casting import Cast


class Reach(NamedTuple):
    """What a position's output depends on.

    Attributes:
      back: positions before it, at most.
      ahead: positions after it, at most.
      step: the first position of what the layer is given must be a multiple of this.
    """

    back: int = 0
    ahead: int = 0
    step: int = 1

    def then(self, other: Reach) -> Reach:
        """Of a layer behind the one that this is of."""
        step = math.lcm(self.step, other.step)
        return Reach(self.back + other.back, self.ahead + other.ahead, step)


@Rules
def reach(layer: Layer) -> Reach | None:
    """What an output of a layer depends on, and if it does not matter where the inputs begin.

    None for all positions, or for unknown ones; by default that is so unless a layer says
    ``position_wise = True``. Register a rule for a layer of your own that looks a few positions
    around by ``reach.register``.

    >>> from layercomb import tl
    >>> reach(tl.LocalSelfAttention(2, 64)), reach(tl.Dense()), reach(tl.SelfAttention(2))
    (Reach(back=64, ahead=0, step=64), Reach(back=0, ahead=0, step=1), None)
    """
    return Reach() if layer.position_wise is True else None


@reach.register(Serial)
@reach.register(Residual)
def _in_series(layer):
    return of_series(layer.sublayers)


@reach.register(MultiHead, of=('apply',))
def _of_its_parts(layer):
    """Projections are of single positions; the core looks around."""
    return of_series(layer.sublayers) if layer.n_in == 1 else None


@reach.register(RotaryPositions)
def _of_distances(layer):
    """Scores go by distances, so that positions may be counted from anywhere."""
    by_length = layer.scaling is not None and layer.scaling.by_length
    return None if by_length else Reach()


@reach.register(Cast)
@reach.register(Remat)
def _as_inside(layer):
    return reach(layer.layer)


@reach.register(LocalAttention)
def _chunks(layer):
    c = layer.chunk_len
    return Reach(layer.look_back * c, layer.look_ahead * c, c)


@reach.register(DotProductAttention)
def _window(layer):
    return None if layer.window is None or layer.relative else Reach(layer.window - 1)


def of_series(layers: tuple[Layer, ...]) -> Reach | None:
    """The reach of layers one after the other.

    Args:
      layers: in order.
    """
    made = Reach()
    for layer in layers:
        found = reach(layer)
        if found is None:
            return None
        made = made.then(found)
    return made
