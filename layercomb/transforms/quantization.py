"""`quantize`: matrices of weights in few bits."""

from __future__ import annotations

import math

import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Size
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.quantized.matrix import BITS, Narrow, can_narrow, constant, narrow
from layercomb.shapes import is_float
from layercomb.transforms.casting import Cast
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


class Quantized(Wrapper):
    """A leaf whose matrices are kept in few bits; `quantize` makes it, with the weights.

    What was ``kernel`` is integers under the same name, and ``kernel_scales`` beside it; bfloat16
    has no scales. Its gradient is for its inputs, and for the weights that are not narrow.

    Attributes:
      layer: a leaf, or a `Cast` around one.
      bits: 8, 4, or 16 for bfloat16.
      group_size: how many weights share a scale, about: see `quantize`.
      smallest: matrices with fewer weights stay as they are.

    Raises:
      ValueError: for other bits.
      TypeError: if the layer has no matrices.
    """

    carries_counted = True

    bits: int = 8
    group_size: Size = 64
    smallest: Size = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ValueError(
                f'Quantized: bits={self.bits} is not to be had: choose 8 or 4, or 16 for bfloat16'
            )
        if not bare(self.layer).matrices:
            raise TypeError(
                f'Quantized holds a leaf with matrices, not a {type(self.layer).__name__}: '
                'transforms.quantize(net, weights) reaches every one inside'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
        weights, state = self.layer.init(signature, rng, mode)
        return self.narrow(weights), state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(self._seen(weights), state, inputs, rng=rng, mode=mode)

    def narrow(self, weights: Tree) -> Tree:
        """The leaf's weights, possibly stacked on leading axes, with its large matrices narrow."""
        for path, axes in bare(self.layer).matrices.items():
            wide = trees.get(weights, path)
            shape = wide.shape[wide.ndim - len(axes) :]
            if math.prod(shape) < self.smallest or not can_narrow(shape, axes, self.bits):
                continue
            values, scales = narrow(wide, axes, self.bits, self.group_size)
            weights = trees.put(trees.drop(weights, path), path, values)
            if scales is not None:
                weights = trees.put(weights, path + _SCALES, scales)
        return weights

    def _seen(self, weights: Tree) -> Tree:
        """The weights as the leaf sees them, each narrow matrix as one `Narrow`."""
        for path, axes in bare(self.layer).matrices.items():
            values, scales = trees.get(weights, path), None
            if values.dtype == jnp.float32:
                continue
            if is_float(values):
                values = constant(values)
            else:
                scales = constant(trees.get(weights, path + _SCALES))
                weights = trees.drop(weights, path + _SCALES)
            matrix = Narrow(values, scales, axes, self.bits)
            weights = trees.put(trees.drop(weights, path), path, matrix)
        return weights


_SCALES = '_scales'


def bare(layer: Layer) -> Layer:
    """The leaf that a model computes, out of what says in which precision: `Cast`, `Quantized`."""
    return bare(layer.layer) if isinstance(layer, (Cast, Quantized)) else layer


def quantize(
    net: Layer, weights: Tree, bits: int = 8, group_size: int = 64, *, smallest: int = 4096
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits, to be decoded or evaluated.

    Kernels of dense layers and projections, tables of embeddings, units of sparse feed-forwards and
    features of multiplicative layers become int8, int4 or bfloat16; biases, norms, positions,
    controllers and whatever is small stay as they are. Narrow matrices are rows along what a
    product sums over, a kernel (D, F) being (F, D), and integers have a float32 scale for each
    group of a row, at ``…_scales``; all names are kept. Both ends of a `Tied` model are
    quantized, each along its own sum, and it is tied no longer.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      bits: 8, 4, or 16 for bfloat16, which has no scales.
      group_size: how many weights share a scale. Where it does not divide what there is, the
        divisor nearest to it, by ratio, takes its place.
      smallest: matrices with fewer weights stay as they are.

    Raises:
      ValueError: for other bits; and when the gradient for a quantized weight is asked for.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net, weights = transforms.quantize(tl.Dense(64), {'kernel': jnp.ones((64, 64))})
    >>> net, weights['kernel'].dtype, weights['kernel_scales'].shape
    (Quantized(Dense(64)), dtype('int8'), (64, 1))
    """
    if isinstance(net, Tied):
        return quantize(net.layer, net.untied(weights), bits, group_size, smallest=smallest)
    if isinstance(net, Quantized):
        raise ValueError('the model is quantized already: quantize the one that it was made from')
    if bare(net).matrices:
        quantized = Quantized(net, bits, group_size, smallest)
        made = quantized.narrow(weights)
        return (net, weights) if made is weights else (quantized, made)
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in zip(net.keys, net.sublayers, strict=True):
            child, part = quantize(layer, weights.get(key, {}), bits, group_size, smallest=smallest)
            children.append(child)
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Wrapper):
        inner, weights = quantize(net.layer, weights, bits, group_size, smallest=smallest)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights
