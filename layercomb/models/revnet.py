"""RevNet: a residual network for images, with reversible blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb import layers as tl
from layercomb.checks import checked, frozen


@checked
def RevNet(
    n_classes: int = 10,
    widths: Sequence[int] = (32, 64, 112),
    n_blocks: int | Sequence[int] = 3,
    dropout: float = 0.0,
    *,
    activation: str | tl.Layer = 'relu',
    norm: tl.Layer = tl.BatchNorm(),
) -> tl.Serial:
    """A classifier of images: (B, H, W, channels) float → logits (B, n_classes).

    A convolution makes two streams, each of half the stage's width. They pass through reversible
    blocks::

        x₁ = x₁ + F(x₂)
        x₂ = x₂ + G(x₁)

    where F and G are norm, activation, 3×3 convolution, twice. Between two stages, a convolution of
    stride 2 joins the streams, halves height and width, and widens the features. It is not
    reversible, so training keeps its inputs: one activation a stage, where an ordinary residual
    network keeps several a block.

    Args:
      n_classes: the width of the logits.
      widths: features of each stage, both streams together; even. The default is RevNet-38 for
        CIFAR.
      n_blocks: how many blocks a stage has: one number for all stages, or one for each.
      dropout: the rate before the second convolution of F and G.
      activation: a name or a layer.
      norm: the normalization; statistics of `BatchNorm` are updated once a step.

    Returns:
      ``Serial(stem, Split, stage_1, down_1, stage_2, …, Concatenate, norm, activation, Mean, Mean,
      head)``.

    Raises:
      ValueError: if `widths` is empty or has an odd width, or if `n_blocks` has another length.

    References:
      The Reversible Residual Network (Gomez et al. 2017), https://arxiv.org/abs/1707.04585

    >>> RevNet(widths=(8, 16), n_blocks=1).keys[:5]
    ('stem', 'split', 'stage_1', 'down_1', 'stage_2')
    """
    widths = _integers('widths', widths, least=2)
    if odd := [width for width in widths if width % 2]:
        raise ValueError(
            f'widths={widths}: {odd[0]} cannot be halved into two streams: use {odd[0] + 1}'
        )
    given = n_blocks if isinstance(n_blocks, (tuple, list)) else (n_blocks,) * len(widths)
    blocks = _integers('n_blocks', given, least=1)
    if len(blocks) != len(widths):
        raise ValueError(
            f'n_blocks={blocks} for the {len(widths)} stages of widths={widths}: give one number, '
            'or one for each stage'
        )
    act = tl.activation(activation)
    body: list[tl.Layer | None] = [_conv(widths[0]).replace(name='stem'), tl.Split()]
    for i, (width, n) in enumerate(zip(widths, blocks, strict=True)):
        if i:
            halved = _conv(width, stride=2)
            down = tl.Serial(tl.Concatenate(), norm, act, halved, tl.Split(), name=f'down_{i}')
            body.append(down)
        half = _half(width // 2, norm, act, dropout)
        block = tl.ReversibleSerial(
            half, tl.ReversibleSwap(), half, tl.ReversibleSwap(), name=f'stage_{i + 1}'
        )
        body.append(tl.ReversibleRepeat(block, n))
    return tl.Serial(
        body,
        tl.Concatenate(),
        norm.replace(name='norm'),
        act,
        tl.Mean(),  # over the height …
        tl.Mean(),  # … and the width
        tl.Dense(n_classes, name='head'),
    )


def _half(
    width: int, norm: tl.Layer, activation: tl.Layer, dropout: float
) -> tl.ReversibleHalfResidual:
    """acc + F(x)."""
    drop = tl.Dropout(dropout) if dropout else None
    return tl.ReversibleHalfResidual(
        norm, activation, _conv(width), norm, activation, drop, _conv(width)
    )


def _conv(width: int, stride: int = 1) -> tl.Conv2D:
    """A 3×3 convolution without a bias, since a normalization follows."""
    return tl.Conv2D(width, strides=(stride, stride), use_bias=False)


def _integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    given = tuple(frozen(values))
    if not given:
        raise ValueError(f'{name}={given}: give integers, e.g. (32, 64)')
    if min(given) < least:
        raise ValueError(f'{name}={given}: each must be at least {least}')
    return given
