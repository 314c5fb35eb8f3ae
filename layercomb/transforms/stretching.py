"""`stretch`: a model with rotary positions for longer sequences; weights and paths stay."""

from __future__ import annotations

from layercomb.checks import Size, checked
from layercomb.layers.attention.lsh.buckets import Hashing
from layercomb.layers.attention.selected.core import SelectingOptions
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.positions.scaling import RotaryScaling, YarnScaling
from layercomb.transforms.rewriting import rewrite


@checked
def stretch(net: Layer, max_len: Size, scaling: RotaryScaling | None = None) -> Layer:
    """The same model, for sequences of up to `max_len` positions.

    Every `RotaryPositions` with a limit gets another one, and turns as the scaling says: positions
    beyond those that the model was trained on would be unknown to it. So does one of a layer with a
    window. Attention that selects its keys gets the limit too, and keeps its number of buckets.
    Weights and their paths stay. Some quality is lost, at short lengths too, unless the model is
    trained on with it.

    Args:
      net: any layer.
      max_len: the longest sequence, longer than that of the model.
      scaling: of the positions; None for `YarnScaling` by the ratio of the two lengths.

    Raises:
      ValueError: if no rotary positions have a limit, `max_len` is not greater than it, or
        positions are scaled already.

    References:
      Peng et al., YaRN, 2023, https://arxiv.org/abs/2309.00071

    >>> from layercomb import tl, transforms
    >>> net = tl.SelfAttention(2, rotary=tl.RotaryPositions(max_len=2048))
    >>> transforms.stretch(net, 8192, tl.LinearScaling(4.0)).rotary
    RotaryPositions(max_len=8192, scaling=LinearScaling(factor=4.0))
    """
    limited = [x for _, x in walk(net) if isinstance(x, RotaryPositions) and x.max_len is not None]
    if not limited:
        raise ValueError(
            f'stretch: {type(net).__name__} has no rotary positions with a max_len, and others '
            'cannot be stretched'
        )

    def one(layer: Layer) -> Layer:
        its_len = getattr(layer, 'max_len', None)
        if isinstance(layer, (SelectingOptions, Hashing)) and its_len is not None:
            kept = {'n_buckets': layer.factors(its_len)} if isinstance(layer, Hashing) else {}
            return layer.replace(max_len=max(max_len, its_len), **kept)
        if not isinstance(layer, RotaryPositions) or layer.max_len is None:
            return layer
        if layer.max_len >= max_len:
            raise ValueError(
                f'stretch: max_len={max_len} is no more than the {layer.max_len} positions that '
                'the model takes already'
            )
        if layer.scaling is not None and scaling is None:
            raise ValueError(
                f'stretch: positions are scaled already, by {layer.scaling}: say by scaling= what '
                'takes its place'
            )
        its = scaling or YarnScaling(max_len / layer.max_len, layer.max_len)
        return layer.replace(max_len=max_len, scaling=its)

    return rewrite(net, one)
