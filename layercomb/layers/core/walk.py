"""`walk`: a model's layers, each with its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layercomb.layers.core.layer import Layer


def walk(
    net: Layer, path: str = '', *, enter: Callable[[Layer], bool] | None = None
) -> Iterator[tuple[str, Layer]]:
    """A layer and all layers inside, each with its path: outer before inner, in their order.

    Paths are those of the weights. So a wrapper and the layer inside share one, and a block under
    `Repeat` has one path for all n blocks. `Layer.children` says which layers a layer holds.

    Args:
      net: any layer.
      path: what paths begin with, '' for the whole model.
      enter: whether to look into a layer; the layer itself is yielded in any case.

    >>> from layercomb import tl, walk
    >>> net = tl.Serial(tl.Dense(8), tl.Repeat(tl.Residual(tl.Dense(8)), 2))
    >>> [path for path, layer in walk(net) if isinstance(layer, tl.Dense)]
    ['dense', 'residual/dense']
    """
    yield path, net
    if enter is None or enter(net):
        for key, layer in net.children:
            yield from walk(layer, joined(path, key), enter=enter)


def joined(path: str, key: str) -> str:
    """The path of a child: its parent's path, then its key; '' adds no level.

    >>> joined('', 'head'), joined('head', 'kernel'), joined('head', '')
    ('head', 'head/kernel', 'head')
    """
    return f'{path}/{key}' if path and key else path or key
