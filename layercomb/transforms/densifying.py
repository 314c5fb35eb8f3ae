"""`denser`: a model whose sparse feed-forwards use more of their units, of the same weights."""

from __future__ import annotations

import functools

from layercomb.checks import Size, checked
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.shapes import nearest_divisor
from layercomb.transforms.rewriting import rewrite


@functools.singledispatch
def chosen_more(layer: Layer, factor: int) -> Layer | None:
    """A sparse layer that uses `factor` times as much, or all, of the same weights.

    A layer of one's own takes part if it is registered at `chosen_more`.

    Args:
      layer: any layer.
      factor: at least 1.

    Returns:
      The layer; None for one that does not choose.
    """
    del layer, factor
    return None


@chosen_more.register
def _of_mixture(layer: MixtureFF, factor: int) -> Layer:
    most = layer.n_experts - layer.n_shared
    return layer.replace(n_chosen=min(layer.n_chosen * factor, most))


@chosen_more.register
def _of_units(layer: SparseFF, factor: int) -> Layer:
    size = layer.block_size
    if size % factor:
        raise ValueError(
            f'denser: factor={factor} does not divide block_size={size} of SparseFF: use '
            f'{nearest_divisor(size, factor)}'
        )
    return layer.replace(block_size=size // factor)


@checked
def denser(net: Layer, factor: Size) -> Layer:
    """The same model, whose sparse feed-forwards use `factor` times as many of their units.

    A `MixtureFF` chooses `factor` times as many experts, or all of them; a `SparseFF` one of each
    N / `factor` units. It takes the weights of the model, so a model may learn as the denser one
    first, when every unit sees more of the data: see `TrainTask.denser`.

    Take the weights from `init` of the model itself: that of the denser one makes a larger
    controller for a `SparseFF` whose `d_lowrank` is None.

    Args:
      net: any layer.
      factor: at least 1.

    Raises:
      ValueError: if no layer chooses units, or `factor` does not divide a block of `SparseFF`,
        naming the nearest that does.

    References:
      Nie et al. 2021, EvoMoE: dense to sparse, https://arxiv.org/abs/2112.14397

    >>> from layercomb import tl, transforms
    >>> transforms.denser(tl.Serial(tl.RMSNorm(), tl.MixtureFF(64, 16, 2, 0)), 4)
    Serial(RMSNorm(), MixtureFF(64, 16, n_chosen=8, n_shared=0))
    """

    def one(layer: Layer) -> Layer:
        made = chosen_more(layer, factor)
        return layer if made is None else made

    if all(chosen_more(layer, factor) is None for _, layer in walk(net)):
        raise ValueError(
            f'denser: this {type(net).__name__} has no layer that chooses units: give it a '
            'tl.MixtureFF or tl.SparseFF'
        )
    return rewrite(net, one)
