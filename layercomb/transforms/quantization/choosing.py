"""In how many bits each leaf of a model keeps its matrices: `choices`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.embedding import Embedding
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.quantized.matrix import BITS
from layercomb.transforms.quantization.layer import Quantized, bare
from layercomb.transforms.tying import Tied

Bits = int | Callable[[str], int | None]

_OF_TABLES = 8  # in a model of 4 bits


class Choices(NamedTuple):
    """What `quantize` makes of each leaf.

    Attributes:
      bits: of the leaf at a path; None if it stays wide.
      group_size, smallest: as of `quantize`.
    """

    bits: Callable[[str], int | None]
    group_size: int
    smallest: int

    def leaf(self, net: Layer, path: str) -> Quantized | None:
        """A leaf with narrow matrices; None if it stays wide.

        Raises:
          ValueError: for bits that are not to be had.
        """
        bits = self.bits(path)
        if bits is None:
            return None
        if bits not in BITS:
            raise ValueError(
                f'quantize: bits={bits!r} is not to be had for {path!r}: choose 8 or 4, 16 for '
                'bfloat16, or None for what stays as it is'
            )
        return Quantized(net, bits, self.group_size, self.smallest)


def choices(net: Layer, bits: Bits, group_size: int, smallest: int) -> Choices:
    """What `quantize` makes of each leaf of a model: see there.

    Args:
      net: the whole model, for a head is known by its table.
      bits, group_size, smallest: as of `quantize`.
    """
    if callable(bits):
        return Choices(bits, group_size, smallest)
    number = bits
    of_vocabulary = vocabulary(net) if number == 4 else set()
    return Choices(
        lambda path: _OF_TABLES if path in of_vocabulary else number, group_size, smallest
    )


def vocabulary(net: Layer) -> set[str]:
    """The paths of embeddings, of what is tied to them, and of dense heads with as many outputs.

    >>> from layercomb import tl
    >>> net = tl.Serial(tl.Embedding(31, 8), tl.Dense(16), tl.Dense(31, name='head'))
    >>> sorted(vocabulary(net))
    ['embedding', 'head']
    """
    leaves = {path: bare(layer) for path, layer in walk(net) if not layer.children}
    tables = {path: layer for path, layer in leaves.items() if isinstance(layer, Embedding)}
    sizes = {layer.vocab_size for layer in tables.values()}
    heads = {p for p, x in leaves.items() if isinstance(x, Dense) and x.n_units in sizes}
    found = set(tables) | heads
    for path, layer in walk(net):
        if isinstance(layer, Tied):
            ends = joined(path, layer.source), joined(path, layer.target)
            for one, other in (ends, ends[::-1]):
                found |= {_at(other, leaf, one) for leaf in found & set(leaves) if _meet(leaf, one)}
    return found & set(leaves)


def _meet(leaf: str, end: str) -> bool:
    """Whether a leaf is at an end of a tie, or below, or holds the weight that is the end."""
    return f'{leaf}/'.startswith(f'{end}/') or f'{end}/'.startswith(f'{leaf}/')


def _at(end: str, leaf: str, other: str) -> str:
    """The leaf at one end of a tie that stands for a leaf at the other end."""
    if f'{leaf}/'.startswith(f'{other}/'):  # layers are tied
        return end + leaf.removeprefix(other)
    return end.rpartition('/')[0]
