"""`merge`: adapters added to the matrices that they stand beside."""

from __future__ import annotations

from layercomb import trees
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper, wrapped
from layercomb.layers.quantized.adapted import Adapted
from layercomb.transforms.low_rank.layer import LowRank
from layercomb.transforms.quantization.holding import hold_wide
from layercomb.transforms.quantization.layer import Quantized
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


def merge(net: Layer, weights: Tree, *, keep_narrow: bool = False) -> tuple[Layer, Tree]:
    """The model with its adapters added to its matrices: plain layers again, W + s A B.

    A head that had an adapter is no longer tied to the table of the embedding. A model without
    adapters is returned as it is.

    Args:
      net: a model that `lora` made, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      keep_narrow: whether narrow matrices with adapters are rounded again to as many bits as they
        had, which loses a part of what the adapters say; by default they become float32. Others
        stay as they are.

    Returns:
      (layer, weights).

    >>> import jax
    >>> from layercomb import shape_dtype, tl, transforms
    >>> net = transforms.LowRank(tl.Dense(3))
    >>> weights, _ = net.init(shape_dtype((2, 4)), jax.random.key(0))
    >>> net, weights = transforms.merge(net, weights)
    >>> net, sorted(weights)
    (Dense(3), ['bias', 'kernel'])
    """
    if isinstance(net, LowRank):
        return _merged(net, weights, keep_narrow)
    if isinstance(net, Tied):
        inner, whole = merge(net.layer, net.untied(weights), keep_narrow=keep_narrow)
        if _ends_are_adapted(net):
            return inner, whole
        return net.with_sublayers((inner,)), net.tied(whole)
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in net.children:
            child, part = merge(layer, weights.get(key, {}), keep_narrow=keep_narrow)
            children.append(child)
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Wrapper):
        inner, weights = merge(net.layer, weights, keep_narrow=keep_narrow)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def _merged(net: LowRank, weights: Tree, keep_narrow: bool) -> tuple[Layer, Tree]:
    """A leaf and its weights with the adapters in its matrices."""
    wide, rest = net.each(Adapted.wide, weights), net.others(weights)
    for path, matrix in wide.items():
        rest = trees.put(rest, path, matrix)
    plain = net.plain()
    narrow = [layer for layer in wrapped(plain) if isinstance(layer, Quantized)]
    if narrow and keep_narrow:
        return plain, narrow[0].narrow(rest)
    leaf = hold_wide(plain)
    return leaf.replace(name=plain.name or leaf.name), rest


def _ends_are_adapted(net: Tied) -> bool:
    """Whether one of the two weights of a tie is a matrix with an adapter."""
    leaves = {path for path, layer in walk(net.layer) if isinstance(layer, LowRank)}
    return any(end.rpartition('/')[0] in leaves for end in (net.source, net.target))
