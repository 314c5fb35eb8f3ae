"""Whether a model and a batch can be split by positions over several devices."""

from __future__ import annotations

import inspect
from typing import Any

import jax

from layercomb.layers.basic.fn import Fn
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.facts.sequence import SEQUENCE
from layercomb.layers.metrics.metric import Metric
from layercomb.shapes import describe, nearest_multiple

_WHOLE = f'use a mesh with {SEQUENCE}=1'
_HOW = (
    'spans_devices = True and take what it needs by tl.surrounded, tl.over_positions or '
    'tl.all_positions'
)


def check_spans(net: Layer) -> None:
    """Checks that each layer sees the positions of other devices where it depends on them.

    Args:
      net: a model, with its loss or metrics.

    Raises:
      TypeError: for a layer that mixes positions and does not declare ``spans_devices``; for a
        metric of whole rows.
    """
    for _, layer in walk(net):
        if isinstance(layer, Metric) and not _sums_positions(layer):
            raise TypeError(
                f'{SEQUENCE}: {type(layer).__name__} is of whole rows, of which a device has parts'
                f': {_WHOLE}'
            )
    _check(net)


def _sums_positions(metric: Metric) -> bool:
    """Whether the sums of a metric are sums over positions, which devices can add up."""
    if metric.together > 1 or metric.position_wise is False:
        return False
    classes = type(metric).__mro__
    sums = next(i for i, c in enumerate(classes) if 'sums' in vars(c))
    says = next(i for i, c in enumerate(classes) if 'spans_devices' in vars(c))
    return classes[sums] is Metric or (says <= sums and metric.spans_devices)


def _check(net: Layer) -> None:
    if net.position_wise is True:
        return
    said = inspect.getattr_static(type(net), 'position_wise', None)
    passes_on = net.sublayers and isinstance(said, property)
    if not (passes_on or net.spans_devices):
        raise TypeError(f'{SEQUENCE}: {_why(net)}')
    for layer in net.sublayers:
        _check(layer)


def _why(net: Layer) -> str:
    name = type(net).__name__
    if isinstance(net, Fn):
        name = ' '.join(repr(net).split())
        if net.position_wise is False:
            return (
                f'{name} mixes positions, and does not see those of other devices: {_WHOLE}, or '
                f'write a layer that says {_HOW}'
            )
    if net.position_wise is False:
        return (
            f'{name} mixes positions, and does not see those of other devices: {_WHOLE}, or a '
            f'layer that does (see docs/scaling.md); one of your own says {_HOW}'
        )
    return (
        f'{" ".join(repr(net).split())} does not say whether it works on each position by itself: '
        f'say position_wise = True if it does; else {_WHOLE}, or say {_HOW}'
    )


def check_parts(batch: Any, n: int, where: str = 'a batch') -> None:
    """Checks that the positions of a batch can be split.

    Args:
      batch: arrays (B, L, …), or their signatures.
      n: how many devices split them.
      where: what messages call the batch.

    Raises:
      ValueError: if one has no positions, or n does not divide them.
    """
    if n == 1:
        return
    for x in jax.tree.leaves(batch):
        if len(x.shape) < 2:
            raise ValueError(
                f'{SEQUENCE}={n} splits the second axis of every array of {where}, the positions, '
                f'and {describe([x])} has none: {_WHOLE}'
            )
        if x.shape[1] % n:
            raise ValueError(
                f'{SEQUENCE}={n} does not divide the {x.shape[1]} positions of {where} '
                f'({describe([x])}): use a length of {nearest_multiple(x.shape[1], n)}'
            )
