"""Named tensors of other libraries, and the weights of ours that they become.

A family of models lists its tensors as `Entry` values: the path of a weight here, and the name of
the tensor there. Everything else follows from the axes that our layers declare: `fill` makes
weights of tensors, and `spill` makes tensors of weights. Both check each tensor.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.facts.axes import Axes
from layercomb.transforms import buffers
from layercomb.transforms.weight_axes import axes
from layercomb.trees import Tree

_SHOWN = 8  # names in a message


class Tensor(Protocol):
    """A tensor in a file: its shape is known before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, outermost axis first."""

    def read(self) -> np.ndarray:
        """The values, floating; a view of the file where that is possible."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight of ours, and the tensor or tensors that it is made of.

    Attributes:
      ours: the path of the weight.
      theirs: the name of the tensor; ``{}`` stands for the number of the layer.
      transposed: whether theirs is (out, in), as of ``torch.nn.Linear``, where ours is (in, out).
      layers: the numbers of the layers that `Repeat` stacks in ours; None if it is not stacked.
      part: the rows (first, end) of a fused tensor, along its axis of results; None takes all.
      is_row: whether theirs, a vector, has a first axis of 1.
      also: other names that the tensor may have. One of all these must be there, and if there are
        several, such as both ends of a tied table, they must be equal.
      alike: whether several must be equal; if not, the first of them is read.
      one_at: the place of an axis of 1 that theirs, a matrix, has besides; None for none.
    """

    ours: str
    theirs: str
    transposed: bool = False
    layers: Sequence[int] | None = None
    part: tuple[int, int] | None = None
    is_row: bool = False
    also: tuple[str, ...] = ()
    alike: bool = True
    one_at: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, one for each layer."""
        return tuple(names[0] for names in self.all_names)

    @property
    def all_names(self) -> tuple[tuple[str, ...], ...]:
        """For each layer all names that its tensor may have, the usual one first."""
        known = (self.theirs, *self.also)
        if self.layers is None:
            return (known,)
        return tuple(tuple(name.format(i) for name in known) for i in self.layers)

    def shape(self, ours: Sequence[int], declared: Axes) -> tuple[int, ...]:
        """The shape of one tensor, or of the part of it.

        Args:
          ours: the shape of our weight.
          declared: its axes.
        """
        stacked = 0 if self.layers is None else 1
        if declared.is_vector or len(ours) == stacked + 1:
            n = math.prod(ours[stacked:])
            return (1, n) if self.is_row else (n,)
        first, second = (
            math.prod(ours[a] for a in side) for side in (declared.first, declared.second)
        )
        made = [second, first] if self.transposed else [first, second]
        if self.one_at is not None:
            made.insert(self.one_at, 1)
        return tuple(made)

    def cut(self, tensor: np.ndarray) -> np.ndarray:
        """The part of a fused tensor; the whole tensor if there is no part."""
        if self.part is None:
            return tensor
        rows = slice(*self.part)
        return tensor[rows] if self.transposed or tensor.ndim == 1 else tensor[..., rows]


def linear(ours: str, theirs: str, layers: Sequence[int] | None = None, **more: Any) -> Entry:
    """The entry of a kernel that is a ``torch.nn.Linear`` there: transposed.

    Args:
      ours, theirs, layers: as of `Entry`.
      **more: other fields of it.
    """
    return Entry(ours, theirs, True, layers, **more)


def fill(
    net: Layer,
    shapes: Tree,
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    *,
    ignored: Sequence[str] = (),
    dtype: Any = 'float32',
) -> Tree:
    """Makes weights of tensors.

    Args:
      net: the model.
      shapes: its weights as `jax.ShapeDtypeStruct`, by ``jax.eval_shape``.
      entries: one or several for each weight.
      tensors: by name.
      ignored: patterns of names that hold nothing to load, such as a table of sines.
      dtype: of the weights, or a function from a path to the dtype of that weight.

    Returns:
      The weights, a nested dict of JAX arrays.

    Raises:
      UsageError: if tensors are missing, left over, or of another shape, naming them together.
    """
    flat, declared = trees.flatten(shapes), axes(net, shapes)
    check(flat, declared, entries, tensors, ignored)
    made: dict[str, Any] = {}
    for entry in entries:
        like = flat[entry.ours]
        shape = like.shape if entry.layers is None else like.shape[1:]
        given = dtype(entry.ours) if isinstance(dtype, FunctionType) else dtype
        stack = buffers.empty((len(entry.names), *shape), jnp.dtype(given))
        for i, names in enumerate(entry.all_names):
            tensor = entry.cut(_read(names, tensors, entry.alike))
            stack[i] = (tensor.T if entry.transposed else tensor).reshape(shape)
        made[entry.ours] = buffers.taken(stack[0] if entry.layers is None else stack)
    return trees.unflatten(made)


