"""`quantize`: matrices of weights in few bits."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.quantized.matrix import SCALES
from layercomb.transforms.quantization.choosing import Bits, Choices, choices
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_axes
from layercomb.transforms.quantization.tied_rows import TiedRows
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


def quantize(
    net: Layer,
    weights: Tree,
    bits: Bits = 8,
    group_size: int = 64,
    *,
    smallest: int = 4096,
    activation_bits: int = 16,
    calibrate: Any = None,
    state: Tree | None = None,
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits, for decoding or evaluation.

    Kernels of dense layers and projections, tables of embeddings, units of sparse feed-forwards and
    features of multiplicative layers become int8, int4 or bfloat16. Biases, norms, positions,
    controllers and small weights stay as they are. A narrow matrix is stored with the summed axis
    last, so a kernel (D, F) becomes (F, D). Integers have a float32 scale for each group of a row,
    at ``…_scales``. All names are kept. The ends of a `Tied` model stay tied if both are stored
    alike, as the table of an embedding and a head that is its transpose. If not, they are quantized
    separately, and are no longer tied.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      bits: 8, 4, or 16 for bfloat16, which has no scales. With 4, tables of embeddings, and heads
        that are tied to one or have as many outputs as it has rows, are in 8 bits, as they lose
        most: llama.cpp does so too. Or a function from the path of a layer, such as ``'head'``, to
        its bits, None for what stays as it is. ``lambda path: 4`` is 4 bits everywhere. Give both
        ends of a tie the same, or they are no longer tied.
      group_size: how many weights share a scale. If it does not divide the length of a row, the
        nearest divisor, by ratio, is used.
      smallest: matrices with fewer weights stay as they are.
      activation_bits: to how many bits a CPU's kernels may round what they multiply: 16, an error
        of 3e-5 of a product; or 8, of 5e-3, or 2e-3 for bfloat16, with which prompts are read up to
        twice as fast.
      calibrate: batches of what the model reads, a few thousand tokens without padding: an iterable
        of arrays such as token ids (B, L), or of tuples if the model takes several inputs; 16,000
        tokens are better than 4,000. Each matrix of a dense layer or projection is then rounded for
        the inputs that it gets from them, through what is rounded before it, so that its products
        are nearest to what they were before anything was rounded. Tables that are looked up, sparse
        feed-forwards and multiplicative layers are rounded to the nearest, as all are without
        `calibrate`. A warning names what it does not reach. It runs the model twice, or three times
        if weights are tied or shared, and the result is the same each time.
      state: of the model, with `calibrate`; it is needed if there are running statistics.

    Returns:
      (layer, weights).

    Raises:
      TypeError: for batches that the model does not take.
      ValueError: for other bits; if values that come from `calibrate` are not finite; and when the
        gradient for a quantized weight is asked for.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net, weights = transforms.quantize(tl.Dense(64), {'kernel': jnp.ones((64, 64))})
    >>> net, weights['kernel'].dtype, weights['kernel_scales'].shape
    (Quantized(Dense(64)), dtype('uint32'), (64, 1))
    """
    if activation_bits not in (8, 16):
        raise ValueError(
            f'quantize: activation_bits={activation_bits} is not to be had: inputs are rounded to '
            '16 bits, or to 8'
        )
    chosen = choices(net, bits, group_size, smallest)
    if calibrate is None:
        net, weights = rounded(net, weights, chosen)
    else:
        from layercomb.transforms.quantization.calibration.calibrating import (
            calibrated,  # which rounds by this
        )

        leaves = (path for path, layer in walk(net) if not layer.children and narrow_axes(layer))
        if {chosen.bits(path) for path in leaves} <= {16, None}:
            raise ValueError(
                'quantize: bfloat16 has no scales, so calibrate= changes nothing: leave it out, or '
                'choose 8 or 4 bits'
            )
        net, weights = calibrated(net, weights, chosen, calibrate, state)
    if activation_bits == 16:
        return net, weights
    return rewrite(net, functools.partial(_rounding_inputs, activation_bits)), weights


def rounded(net: Layer, weights: Tree, chosen: Choices, path: str = '') -> tuple[Layer, Tree]:
    """The same model with matrices rounded to the nearest.

    Args:
      net, weights: of the layer at a path.
      chosen: what becomes of each leaf, by its path.
      path: of the layer in the whole model.

    Raises:
      ValueError: if it is quantized already.
    """
    if isinstance(net, Tied):
        inner, whole = rounded(net.layer, net.untied(weights), chosen, path)
        return tied_again(net, inner, whole)
    if isinstance(net, Quantized):
        raise ValueError('the model is quantized already: quantize the one that it was made from')
    if narrow_axes(bare(net)):
        quantized = chosen.leaf(net, path)
        made = weights if quantized is None else quantized.narrow(weights)
        return (net, weights) if made is weights or quantized is None else (quantized, made)
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in net.children:
            child, part = rounded(layer, weights.get(key, {}), chosen, joined(path, key))
            children.append(child)
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Wrapper):
        inner, weights = rounded(net.layer, weights, chosen, path)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def _rounding_inputs(bits: int, layer: Layer) -> Layer:
    is_one = isinstance(layer, Quantized) and layer.bits != 16
    return layer.replace(activation_bits=bits) if is_one else layer


def tied_again(net: Tied, inner: Layer, whole: Tree) -> tuple[Layer, Tree]:
    """A quantized model with one array for both ends of a tie, if they are stored alike.

    Args:
      net: the tied model before.
      inner: the quantized model without the tie.
      whole: its weights.
    """
    source, target = (_layouts(inner, whole, path) for path in (net.source, net.target))
    turned = net.via is jnp.transpose and (source, target) in TRANSPOSED
    is_narrow = set(source.values()) != {''}
    if not turned and (source != target or (net.via and is_narrow)):
        return inner, whole
    made = TiedRows if is_narrow and '' in source else Tied  # rows, or a layer of several weights
    whole = trees.drop(whole, net.target)
    if made is TiedRows and net.source + SCALES in trees.flatten(whole):
        whole = trees.drop(whole, net.target + SCALES)
    return made(inner, net.source, net.target, net.via, name=net.name), whole


# A table of rows and the kernel that is its transpose: both are kept as rows.
TRANSPOSED = (({'': 'oi'}, {'': 'io'}), ({'': 'io'}, {'': 'oi'}))


def _layouts(net: Layer, weights: Tree, at: str) -> dict[str, str]:
    """The axes of each narrow weight at or below a path, as of `Narrow`; '' for a wide one."""
    found = {
        path.removeprefix(at): ''
        for path in trees.flatten(weights)
        if path == at or path.startswith(f'{at}/')
    }
    for where, layer in walk(net):
        if isinstance(layer, Quantized):
            for rest, axes in narrow_axes(bare(layer)).items():
                below = joined(where, rest).removeprefix(at)
                if below in found and trees.get(weights, at + below).dtype != jnp.float32:
                    found[below] = axes
    return found
