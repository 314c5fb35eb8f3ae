"""Where each weight of a model of Trax goes: its place in Trax's flat order, and its path here.

Trax keeps weights as a flat list, in the order of its layers. An `Entry` says of one weight what
shape it has there and where it stands here. `Writer` collects the entries of a model in order.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.interop.tensors import shapes_of
from layercomb.interop.trax.files import Weights
from layercomb.layers.core.layer import Layer
from layercomb.shapes import Signature
from layercomb.trees import Tree

Shape = tuple[int, ...]
SHOWN = 6  # weights of each kind that an error names


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight.

    Attributes:
      theirs: what it is, in words.
      shape: in Trax.
      ours: its path here.
      block: which block of a stack it belongs to; None outside of stacks.
      heads_first: whether axes 0 and 1, heads and features, change places.
    """

    theirs: str
    shape: Shape
    ours: str
    block: int | None = None
    heads_first: bool = False

    def value(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The weight as it is here: Trax has several heads in one matrix, or heads first."""
        return (x.swapaxes(0, 1) if self.heads_first else x).reshape(shape)


class Writer:
    """Collects entries in the order of Trax.

    Args:
      d_model: D, the width of the stream.
    """

    def __init__(self, d_model: int):
        self.entries: list[Entry] = []
        self._d = d_model

    def add(self, theirs: str, shape: Shape, ours: str, block: int | None = None) -> None:
        """One weight."""
        self.entries.append(Entry(theirs, shape, ours, block))

    def norm(self, where: str, ours: str, block: int | None = None, width: int = 0) -> None:
        """A `LayerNorm`: scale and bias."""
        for leaf in ('scale', 'bias'):
            self.add(f'{where}: {leaf} of the norm', (width or self._d,), f'{ours}/{leaf}', block)

    def dense(self, where: str, shape: Shape, ours: str, block: int | None = None) -> None:
        """A `Dense`: kernel and bias."""
        self.add(f'{where}: kernel', shape, f'{ours}/kernel', block)
        self.add(f'{where}: bias', shape[1:], f'{ours}/bias', block)

    def attention(self, where: str, ours: str, block: int) -> None:
        """Attention whose projections are `Dense` layers over all heads."""
        for part in ('query', 'key', 'value', 'output'):
            self.dense(f'{where}: {part}', (self._d, self._d), f'{ours}/{part}', block)

    def feed_forward(self, where: str, d_ff: int, ours: str, block: int) -> None:
        """Dense to `d_ff`, and Dense back."""
        self.dense(f'{where}: first Dense', (self._d, d_ff), f'{ours}/dense', block)
        self.dense(f'{where}: second Dense', (d_ff, self._d), f'{ours}/dense_1', block)

    def heads(
        self, where: str, sizes: Sequence[int], has_key: bool, has_bias: bool, ours: str, block: int
    ) -> None:
        """Attention with a matrix for each head.

        Args:
          where: for messages.
          sizes: H, the depth of queries and keys, and that of values.
          has_key: whether keys have matrices of their own.
          has_bias: whether queries, keys and values have biases.
          ours: the path of the layer.
          block: the number of the block.
        """
        h, d_qk, d_v = sizes
        depths = {'query': d_qk, **({'key': d_qk} if has_key else {}), 'value': d_v}
        shapes = {part: (h, self._d, depth) for part, depth in depths.items()}
        for part, shape in {**shapes, 'output': (h, d_v, self._d)}.items():
            theirs, path = f'{where}: {part} of each head', f'{ours}/{part}/kernel'
            self.entries.append(Entry(theirs, shape, path, block, part != 'output'))
        for part, depth in depths.items() if has_bias else ():
            theirs, path = f'{where}: {part} bias of each head', f'{ours}/{part}/bias'
            self.add(theirs, (h, depth), path, block)


def fill(net: Layer, signature: Signature, entries: Sequence[Entry], given: Weights) -> Tree:
    """The weights of a model, from those that Trax wrote.

    Args:
      net: the model.
      signature: of its inputs.
      entries: all its weights, in the order of Trax; their shapes are those of `given`.
      given: what Trax wrote.

    Returns:
      A nested dict of JAX arrays.
    """
    made = trees.flatten(shapes_of(net, signature))
    weights = {path: np.empty(x.shape, x.dtype) for path, x in made.items()}
    for entry, x in zip(entries, given.values(), strict=True):
        into = weights[entry.ours]
        if entry.block is None:
            into[...] = entry.value(x, into.shape)
        else:
            into[entry.block] = entry.value(x, into.shape[1:])
    return jax.tree.map(jnp.asarray, trees.unflatten(weights))


def check(entries: Sequence[Entry], shapes: Sequence[Shape], what: str, model: str) -> None:
    """Compares the weights of a file with those of a model.

    Args:
      entries: those of the model.
      shapes: those of the file.
      what: the name of the file, for messages.
      model: the name of the model, for messages.

    Raises:
      UsageError: if some are missing, left over or of another shape; it names all kinds together.
    """
    wanted = [entry.shape for entry in entries]
    if wanted == list(shapes):
        return
    missing, left_over, other = [], [], []
    for i, j, n_wanted, n_found in _differences(wanted, shapes):
        both = min(n_wanted, n_found)
        for k in range(both):
            entry = entries[i + k]
            other.append(f'{entry.theirs} is {shapes[j + k]} at place {j + k}, not {entry.shape}')
        missing += [f'{e.theirs} {e.shape}' for e in entries[i + both : i + n_wanted]]
        left_over += [f'{shapes[j + k]} at place {j + k}' for k in range(both, n_found)]
    kinds = {'of another shape': other, 'missing': missing, 'left over': left_over}
    said = [f'{kind}: {_listed(found)}' for kind, found in kinds.items() if found]
    raise UsageError(
        f'{what} does not hold the weights of this {model}: {"; ".join(said)}: check model= and '
        'the parameters, or the file'
    )


def _differences(
    wanted: Sequence[Shape], found: Sequence[Shape]
) -> list[tuple[int, int, int, int]]:
    """Where two lists differ: places in both, and how many items there are in each."""
    if len(wanted) == len(found):
        return [(i, i, 1, 1) for i, shape in enumerate(wanted) if shape != found[i]]
    if max(len(wanted), len(found)) > 2000:  # the search for the best fit takes quadratic time
        n = min(len(wanted), len(found))
        return [
            *_differences(wanted[:n], found[:n]),
            (n, n, len(wanted) - n, len(found) - n),
        ]
    steps = difflib.SequenceMatcher(None, wanted, found, autojunk=False).get_opcodes()
    return [(i, k, j - i, m - k) for kind, i, j, k, m in steps if kind != 'equal']


def _listed(items: Sequence[str]) -> str:
    more = f' and {len(items) - SHOWN} more' if len(items) > SHOWN else ''
    return ', '.join(items[:SHOWN]) + more
