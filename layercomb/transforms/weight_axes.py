"""`axes`: what each axis of each weight of a model is."""

from __future__ import annotations

from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.axes import Axes, undeclared
from layercomb.transforms.quantization.layer import Quantized
from layercomb.trees import Tree


def axes(net: Layer, weights: Tree) -> dict[str, Axes]:
    """The axes of each weight by path, as the layers declare them in `weight_axes`.

    Axes that `Repeat` stacked are counted apart. For a weight that its layer does not declare,
    `is_declared` of its axes is False.

    Args:
      net: any layer.
      weights: its weights or a part of them, or a tree like them (gradients); arrays or
        `jax.ShapeDtypeStruct`. Leaves of another kind, such as None, are left out.

    Raises:
      TypeError: if `net` is no layer.
      ValueError: for a weight that no layer of the model has, or one that has another number of
        axes than its layer declares.

    >>> import jax
    >>> import layercomb as lc
    >>> from layercomb import tl
    >>> net = tl.Repeat(tl.Dense(), 3)
    >>> weights, _ = net.init((lc.shape_dtype((2, 4)),), jax.random.key(0))
    >>> lc.axes(net, weights)
    {'bias': Axes(spec='->F', stacked=1), 'kernel': Axes(spec='D->F', stacked=1)}
    """
    if not isinstance(net, Layer):
        raise TypeError(f'axes: the first argument is a layer, got {net!r}: give e.g. model.layer')
    leaves = {path: x for path, x in trees.flatten(weights).items() if hasattr(x, 'shape')}
    return {path: _axes(net, path, leaf) for path, leaf in leaves.items()}


def holder(net: Layer, path: str) -> tuple[Layer, str, int]:
    """The layer that makes a weight, the weight's path in it, and how many axes are stacked.

    For a path that does not exist, it is the last combinator on the way.

    Args:
      net: any layer.
      path: of a weight.
    """
    layer, rest, stacked = net, path, 0
    while rest not in layer.weight_axes:
        if isinstance(layer, Combinator):
            key, _, inside = rest.partition('/')
            if key not in layer.keys or not inside:
                break
            layer, rest = layer.sublayers[layer.keys.index(key)], inside
        elif isinstance(layer, Quantized) or not layer.children:
            break
        else:
            key, _, inside = rest.partition('/')
            children = dict(layer.children)
            if inside and key in children:
                layer, rest = children[key], inside
            elif '' in children:
                stacked += layer.stacked_axes if isinstance(layer, Wrapper) else 0
                layer = children['']
            else:
                break
    return layer, rest, stacked


def declared(net: Layer, path: str, leaf: Any) -> str | None:
    """The axes that are declared for a weight, such as 'D->F'; None if there are none.

    Args:
      net: any layer.
      path: of the weight.
      leaf: the weight, an array or `jax.ShapeDtypeStruct`.
    """
    layer, rest, _ = holder(net, path)
    if isinstance(layer, Quantized):
        return layer.narrow_spec(rest, leaf) or declared(layer.layer, rest, leaf)
    return layer.weight_axes.get(rest)


def _axes(net: Layer, path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> Axes:
    layer, rest, stacked = holder(net, path)
    spec = declared(net, path, leaf)
    if spec is None and isinstance(layer, Combinator):
        raise ValueError(
            f'the model has no weight {path!r}: give the layer whose weights these are, or declare '
            f'{rest!r} in weight_axes of {type(layer).__name__}'
        )
    ndim = len(leaf.shape)
    found = undeclared(ndim, stacked) if spec is None else Axes(spec, stacked)
    if found.ndim != ndim:
        raise ValueError(
            f'{path!r} has {ndim} axes, {tuple(leaf.shape)}; {type(layer).__name__} declares '
            f'{spec!r} and Repeat stacks {stacked}: mend weight_axes of the class, or give a '
            'wrapper that stacks weights stacked_axes = 1'
        )
    return found
