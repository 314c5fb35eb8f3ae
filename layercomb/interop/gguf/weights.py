"""Weights from the tensors of a .gguf file, narrow where the file is, and tensors from weights.

A matrix of integers in the file is int8 or int4 here, with the same numbers, but for float32's
rounding where a symmetric type is kept with minima, beside one that has some. Floats become
bfloat16, some rows at a time. The matrices of one leaf, in all the layers that `Repeat` stacks, are
of one kind, which holds all that the file has: the most bits, the smallest groups, and minima if
any has some. Norms, biases and what else is no large matrix become float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.interop.gguf.blocks import (
    Blocks,
    integers,
    pack4,
    packed,
    plain,
    with_minima,
)
from layercomb.interop.gguf.file import Stored
from layercomb.interop.memory import check_fits
from layercomb.interop.tensors import Entry, check, spill
from layercomb.interop.tensors import fill as fill_wide
from layercomb.interop.weight_cache import Flat, described
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.quantized.matrix import SCALES, Narrow
from layercomb.layers.quantized.panels import as_rows
from layercomb.transforms import buffers
from layercomb.transforms.quantization.holding import Kind, hold_narrow, hold_wide
from layercomb.transforms.quantization.layer import Quantized, bare, bits_of, narrow_axes
from layercomb.transforms.tying import Tied
from layercomb.transforms.weight_axes import axes, holder
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file, as a model wants it.

    Attributes:
      stored: as it lies in the file.
      order: row i is the row ``order[i]`` of the file; None for the file's order.
      shift: a number to add to all values.
    """

    stored: Stored
    order: np.ndarray | None = None
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, outermost axis first."""
        return self.stored.shape

    def rows(self, part: tuple[int, int] | None = None) -> np.ndarray:
        """Rows as they are stored, (M, bytes) uint8, in the model's order.

        Args:
          part: the first row and the end; None takes all.
        """
        data = self.stored.data
        if len(self.shape) == 1:  # a vector is one row, whose numbers are put in order by `read`
            return data
        data = data if self.order is None else data[self.order]
        return data if part is None else data[slice(*part)]

    def read(self) -> np.ndarray:
        """All values in float32, of shape `shape`."""
        rows = self.rows()
        values = np.empty((len(rows), self.shape[-1]), np.float32)
        for at, numbers in self.stored.blocks.pieces(rows):
            values[at] = numbers
        self.stored.forget()
        values = values.reshape(self.shape)
        if len(self.shape) == 1 and self.order is not None:
            values = values[self.order]
        return values + np.float32(self.shift) if self.shift else values


_BFLOAT16 = Kind(16, 64)
_ROWS = 4096  # that are laid out at a time: whole panels


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A weight that will be narrow.

    Attributes:
      leaf: the path of the layer that holds it.
      shape: (*o, i) of one layer's matrix in storage order.
      blocks: the types of its tensors in the file.
    """

    leaf: str
    shape: tuple[int, ...]
    blocks: frozenset[Blocks]

    @property
    def kind(self) -> Kind:
        """What holds all of the types."""
        bits = [each.bits or 16 for each in self.blocks]
        if max(bits) == 16:
            return _BFLOAT16
        group = min(each.group for each in self.blocks)
        # A group of int4 lies within one half of its row: else each scale is there twice.
        twice = max(bits) == 4 and self.shape[-1] // group % 2
        minima = {each.minima for each in self.blocks}
        half = len(minima) == 1 and all(each.half for each in self.blocks)
        return Kind(max(bits), group // 2 if twice else group, any(minima), half)


def load_narrow(
    net: Layer,
    shapes: Tree,
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    ignored: Sequence[str],
    what: str,
    kept: Callable[[Any, Callable[[], Flat]], Flat],
) -> tuple[Layer, Tree]:
    """Makes weights of tensors, narrow where that changes nothing and bfloat16 otherwise.

    Args:
      net: the model, wide.
      shapes: its weights as `jax.ShapeDtypeStruct`.
      entries: one for each weight.
      tensors: by name.
      ignored: patterns of names of tensors that are not needed.
      what: the name of the model, for messages.
      kept: returns what a function makes, or what it made before for the same model, of which it is
        told what will be narrow, and how.

    Returns:
      The model with layers that hold narrow weights, and the weights.

    Raises:
      UsageError: if tensors are missing, left over or misshapen, or do not fit into the memory.
    """
    flat, declared = trees.flatten(shapes), axes(net, shapes)
    check(flat, declared, entries, tensors, ignored)
    matrices = {
        entry.ours: matrix
        for entry in entries
        if (matrix := _matrix(net, entry, flat[entry.ours].shape, tensors)) is not None
    }
    kinds = _one_kind_a_leaf(net, matrices)
    narrow = hold_narrow(net, kinds)

    def make() -> Flat:
        check_fits(sum(_n_bytes(flat[e.ours], matrices.get(e.ours), kinds) for e in entries), what)
        made: Flat = {}
        before: Sequence[str] = ()
        for entry in entries:
            for name in before:
                tensors[name].stored.forget()
            before = entry.names
            matrix, shape = matrices.get(entry.ours), flat[entry.ours].shape
            if matrix is None:
                made[entry.ours] = buffers.taken(_vectors(entry, tensors).reshape(shape))
            else:
                made |= _of_matrix(narrow, entry, matrix, tensors, kinds[matrix.leaf])
        return made

    return narrow, trees.unflatten(kept([described(shapes), kinds], make))


def load_wide(
    net: Layer,
    shapes: Tree,
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    ignored: Sequence[str],
    what: str,
) -> tuple[Layer, Tree]:
    """Makes float32 weights of tensors of any type; arguments and errors as of `load_narrow`."""
    flat = trees.flatten(shapes)
    check(flat, axes(net, shapes), entries, tensors, ignored)
    check_fits(sum(4 * math.prod(x.shape) for x in flat.values()), what)
    return net, fill_wide(net, shapes, entries, tensors, ignored=ignored)


def stored(
    net: Layer, weights: Tree, entries: Sequence[Entry], *, as_they_are: bool
) -> Iterator[tuple[str, tuple[int, ...], Blocks, np.ndarray]]:
    """The tensors of a model: the inverse of `load_narrow` and `load_wide`.

    Args:
      net: the model, wide or narrow.
      weights: its weights.
      entries: one for each weight.
      as_they_are: whether integers for which GGUF has no blocks are refused; else they come as
        float32.

    Yields:
      The name of each tensor, its shape, its type and its rows (M, bytes) uint8.

    Raises:
      UsageError: for integers that GGUF cannot hold.
    """
    flat = dict(trees.flatten(weights))
    wide = hold_wide(net)
    for entry in entries:
        leaf, rest, _ = holder(wide, entry.ours)
        values = np.asarray(flat[entry.ours])
        if values.dtype == np.float32 or rest not in narrow_axes(bare(leaf)):
            one = trees.unflatten({entry.ours: flat[entry.ours]})
            for name, tensor in spill(wide, one, [entry]):
                blocks, rows = plain(np.atleast_2d(tensor))
                yield name, tensor.shape, blocks, rows
            continue
        scales = flat.get(entry.ours + SCALES)
        lead = 1 if entry.layers is None else len(entry.names)
        values = values.reshape(lead, -1, values.shape[-1])
        every = None
        if scales is not None:
            every = np.asarray(scales, np.float32).reshape(*values.shape[:2], -1)
        kept, _, _ = holder(net, entry.ours)
        if values.dtype == np.uint32:
            values, every = as_rows(values, every, 1, bits_of(kept))
        bits, minima = bits_of(kept), isinstance(kept, Quantized) and kept.minima
        for i, name in enumerate(entry.names):
            if every is None:
                made = plain(values[i])
            else:
                try:
                    made = (with_minima if minima else packed)(values[i], every[i])
                except UsageError:
                    if as_they_are:
                        raise
                    matrix = Narrow(values[i], every[i], 'oi', bits, minima=minima)
                    made = plain(np.asarray(matrix.wide()))
            length = made[1].shape[-1] // made[0].n_bytes * made[0].size
            yield name, (len(values[i]), length), *made


def _matrix(
    net: Layer, entry: Entry, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> _Matrix | None:
    """What is to be known of a weight that may be narrow; None for others."""
    layer, rest, stacked = holder(net, entry.ours)
    letters = narrow_axes(bare(layer)).get(rest)
    if letters is None or entry.transposed == (letters == 'oi'):
        return None
    own = shape[stacked:]
    o, i = ([n for n, axis in zip(own, letters, strict=True) if axis == side] for side in 'oi')
    blocks = frozenset(tensors[name].stored.blocks for name in entry.names)
    leaf = entry.ours.removesuffix(rest).rstrip('/')
    return _Matrix(leaf, (*o, math.prod(i)), blocks)


def _one_kind_a_leaf(net: Layer, matrices: Mapping[str, _Matrix]) -> dict[str, Kind]:
    """The kind by the path of the leaf; both ends of a tie are alike."""
    kinds: dict[str, Kind] = {}
    for matrix in matrices.values():
        before, here = kinds.setdefault(matrix.leaf, matrix.kind), matrix.kind
        most = Kind(
            max(before.bits, here.bits),
            min(before.group_size, here.group_size),
            before.minima or here.minima,
            before.half_scales and here.half_scales and before.minima == here.minima,
        )
        kinds[matrix.leaf] = _BFLOAT16 if most.bits == 16 else most
    for _, layer in walk(net):
        if isinstance(layer, Tied):
            source, target = (path.rpartition('/')[0] for path in (layer.source, layer.target))
            if source in kinds:
                kinds[target] = kinds[source]
    return kinds


def _n_bytes(like: Any, matrix: _Matrix | None, kinds: Mapping[str, Kind]) -> int:
    """How many bytes a weight will take, with its scales."""
    n = math.prod(like.shape)
    if matrix is None:
        return 4 * n
    bits, group, minima, half = kinds[matrix.leaf]
    return n * bits // 8 + (0 if bits == 16 else (1 + minima) * (2 if half else 4) * n // group)


def _of_matrix(
    narrow: Layer, entry: Entry, matrix: _Matrix, tensors: Mapping[str, Tensor], kind: Kind
) -> Flat:
    """A narrow weight by its path, and its scales if it has some.

    Args:
      narrow: the model with layers that hold narrow weights.
      entry: of the weight.
      matrix: what is known of it.
      tensors: by name.
      kind: of the leaf.
    """
    stack = [tensors[name].rows(entry.part) for name in entry.names]
    each_type = [tensors[name].stored.blocks for name in entry.names]
    lead = () if entry.layers is None else (len(stack),)
    if kind.bits == 16:
        values = _bfloat16(each_type, stack)
        return {entry.ours: buffers.taken(values.reshape(*lead, *matrix.shape))}
    layer, rest, _ = holder(narrow, entry.ours)
    assert isinstance(layer, Quantized)
    stored = _laid_out(layer, rest, each_type, stack, kind)
    return {
        path: buffers.taken(each.reshape(*lead, *matrix.shape[:-1], -1))
        for path, each in zip((entry.ours, entry.ours + SCALES), stored, strict=True)
    }


def _laid_out(
    layer: Quantized, path: str, types: Sequence[Blocks], stack: Sequence[np.ndarray], kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales as the leaf keeps them, (layers, M, …), made of some rows at a time.

    Args:
      layer: the leaf.
      path: of the weight in it.
      types: of each layer's rows.
      stack: the rows of each layer, (M, bytes) uint8.
      kind: of the leaf.
    """
    made: list[np.ndarray] = []
    for i, (blocks, data) in enumerate(zip(types, stack, strict=True)):
        for first in range(0, len(data), _ROWS):
            rows = slice(first, first + _ROWS)
            parts = layer.stored(path, *_integers(blocks, data[rows], kind), n_o=1)
            if not made:
                shape = len(stack), len(data)
                made = [buffers.empty((*shape, x.shape[-1]), x.dtype) for x in parts]
            for whole, part in zip(made, parts, strict=True):
                whole[i, rows] = part
    return made[0], made[1]


def _integers(blocks: Blocks, data: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Rows as values and scales of narrow weights, see `layers.quantized.matrix`.

    Args:
      blocks: the type, one with bits.
      data: (M, bytes) uint8.
      kind: what it becomes, with as many bits at least, and groups that are no larger.
    """
    q, scales = integers(blocks, data)
    parts = list(np.split(scales, 1 + blocks.minima, axis=-1))
    if kind.minima:
        half, more = 1 << (kind.bits - 1), 1 << ((blocks.bits or 0) - 1)
        if blocks.minima:  # integers count from 0, whatever the bits
            q = (q.astype(np.int16) + (more - half)).astype(np.int8)
        else:
            parts.append(-half * parts[0])
    repeats = blocks.group // kind.group_size
    scales = np.concatenate([np.repeat(part, repeats, -1) for part in parts], -1)
    scales = scales.astype(np.float16 if kind.half_scales else np.float32)
    return (pack4(q.view(np.uint8)) if kind.bits == 4 else q), scales


def _vectors(entry: Entry, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The float32 values of a weight that stays wide, one layer after the other."""
    found = [entry.cut(tensors[name].read()) for name in entry.names]
    found = [x.T if entry.transposed else x for x in found]
    return np.stack(found, out=buffers.empty((len(found), *found[0].shape), np.float32))


def _bfloat16(kinds: Sequence[Blocks], stack: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of any type in bfloat16, (layers, M, N)."""
    length = stack[0].shape[1] // kinds[0].n_bytes * kinds[0].size
    values = buffers.empty((len(stack), len(stack[0]), length), ml_dtypes.bfloat16)
    for i, (blocks, rows) in enumerate(zip(kinds, stack, strict=True)):
        for at, numbers in blocks.pieces(rows):
            values[i, at] = numbers
    return values
