"""`narrow_caches`: a model that keeps keys and values in fewer bits while it decodes."""

from __future__ import annotations

from typing import Any

from layercomb.checks import checked
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.decoding.narrow import CacheBits
from layercomb.transforms.rewriting import rewrite


@checked
def narrow_caches(net: Layer, bits: CacheBits = 16) -> Layer:
    """The same model, whose decoding caches hold keys and values in 16 or 8 bits.

    In 16 bits a cache is bfloat16, half of float32. In 8 bits it is int8 with a float32 scale for
    each position and head. Every causal `DotProductAttention` and `LocalAttention` gets such a
    cache: attention itself stays float32, and reads what the cache holds of all positions, the new
    ones too. Attention that chooses its keys (LSH, hashed, blocks) keeps its caches as they are,
    since it goes by them when it chooses. Weights, their paths and training stay.

    Args:
      net: any layer.
      bits: 16 or 8.

    Raises:
      TypeError: for other bits.
      ValueError: if no layer has a cache that can be narrow.

    >>> from layercomb import tl, transforms
    >>> transforms.narrow_caches(tl.SelfAttention(2), 8).core
    DotProductAttention(cache_bits=8)
    """

    def one(layer: Layer) -> Layer:
        return layer.replace(cache_bits=bits) if _has_cache(layer) else layer

    if not any(_has_cache(layer) for _, layer in walk(net)):
        raise ValueError(
            f'narrow_caches: this {type(net).__name__} has no cache that can be narrow: causal '
            'attention that does not choose its keys has, such as tl.SelfAttention(8)'
        )
    return rewrite(net, one)


def _has_cache(layer: Any) -> bool:
    """Whether a layer says in how many bits it caches, and caches at all."""
    return hasattr(layer, 'cache_bits') and getattr(layer, 'causal', False) is True
