"""`rewrite`: a function applied to every layer of a model, from the leaves up."""

from __future__ import annotations

from collections.abc import Callable

from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined


def rewrite(net: Layer, fn: Callable[..., Layer], *, paths: bool = False) -> Layer:
    """Replaces every layer by what `fn` returns for it, from the leaves up.

    Args:
      net: any layer.
      fn: gets a layer whose sublayers are rewritten already, and returns it or another one; with
        `paths`, ``fn(path, layer)``.
      paths: whether `fn` is given the path of each layer too, as of `walk`.

    >>> from layercomb import tl, transforms
    >>> def wider(layer):
    ...     return layer.replace(n_units=8) if isinstance(layer, tl.Dense) else layer
    >>> transforms.rewrite(tl.Serial(tl.Dense(4), tl.Relu()), wider)
    Serial(Dense(8), Relu())
    >>> def only_head(path, layer):
    ...     return wider(layer) if path == 'head' else layer
    >>> net = tl.Serial(tl.Dense(4), tl.Dense(4, name='head'))
    >>> transforms.rewrite(net, only_head, paths=True)
    Serial(Dense(4), Dense(8, name='head'))
    """

    def one(layer: Layer, path: str) -> Layer:
        children = layer.children
        if children:
            made = tuple(one(child, joined(path, key)) for key, child in children)
            layer = layer.with_sublayers(made)
        return fn(path, layer) if paths else fn(layer)

    return one(net, '')
