"""Models whose weights arrive narrow, from a file, or go out so: the description alone.

`quantize` rounds weights and wraps the layers that hold them. Here the weights are narrow already:
`hold_narrow` wraps the layers, and `hold_wide` takes the wrappers off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined
from layercomb.layers.core.wrapper import Wrapper
from layercomb.transforms.quantization import SCALES, Quantized, bare, narrow_axes
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


class TiedRows(Tied):
    """A `Tied` model whose two ends are narrow: they share the rows, and the scales of the rows.

    A table (V, D) and a kernel (D, V) are stored alike when they are narrow, as V rows of D, so
    both ends read one array, and nothing is transposed.

    Attributes:
      layer: the model.
      source: the path of the weight that exists, e.g. ``'embedding/table'``.
      target: the path of the weight that it is too, e.g. ``'head/kernel'``.
      via: what made the one of the other when they were wide; it is not called.
    """

    def init_with_outputs(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        """As of `Tied`; the scales at `target` are left out too."""
        outputs, weights, state = super().init_with_outputs(signature, rng, mode)
        scales = self.target + SCALES
        return outputs, trees.drop(weights, scales) if _has(weights, scales) else weights, state

    def misfit(self, whole: Tree) -> str | None:
        """Why the rows at `source` cannot be used at `target`; None if they can.

        Args:
          whole: the weights of the model without the tie.

        Raises:
          KeyError: if one of the paths does not exist.
        """
        ends = [trees.get(whole, path) for path in (self.source, self.target)]
        source, target = (f'{end.dtype}{list(end.shape)}' for end in ends)
        if source == target:
            return None
        return (
            f'{self.source!r} is {source} and {self.target!r} is {target}: both must be narrow, '
            'in as many bits'
        )

    def untied(self, weights: Tree) -> Tree:
        """The weights of the model without the tie: rows and scales are filled in."""
        whole = trees.put(weights, self.target, trees.get(weights, self.source))
        if not _has(weights, self.source + SCALES):
            return whole
        return trees.put(whole, self.target + SCALES, trees.get(weights, self.source + SCALES))


def hold_narrow(net: Layer, stored: Mapping[str, tuple[int, int]]) -> Layer:
    """The same model with layers that hold narrow weights.

    Args:
      net: any layer.
      stored: for each leaf to change, by its path, how many bits (8, 4, or 16 for bfloat16) and
        how many weights share a scale. Both ends of a `Tied` model, or neither.

    Returns:
      A layer whose weights have the shapes that `quantize` gives them.

    >>> from layercomb import tl
    >>> hold_narrow(tl.Serial(tl.Dense(8), tl.Relu()), {'dense': (8, 32)})
    Serial(Quantized(Dense(8), group_size=32, smallest=1), Relu())
    """
    return _wrapped(net, '', stored)


def _wrapped(net: Layer, path: str, stored: Mapping[str, tuple[int, int]]) -> Layer:
    if narrow_axes(bare(net)):
        if path not in stored:
            return net
        bits, group_size = stored[path]
        return Quantized(net, bits, group_size, smallest=1)
    children = [_wrapped(layer, joined(path, key), stored) for key, layer in net.children]
    if isinstance(net, (Combinator, Wrapper)) and children:
        net = net.with_sublayers(tuple(children))
    if isinstance(net, Tied) and net.source.rpartition('/')[0] in stored:
        return TiedRows(net.layer, net.source, net.target, net.via)
    return net


def hold_wide(net: Layer) -> Layer:
    """The same model with layers that hold wide weights: the inverse of `hold_narrow`.

    Args:
      net: any layer, also one that `quantize` made.

    >>> from layercomb import tl
    >>> hold_wide(hold_narrow(tl.Serial(tl.Dense(8)), {'dense': (8, 32)}))
    Serial(Dense(8))
    """

    def one(layer: Layer) -> Layer:
        if isinstance(layer, Quantized):
            return layer.layer
        if isinstance(layer, TiedRows):
            return Tied(layer.layer, layer.source, layer.target, layer.via)
        return layer

    return rewrite(net, one)


def _has(weights: Tree, path: str) -> bool:
    try:
        trees.get(weights, path)
    except KeyError:
        return False
    return True
