"""`remat`: blocks that the backward pass computes again; weights and paths stay."""

from __future__ import annotations

from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.reversible.bidirectional import BidirectionalRepeat
from layercomb.layers.reversible.layers import Reversible
from layercomb.transforms.rewriting import rewrite


def remat(net: Layer) -> Layer:
    """The same model, whose training keeps the inputs of its blocks and computes the rest again.

    What each `Repeat` holds is put into a `Remat`; weights, state, paths, results and gradients
    stay what they are. The products of the forward pass come twice: a step takes up to a third
    longer if all weights train, and up to half as long again if adapters alone do. `reversible`
    keeps a few bits of each input, and changes training a little.

    Args:
      net: any layer with blocks in `Repeat`, such as those of `lc.models` and `lc.interop`.

    Raises:
      ValueError: if there are no such blocks.

    >>> from layercomb import tl, transforms
    >>> transforms.remat(tl.Serial(tl.Dense(8), tl.Repeat(tl.Residual(tl.Dense()), 12)))
    Serial(Dense(8), Repeat(Remat(Residual(Dense())), 12))
    """

    def one(layer: Layer) -> Layer:
        if type(layer) is not Repeat or isinstance(layer.layer, Remat):
            return layer
        return layer.replace(layer=Remat(layer.layer))

    if not any(type(layer) is Repeat for _, layer in walk(net)):
        raise ValueError(f'remat: {_why_not(net)}')
    return rewrite(net, one)


def _why_not(net: Layer) -> str:
    """Why no block of a model is computed again, and what to do about it."""
    name = type(net).__name__
    if any(isinstance(layer, (Reversible, BidirectionalRepeat)) for _, layer in walk(net)):
        return f'the blocks of this {name} are reversible, and keep nothing anyway: leave remat out'
    return (
        f'no blocks of this {name} are in a Repeat: build them as tl.Repeat(block, n), take the '
        'model as it was before transforms.unstack, or put what is to be computed again into a '
        'tl.Remat'
    )
