"""A model as a table: what `lc.summary` and `layercomb inspect` print."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.checks import check_inputs
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined
from layercomb.layers.core.wrapper import Wrapper, wrapped
from layercomb.model import Model
from layercomb.shapes import Signature, describe, signature_of


@dataclasses.dataclass(frozen=True)
class Row:
    """A leaf of a model: where it is, what it puts out, and what its weights take."""

    path: str
    layer: str
    outputs: Signature
    count: int
    bytes: int


def rows(layer: Layer, signature: Signature) -> list[Row]:
    """A row for each leaf, in the order in which values pass through them.

    The weights are those of the whole model at the leaf's path: stacked under `Repeat`, and none
    where `Tied` took one away.

    Args:
      layer: a model.
      signature: of its inputs.
    """
    check_inputs(layer, signature)
    rng = jax.eval_shape(jax.random.key, 0)
    weights = jax.eval_shape(lambda rng: layer.init(signature, rng, Mode.TRAIN)[0], rng)
    found: list[Row] = []
    _walk(layer, signature, '', '', weights, found)
    return found


def _walk(
    layer: Layer, signature: Signature, path: str, how: str, weights: Any, found: list[Row]
) -> Signature:
    if isinstance(layer, Combinator):

        def call(i: int, values: Signature) -> Signature:
            key = layer.keys[i]
            below = weights.get(key, {})
            return _walk(layer.sublayers[i], values, joined(path, key), how, below, found)

        return layer.route(call, signature)
    n = f'{layer.n} × ' if isinstance(layer, (Repeat, Map)) else ''
    if isinstance(layer, Wrapper) and len(layer.sublayers) == 1 and (n or not _is_leaf(layer)):
        inner = layer.inner_signature(signature)
        made = _walk(layer.layer, inner, path, how + n, weights, found)
        return made if inner == signature else layer.output_signature(signature)
    outputs = layer.output_signature(signature)
    name = how + _class_name(layer)
    found.append(Row(path or '.', name, outputs, trees.count(weights), trees.n_bytes(weights)))
    return outputs


def _is_leaf(layer: Layer) -> bool:
    """Whether a layer is a leaf, maybe in wrappers, and stands in one row."""
    around = list(wrapped(layer))
    return not (around[-1].sublayers or any(isinstance(each, (Repeat, Map)) for each in around))


def _class_name(layer: Layer) -> str:
    name = type(layer).__name__
    return f'{name}({_class_name(layer.layer)})' if isinstance(layer, Wrapper) else name


def summary(model: Model | Layer, signature: Any) -> str:
    """A model as a table: path, layer, output shape, weights and bytes, with totals.

    Nothing is computed: a model of any size can be looked at.

    Args:
      model: a `Model` or a layer.
      signature: of its inputs, or example inputs.

    >>> from layercomb import tl, summary, shape_dtype
    >>> print(summary(tl.Serial(tl.Dense(8), tl.Relu()), shape_dtype((2, 4))))
    path   layer  output        weights  bytes
    dense  Dense  float32[2,8]       40    160
    relu   Relu   float32[2,8]        0      0
    total                            40    160
    """
    layer = model.layer if isinstance(model, Model) else model
    found = rows(layer, signature_of(signature))
    table = [('path', 'layer', 'output', 'weights', 'bytes')]
    table += [(r.path, r.layer, describe(r.outputs), f'{r.count:,}', f'{r.bytes:,}') for r in found]
    total = sum(r.count for r in found), sum(r.bytes for r in found)
    table.append(('total', '', '', f'{total[0]:,}', f'{total[1]:,}'))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
