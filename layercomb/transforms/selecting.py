"""`sparse_attention`: a model whose attention selects its keys; weights and paths stay."""

from __future__ import annotations

import re

from layercomb.layers.attention.cores import DotProductAttention
from layercomb.layers.attention.layers import SelfAttention
from layercomb.layers.attention.selected.core import Selecting
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.transforms.rewriting import rewrite


def sparse_attention(net: Layer, core: Selecting, where: str | None = None) -> Layer:
    """The same model, in which each query sees the keys that it selects instead of all.

    Every `SelfAttention` that sees all positions gets another core; weights and their paths stay,
    so that a loaded model reads long texts in less time, and decodes by reading few keys. Layers
    with a window keep it. What the model says of its scores is taken from it: their scale and cap,
    whether they are causal, masks and dropout.

    A model that was trained to see all keys looks at the first ones of a text whatever it reads:
    give the core a few `n_sinks`. Blocks lose least, small ones above all.

    Args:
      net: any layer.
      core: a `BlockAttention`, `HashedAttention` or `MixedAttention`; of it is taken which keys are
        seen.
      where: a regular expression; only layers whose path it matches somewhere are changed. None
        changes all.

    Raises:
      TypeError: if the core selects nothing.
      ValueError: if no layer is changed, or one adds a bias to scores by their distance.

    >>> from layercomb import tl, transforms
    >>> blocks = tl.BlockAttention(n_chosen=8, block_len=16, local_len=32, n_sinks=4)
    >>> net = transforms.sparse_attention(tl.SelfAttention(2), blocks)
    >>> net.core
    BlockAttention(n_sinks=4, n_chosen=8)
    """
    if not isinstance(core, Selecting):
        raise TypeError(
            'sparse_attention takes a core that selects, such as tl.BlockAttention(n_sinks=4), got '
            f'{core!r}'
        )
    changed = []

    def one(path: str, layer: Layer) -> Layer:
        wanted = where is None or re.search(where, path)
        if not wanted or not isinstance(layer, SelfAttention):
            return layer
        its = layer.core
        if not isinstance(its, DotProductAttention) or its.window is not None:
            return layer
        if its.relative:
            raise ValueError(
                f'sparse_attention: {path or type(layer).__name__} adds a bias to scores by their '
                'distance, which no core that selects does: leave it out by where='
            )
        changed.append(path)
        said = {name: getattr(its, name) for name in ('causal', 'masked', 'dropout', 'softcap')}
        return layer.replace(core=core.replace(scale=its.scale, **said))

    made = rewrite(net, one, paths=True)
    if not changed:
        paths = [path for path, layer in walk(net) if isinstance(layer, SelfAttention)]
        kept = ', '.join(paths[:3])
        found = f': {kept} have a window or another core, and stay' if paths else ''
        raise ValueError(
            f'sparse_attention: no attention to all positions in this {type(net).__name__}'
            f'{"" if where is None else f" matches where={where!r}"}{found}'
        )
    return made
