"""Where a model has dense feed-forwards, and `MixtureFF`s in their places.

Here weights only move: units stay in their order, and there is no router yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.basic.activations import NAMES
from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.residual import Residual
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper, given_name, unwrapped, wrapped
from layercomb.layers.decoding.once import Once
from layercomb.layers.reversible.layers import ReversibleHalfResidual
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.shapes import nearest_divisor
from layercomb.transforms.casting import Cast
from layercomb.transforms.low_rank.layer import LowRank
from layercomb.transforms.quantization.layer import Quantized, bare
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_IN_SERIES = Serial, Residual, ReversibleHalfResidual  # their `layers` follow each other
# Around a matrix: those that a mixture can do without, and those that are refused by name.
_AROUND = AssertShape, Cast, Chunk, LowRank, Once, Quantized, Remat


class Sizes(NamedTuple):
    """Of all mixtures.

    Attributes:
      n_experts, n_chosen, n_shared: as of `MixtureFF`.
      where: a regular expression that the path of a feed-forward's first matrix must match; None
        for all.
    """

    n_experts: int
    n_chosen: int
    n_shared: int
    where: str | None = None


class _Found(NamedTuple):
    """A dense feed-forward among layers in series.

    Attributes:
      layers: numbers of the first and of the last one.
      activation: by name.
    """

    layers: tuple[int, int]
    activation: str


def placed(net: Layer, weights: Tree, sizes: Sizes, path: str = '') -> tuple[Layer, Tree]:
    """The model with mixtures, whose weights are the dense ones in their old order.

    Args:
      net, weights: of the layer at a path.
      sizes: of the mixtures, and which to make.
      path: of the layer in the whole model.

    Raises:
      ValueError: if a feed-forward cannot be one of these mixtures.
    """
    if isinstance(net, Wrapper):
        inner, own = placed(net.layer, weights, sizes, path)
        if isinstance(net, Tied):
            _check_tie(net, weights, own, path)
        return net.with_sublayers((inner, *net.sublayers[1:])), own
    if not isinstance(net, Combinator):
        return net, weights
    layers, parts = [], dict(weights)
    for key, layer in net.children:
        child, part = placed(layer, weights.get(key, {}), sizes, joined(path, key))
        layers.append(child)
        if part:
            parts[key] = part
    made = _with_children(net, tuple(layers), parts)
    return _in_series(*made, sizes, path) if isinstance(net, _IN_SERIES) else made


def _check_tie(net: Tied, before: Tree, after: Tree, path: str) -> None:
    """Raises a ValueError if weights that are used at a second place became a mixture's."""

    def shapes(weights: Tree) -> Tree:
        found = trees.flatten(weights).items()
        return {at: x.shape for at, x in found if f'{at}/'.startswith(f'{net.source}/')}

    if shapes(before) != shapes(after):
        target = joined(path, net.target)
        raise ValueError(
            f'sparsify: the feed-forward at {joined(path, net.source)!r} has weights that '
            f'{target!r} uses, too: leave it out by where=, or untie it first'
        )


def is_pending(layer: Layer, weights: Tree) -> bool:
    """Whether this is a mixture that `placed` made, which has no router yet."""
    return isinstance(bare(layer), MixtureFF) and 'router' not in weights


def _with_children(net: Combinator, layers: tuple[Layer, ...], parts: Tree) -> tuple[Any, Tree]:
    """A combinator with other layers, and their weights under their keys.

    A `Serial` that became a mixture is called after what it is, unless it had a name.
    """
    keys = [
        None if isinstance(bare(new), MixtureFF) and new != old else key
        for (key, old), new in zip(net.children, layers, strict=True)
    ]
    made = _keeping(net.with_sublayers, layers, keys)
    moved = dict(zip(net.keys, made.keys, strict=True))
    return made, {moved.get(key, key): part for key, part in parts.items()}


def _keeping(
    make: Callable[[tuple[Layer, ...]], Any], layers: Sequence[Layer], keys: Sequence[str | None]
) -> Any:
    """What `make` makes of layers, named so that they have the keys that are given."""
    found = make(tuple(layers)).keys
    return make(
        tuple(
            layer if key in (None, now) else layer.replace(name=key)
            for layer, key, now in zip(layers, keys, found[: len(layers)], strict=True)
        )
    )


def _in_series(net: Any, weights: Tree, sizes: Sizes, path: str) -> tuple[Layer, Tree]:
    """Layers in series with each feed-forward among them replaced."""
    start = 0
    while True:
        found = _next(net, start, sizes, path)
        if found is None:
            return net, weights
        first, last = found.layers
        start = first + 1
        keys, inside = net.keys[first : last + 1], net.layers[first : last + 1]
        ours = [weights.get(key, {}) for key in keys]
        made, own = _mixture(inside, ours, found.activation, sizes, joined(path, keys[0]))
        if made is None:  # it changes the width, or is not wider inside
            continue
        if type(net) is Serial and len(net.layers) == len(inside):
            return made.replace(name=given_name(net)), own
        net, weights = _replaced(net, weights, found.layers, made, own)


