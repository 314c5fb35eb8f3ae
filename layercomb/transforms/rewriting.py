"""`rewrite`: a function applied to every layer of a model, from the leaves up."""

from __future__ import annotations

from collections.abc import Callable

from layercomb.layers.core.layer import Layer


def rewrite(net: Layer, fn: Callable[[Layer], Layer]) -> Layer:
    """Applies `fn` to every layer, from the leaves up, and puts its results in their places.

    Args:
      net: any layer.
      fn: gets a layer whose sublayers are rewritten already, and returns it or another one.

    >>> from layercomb import tl, transforms
    >>> def wider(layer):
    ...     return layer.replace(n_units=8) if isinstance(layer, tl.Dense) else layer
    >>> transforms.rewrite(tl.Serial(tl.Dense(4), tl.Relu()), wider)
    Serial(Dense(8), Relu())
    """
    if net.sublayers:
        net = net.with_sublayers(tuple(rewrite(layer, fn) for layer in net.sublayers))
    return fn(net)
