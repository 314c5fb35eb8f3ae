"""Whether a model and a batch can be split by positions over several devices."""

from __future__ import annotations

import inspect
from typing import Any

import jax

from layercomb.layers.core.layer import Layer
from layercomb.layers.facts.sequence import SEQUENCE
from layercomb.layers.metrics.metric import Metric
from layercomb.shapes import describe, nearest_multiple


def check_spans(net: Layer) -> None:
    """Checks that each layer sees the positions of other devices where it depends on them.

    Args:
      net: a model, with its loss or metrics.

    Raises:
      TypeError: for a layer that mixes positions and does not declare ``spans_devices``; for a
        loss of rows that belong together.
    """
    if isinstance(net, Metric) and net.together > 1:
        raise TypeError(
            f'{SEQUENCE}: {type(net).__name__} compares rows as wholes, of which a device has '
            f'a part: use a mesh with {SEQUENCE}=1'
        )
    if net.position_wise is True or net.spans_devices:
        return
    said = inspect.getattr_static(type(net), 'position_wise', None)
    if not (net.sublayers and isinstance(said, property)):
        raise TypeError(f'{SEQUENCE}: {_why(net)}')
    for layer in net.sublayers:
        check_spans(layer)


def _why(net: Layer) -> str:
    if net.position_wise is False:
        return (
            f'{type(net).__name__} mixes positions, and does not see those of other devices: use '
            f'a mesh with {SEQUENCE}=1, or, if the layer is yours, say spans_devices = True and '
            'take what it needs by tl.surrounded(x, before, after) or tl.all_positions(x)'
        )
    return (
        f'{" ".join(repr(net).split())} does not say whether it works on each position by itself: '
        'say position_wise = True if it does'
    )


def check_parts(batch: Any, n: int) -> None:
    """Checks that the positions of a batch can be split.

    Args:
      batch: arrays (B, L, …), or their signatures.
      n: how many devices split them.

    Raises:
      ValueError: if one has no positions, or n does not divide them.
    """
    if n == 1:
        return
    for x in jax.tree.leaves(batch):
        if len(x.shape) < 2:
            raise ValueError(
                f'{SEQUENCE}={n} splits the positions of (batch, length, …), and the batch has '
                f'{describe([x])}: use a mesh with {SEQUENCE}=1'
            )
        if x.shape[1] % n:
            raise ValueError(
                f'{SEQUENCE}={n} does not divide the {x.shape[1]} positions of a batch '
                f'({describe([x])}): use a length of {nearest_multiple(x.shape[1], n)}'
            )