def _replaced(
    net: Any, weights: Tree, span: tuple[int, int], made: Layer, own: Tree
) -> tuple[Any, Tree]:
    """A combinator with one layer in the place of several; the others keep their keys."""
    first, last = span
    old = net.keys[: len(net.layers)]
    layers = [*net.layers[:first], made, *net.layers[last + 1 :]]
    keys = [*old[:first], None, *old[last + 1 :]]
    changed = _keeping(lambda given: net.replace(layers=given), layers, keys)
    parts = {key: part for key, part in weights.items() if key not in old[first : last + 1]}
    return changed, {**parts, changed.keys[first]: own}


def _next(net: Any, start: int, sizes: Sizes, path: str) -> _Found | None:
    """The first feed-forward that is wanted, of the layers in series from `start` on."""
    for i in range(start, len(net.layers)):
        found = _at(net.layers[i : i + 4])
        if found and (sizes.where is None or re.search(sizes.where, joined(path, net.keys[i]))):
            (_, n), name = found
            return _Found((i, i + n), name)
    return None


def feed_forwards(net: Layer) -> list[str]:
    """The paths of the first matrices of all that may be dense feed-forwards."""
    return [
        joined(path, layer.keys[i])
        for path, layer in walk(net)
        if isinstance(layer, _IN_SERIES)
        for i in range(len(layer.layers))
        if _at(layer.layers[i : i + 4])
    ]


def _at(layers: Sequence[Layer]) -> _Found | None:
    """A feed-forward that begins with the first layer."""
    kinds = [_inside(layer) for layer in layers]
    if type(kinds[0]) is GatedDense:
        name, last = kinds[0].activation, 1
    elif type(kinds[0]) is Dense and len(kinds) > 1:
        plain = kinds[1].replace(name=None)
        names = [key for key, kind in NAMES.items() if type(plain) is kind and plain == kind()]
        if not names:
            return None
        name, last = names[0], 2
    else:
        return None
    last += len(kinds) > last and isinstance(kinds[last], Dropout)
    if len(kinds) <= last or type(kinds[last]) is not Dense:
        return None
    return _Found((0, last), name)


def _inside(layer: Layer) -> Layer:
    """The layer inside wrappers that compute the same; the whole if one computes another thing."""
    around = list(wrapped(layer))[:-1]
    return unwrapped(layer) if all(type(each) in _AROUND for each in around) else layer


def _mixture(
    layers: Sequence[Layer], weights: Sequence[Tree], activation: str, sizes: Sizes, path: str
) -> tuple[Any, Tree]:
    """The mixture of a feed-forward, and its weights; None if widths are those of something else.

    Args:
      layers, weights: of the feed-forward.
      activation: by name.
      sizes: of the mixture.
      path: of its first matrix, for errors.
    """
    _check_plain(layers, path)
    first, last = weights[0], weights[-1]
    gated = isinstance(unwrapped(layers[0]), GatedDense)
    matrices = ('gate', 'up') if gated else ('kernel',)
    if not first.keys() >= {*matrices} or 'kernel' not in last:
        raise ValueError(
            f'sparsify: the feed-forward at {path!r} has no weights of its own, they are tied to '
            'those of another layer: leave it out by where=, or untie it first'
        )
    if 'up_bias' in first:
        raise ValueError(
            f'sparsify: the GatedDense at {path!r} has a bias beside its gate, for which MixtureFF '
            'has no place: leave it out by where='
        )
    kernel, back = first[matrices[0]], last['kernel']
    if not kernel.shape[-2] == back.shape[-1] < kernel.shape[-1]:
        return None, {}
    d_ff = kernel.shape[-1]
    if d_ff % sizes.n_experts:
        raise ValueError(
            f'sparsify: n_experts={sizes.n_experts} does not divide the {d_ff} units of the '
            f'feed-forward at {path!r}: use n_experts={nearest_divisor(d_ff, sizes.n_experts)}'
        )
    own: Tree = {'in': {'kernel_transposed': jnp.swapaxes(kernel, -1, -2)}, 'out': {'kernel': back}}
    if gated:
        own['up'] = {'kernel_transposed': jnp.swapaxes(first['up'], -1, -2)}
    use_bias = 'bias' in first or 'bias' in last
    if use_bias:
        zeros = jnp.zeros((*kernel.shape[:-2], d_ff), kernel.dtype)
        own['in']['bias'] = first.get('bias', zeros)
        own['out']['bias'] = last.get('bias', jnp.zeros_like(back[..., 0, :]))
    made: Layer = MixtureFF(d_ff, *sizes[:3], activation=activation, gated=gated, use_bias=use_bias)
    casts = [layer for layer in wrapped(layers[0]) if isinstance(layer, Cast)]
    return (Cast(made, casts[0].dtype) if casts else made), own


def _check_plain(layers: Sequence[Layer], path: str) -> None:
    """Raises a ValueError for narrow matrices, and for ones with adapters."""
    kinds = [each for layer in layers for each in wrapped(layer)]
    if any(isinstance(each, LowRank) for each in kinds):
        raise ValueError(
            f'sparsify: the feed-forward at {path!r} has adapters: merge them first, with '
            'transforms.merge(net, weights)'
        )
    if any(isinstance(each, Quantized) for each in kinds):
        raise ValueError(
            f'sparsify: the feed-forward at {path!r} has narrow weights, which cannot be trained '
            "afterwards: load the model with dtype='float32', or take the one that was quantized, "
            'and quantize the sparse one'
        )