def spill(net: Layer, weights: Tree, entries: Sequence[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Makes tensors of weights: the inverse of `fill`.

    Args:
      net: the model.
      weights: its weights.
      entries: as of `fill`.

    Yields:
      The name of each tensor and its values, in the dtype of the weights.

    Raises:
      UsageError: if a weight is in no entry, which would be lost.
    """
    flat, declared = trees.flatten(weights), axes(net, weights)
    lost = sorted(flat.keys() - {entry.ours for entry in entries})
    if lost:
        raise UsageError(f'the other format has no place for {_some(lost)}: nothing is written')
    # The parts of a fused tensor come together, so no more than one of each is held.
    fused: dict[tuple[str, tuple[int, ...]], list[Entry]] = {}
    for entry in entries:
        fused.setdefault((entry.theirs, tuple(entry.layers or ())), []).append(entry)
    for parts in fused.values():
        parts.sort(key=lambda each: each.part or (0, 0))
        first = parts[0]
        stacks = [_their_stack(x, np.asarray(flat[x.ours]), declared[x.ours]) for x in parts]
        for name, *tensors in zip(first.names, *stacks, strict=True):
            axis = 0 if first.transposed or tensors[0].ndim == 1 else tensors[0].ndim - 1
            yield name, np.concatenate(tensors, axis) if len(tensors) > 1 else tensors[0]


def _their_stack(entry: Entry, ours: np.ndarray, declared: Axes) -> Iterator[np.ndarray]:
    """The tensors of an entry, or its parts of them, one for each layer."""
    # Their shape is that of our axes, merged; a transposed one is merged before it is turned.
    shape = dataclasses.replace(entry, transposed=False).shape(ours.shape, declared)
    for one in ours[None] if entry.layers is None else ours:
        tensor = one.reshape(shape)
        yield np.ascontiguousarray(tensor.T) if entry.transposed else tensor


def check(
    flat: Mapping[str, Any],
    declared: Mapping[str, Axes],
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    ignored: Sequence[str],
) -> None:
    """Raises a UsageError that names all tensors that are missing, left over or misshapen.

    Args:
      flat: our weights by path, arrays or `jax.ShapeDtypeStruct`.
      declared: their axes by path.
      entries, tensors, ignored: as of `fill`.
    """
    unknown = sorted(flat.keys() ^ {entry.ours for entry in entries})
    if unknown:
        raise ValueError(f'the entries of this family do not list {_some(unknown)} once each')
    wanted = _wanted(flat, declared, entries)
    missing = [names[0] for names in wanted if not any(name in tensors for name in names)]
    known = {name: shape for names, shape in wanted.items() for name in names}
    left = [
        name
        for name in tensors
        if name not in known and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    misshapen = [
        f'{name} is {tuple(tensors[name].shape)} and not {shape}'
        for name, shape in known.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    wrong = [('missing', missing), ('left over', left), ('misshapen', misshapen)]
    found = [f'{what}: {_some(names)}' for what, names in wrong if names]
    if found:
        raise UsageError(
            f'the tensors do not fit the configuration ({"; ".join(found)}): take both from the '
            'same model'
        )


def _wanted(
    flat: Mapping[str, Any], declared: Mapping[str, Axes], entries: Sequence[Entry]
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each tensor by its names; the parts of a fused one are added up."""
    wanted: dict[tuple[str, ...], tuple[int, ...]] = {}
    for entry in entries:
        shape = entry.shape(flat[entry.ours].shape, declared[entry.ours])
        for names in entry.all_names:
            if entry.part is not None and names in wanted:
                axis = 0 if entry.transposed or len(shape) == 1 else len(shape) - 1
                before = wanted[names]
                whole = before[axis] + shape[axis]
                wanted[names] = (*before[:axis], whole, *before[axis + 1 :])
            else:
                wanted[names] = shape
    return wanted


def _read(names: Sequence[str], tensors: Mapping[str, Tensor], alike: bool) -> np.ndarray:
    """The tensor under the first of its names that is there.

    Raises:
      UsageError: if there are several that must be alike, and they differ.
    """
    first, *others = (name for name in names if name in tensors)
    made = tensors[first].read()
    for name in others if alike else ():
        if not np.array_equal(tensors[name].read(), made):
            raise UsageError(
                f'the tensors {first} and {name} differ, and the configuration says that they are '
                'one: take both from the same model, or set "tie_word_embeddings": false'
            )
    return made


def shapes_of(net: Layer, signature: Any) -> Tree:
    """The weights of a model as `jax.ShapeDtypeStruct`; nothing is computed.

    Args:
      net: the model.
      signature: of its inputs.
    """
    made: Tree = jax.eval_shape(lambda rng: net.init(signature, rng)[0], jax.random.key(0))
    return made


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
