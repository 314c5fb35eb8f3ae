"""`reversible`: blocks whose inputs training does not keep; weights and paths stay."""

from __future__ import annotations

from typing import Any

from layercomb.checks import ChunkLen
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.reversible.bidirectional import BidirectionalRepeat
from layercomb.layers.reversible.layers import Reversible


def reversible(
    net: Layer, m: int = 4, *, fraction: int = 14, chunk_len: ChunkLen | None = 512
) -> Layer:
    """The same model, which trains without keeping the inputs of its blocks.

    Each `Repeat` becomes a `BidirectionalRepeat`; weights, state and paths stay what they are. In
    evaluation and decoding the model is the same to the bit. In training each block's sum is mixed
    with that of the block before it, by ±2^−m. A pretrained model needs `m` large, for its blocks
    have not learned with that; `m` bits are kept of each value and block.

    Args:
      net: any layer with blocks in `Repeat`, such as those of `lc.models` and `lc.interop`.
      m: 1 … 8.
      fraction: how many bits of a value of the stream stand after the point, 0 … 30. A stream must
        stay below 2^(31 − fraction), or the loss of its batch is NaN; 14 allows 131,072. Streams of
        pretrained models may reach 20,000, and pass 32,768 as they train. If a loss is NaN, give
        fewer bits.
      chunk_len: how many positions a feed-forward takes at a time in training, as of `tl.Chunk`;
        None for all.

    Raises:
      TypeError: if a block changes more than the first of its values, such as one of two streams.
      ValueError: if there are no such blocks, or `m` or `fraction` is out of its range.

    References:
      Zhang, Lewis & Kleijn (with γ = ±½), 2024, https://arxiv.org/abs/2407.09093

    >>> from layercomb import tl, transforms
    >>> transforms.reversible(tl.Serial(tl.Dense(8), tl.Repeat(tl.Residual(tl.Dense()), 12)))
    Serial(Dense(8), BidirectionalRepeat(Residual(Dense()), 12, chunk_len=512))
    """
    made = _reversible(net, '', {'m': m, 'fraction': fraction, 'chunk_len': chunk_len})
    if not any(isinstance(layer, BidirectionalRepeat) for _, layer in walk(made)):
        raise ValueError(f'reversible: {_why_not(net)}')
    return made


def _reversible(net: Layer, path: str, options: dict[str, Any]) -> Layer:
    if isinstance(net, BidirectionalRepeat):
        return net.replace(**options)
    if isinstance(net, Reversible):
        return net
    if type(net) is Repeat:
        layer = net.layer
        if isinstance(layer, Remat) and layer.name is None:
            layer = layer.layer  # a block is computed again anyway
        try:
            return BidirectionalRepeat(layer, net.n, net.shared, **options, name=net.name)
        except (TypeError, ValueError) as error:
            error.add_note(f'in {path or type(net).__name__}')
            raise
    children = net.children
    made = tuple(_reversible(child, joined(path, key), options) for key, child in children)
    return net.with_sublayers(made) if made != net.sublayers else net


def _why_not(net: Layer) -> str:
    """Why no block of a model becomes reversible, and what to do about it."""
    name = type(net).__name__
    if any(isinstance(layer, Reversible) for _, layer in walk(net)):
        return f'the blocks of this {name} are reversible already, and keep nothing'
    return (
        f'no blocks of this {name} are in a Repeat, whose weights are stacked: build them as '
        'tl.Repeat(block, n), or take the model as it was before transforms.unstack'
    )
