"""Models whose weights arrive narrow, from a file, or go out so: the description alone.

`quantize` rounds weights and wraps the layers that hold them. Here the weights are narrow already:
`hold_narrow` wraps the layers, and `hold_wide` takes the wrappers off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined
from layercomb.layers.core.wrapper import Wrapper
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_axes
from layercomb.transforms.quantization.tied_rows import TiedRows
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tying import Tied


class Kind(NamedTuple):
    """How a leaf keeps its matrices.

    Attributes:
      bits: 8, 4, or 16 for bfloat16.
      group_size: how many weights share a scale.
      minima: whether they share a minimum, too.
      half_scales: whether scales and minima are float16.
    """

    bits: int
    group_size: int
    minima: bool = False
    half_scales: bool = False


def hold_narrow(net: Layer, stored: Mapping[str, Kind | tuple[int, int]]) -> Layer:
    """The same model with layers that hold narrow weights.

    Args:
      net: any layer.
      stored: for each leaf to change, by its path, its kind, or bits and group size alone. Both
        ends of a `Tied` model, or neither.

    Returns:
      A layer whose weights have the shapes that `quantize` gives them.

    >>> from layercomb import tl
    >>> hold_narrow(tl.Serial(tl.Dense(8), tl.Relu()), {'dense': (8, 32)})
    Serial(Quantized(Dense(8), group_size=32, smallest=1), Relu())
    """
    return _wrapped(net, '', stored)


def _wrapped(net: Layer, path: str, stored: Mapping[str, Kind | tuple[int, int]]) -> Layer:
    if narrow_axes(bare(net)):
        if path not in stored:
            return net
        return Quantized(net, smallest=1, **Kind(*stored[path])._asdict())
    children = [_wrapped(layer, joined(path, key), stored) for key, layer in net.children]
    if isinstance(net, (Combinator, Wrapper)) and children:
        net = net.with_sublayers(tuple(children))
    if isinstance(net, Tied) and net.source.rpartition('/')[0] in stored:
        return TiedRows(net.layer, net.source, net.target, net.via, name=net.name)
    return net


def hold_wide(net: Layer) -> Layer:
    """The same model with layers that hold wide weights: the inverse of `hold_narrow`.

    Args:
      net: any layer, also one that `quantize` made.

    >>> from layercomb import tl
    >>> hold_wide(hold_narrow(tl.Serial(tl.Dense(8)), {'dense': (8, 32)}))
    Serial(Dense(8))
    """

    def one(layer: Layer) -> Layer:
        if isinstance(layer, Quantized):
            return layer.layer
        if isinstance(layer, TiedRows):
            return Tied(layer.layer, layer.source, layer.target, layer.via, name=layer.name)
        return layer

    return rewrite(net, one)
