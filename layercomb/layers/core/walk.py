"""`walk`: a model's layers, each with its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from layercomb.layers.core.layer import Layer


def walk(
    net: Layer, path: str = '', *, enter: Callable[[Layer], bool] | None = None
) -> Iterator[tuple[str, Layer]]:
    """A layer and all layers inside, each with its path, from the outside in and in their order.

    Paths are those of the weights, so a wrapper and what it is around have the same one, and a
    block under `Repeat` has one for all its n times. Whatever looks for something in a model goes
    through here; how a layer holds others is said by its `Layer.children`.

    Args:
      net: any layer.
      path: what paths begin with, '' for the whole model.
      enter: says of a layer, which is yielded in any case, whether to look into it.

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
    """The path of a child, of that of the layer that holds it; '' adds no level.

    >>> joined('', 'head'), joined('head', 'kernel'), joined('head', '')
    ('head', 'head/kernel', 'head')
    """
    return f'{path}/{key}' if path and key else path or key
