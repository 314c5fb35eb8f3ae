"""`rewrite_leaves`: a function applied to every leaf with matrices, in what it is wrapped in."""

from __future__ import annotations

from collections.abc import Callable

from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined
from layercomb.transforms.quantization.layer import bare, narrow_axes


def rewrite_leaves(net: Layer, fn: Callable[[str, Layer], Layer]) -> Layer:
    """Replaces every leaf that may be narrow, with the `Cast` and `Quantized` around it.

    Args:
      net: any layer.
      fn: gets the path of a leaf and the outermost of these layers, and returns it or another one.

    >>> from layercomb import tl, transforms
    >>> net = tl.Serial(transforms.Cast(tl.Dense(4)), tl.Relu())
    >>> rewrite_leaves(net, lambda path, layer: tl.Remat(layer))
    Serial(Remat(Cast(Dense(4))), Relu())
    """

    def one(layer: Layer, path: str) -> Layer:
        if narrow_axes(bare(layer)):
            return fn(path, layer)
        children = layer.children
        if not children:
            return layer
        return layer.with_sublayers(tuple(one(each, joined(path, key)) for key, each in children))

    return one(net, '')
