"""Modules of the other library, and the matrices of ours that each is made of.

An adapter there belongs to a module, such as ``model.layers.0.self_attn.q_proj``, and has the
factors A (r, in) and B (out, r). Here it belongs to a matrix, such as ``…/query/kernel``, with A
(*i, r) and B (r, *o). A module may be a part of our weight (one of the layers that `Repeat`
stacks), or may be made of several of ours (GPT-2's c_attn of query, key and value).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layercomb import trees
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.tensors import Entry, shapes_of
from layercomb.layers.core.layer import Layer
from layercomb.transforms.low_rank.products import LEAVES
from layercomb.transforms.tying import Tied
from layercomb.transforms.weight_axes import axes, holder

_WEIGHT, _HEAD = '.weight', 'lm_head'


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of ours, which is a module there or a part of one.

    Attributes:
      path: of the weight.
      number: which of the stacked ones; None if none are stacked.
      n_stacked: how many are stacked; None if none are.
      summed, given: the sizes of the axes i that a product sums over, and of the results o.
      rows: the results (first, end) of the module that are its own; None for all.
    """

    path: str
    number: int | None
    n_stacked: int | None
    summed: tuple[int, ...]
    given: tuple[int, ...]
    rows: tuple[int, int] | None

    @property
    def leaf(self) -> str:
        """The path of the leaf that has it."""
        return self.path.rpartition('/')[0]

    @property
    def n_results(self) -> int:
        """How many results a product has."""
        return math.prod(self.given)

    def our_a(self, a: np.ndarray) -> np.ndarray:
        """Their A (r, in) as ours, (*i, r)."""
        return np.ascontiguousarray(a.T).reshape(*self.summed, len(a))

    def our_b(self, b: np.ndarray) -> np.ndarray:
        """Their B (out, r), the rows of this matrix alone, as ours, (r, *o)."""
        return np.ascontiguousarray(b.T).reshape(b.shape[1], *self.given)

    def their_a(self, a: np.ndarray) -> np.ndarray:
        """The inverse of `our_a`."""
        return np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)

    def their_b(self, b: np.ndarray) -> np.ndarray:
        """The inverse of `our_b`."""
        return np.ascontiguousarray(b.reshape(len(b), -1).T)


@dataclasses.dataclass(frozen=True)
class Module:
    """A module there.

    Attributes:
      name: of it.
      number: of its layer; None outside of layers.
      parts: the matrices that it is made of, in their order.
      transposed: whether its weight is (out, in), as of ``torch.nn.Linear``.
    """

    name: str
    number: int | None
    parts: tuple[Matrix, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """How many results it has, and how wide its inputs are."""
        return sum(part.n_results for part in self.parts), math.prod(self.parts[0].summed)


@dataclasses.dataclass(frozen=True)
class Modules:
    """All modules of a model that may have adapters.

    Attributes:
      by_name: under the usual name of each.
      also: other names -> the usual ones.
      entries: of all tensors of the model.
      family: whose names they are.
    """

    by_name: Mapping[str, Module]
    also: Mapping[str, str]
    entries: Sequence[Entry]
    family: Family

    def find(self, name: str) -> Module | None:
        """The module of a name; None if there is none."""
        return self.by_name.get(self.also.get(name, name))


def modules_of(net: Layer, family: Family, config: Mapping[str, Any]) -> Modules:
    """The modules of a model.

    Args:
      net: the model, plain and wide.
      family, config: as of `families.config_of`.
    """
    entries = family.entries(Config(config))
    shapes = shapes_of(net, family.signature(net))
    flat, declared = trees.flatten(shapes), axes(net, shapes)
    parts: dict[str, list[Matrix]] = {}
    known: dict[str, tuple[int | None, bool]] = {}
    also: dict[str, str] = {}
    for entry in entries:
        layer, _, _ = holder(net, entry.ours)
        its = declared[entry.ours]
        if not isinstance(layer, LEAVES) or not its.is_matrix or entry.one_at is not None:
            continue
        shape = flat[entry.ours].shape
        summed, given = (tuple(shape[a] for a in side) for side in (its.summed, its.given))
        n = None if entry.layers is None else len(entry.layers)
        numbers: Sequence[int | None] = [None] if entry.layers is None else list(entry.layers)
        for i, (names, number) in enumerate(zip(entry.all_names, numbers, strict=True)):
            name, *others = (each.removesuffix(_WEIGHT) for each in names)
            at = None if n is None else i
            matrix = Matrix(entry.ours, at, n, summed, given, entry.part)
            parts.setdefault(name, []).append(matrix)
            known[name] = number, entry.transposed
            also |= dict.fromkeys(others, name)
    by_name = {
        name: Module(name, known[name][0], tuple(sorted(its, key=_first)), known[name][1])
        for name, its in parts.items()
    }
    by_name |= _tied_head(net, entries, flat)
    return Modules(by_name, also, entries, family)


def _tied_head(net: Layer, entries: Sequence[Entry], flat: Mapping[str, Any]) -> dict[str, Module]:
    """The head of a model that is the table of its embedding: it may have an adapter of its own."""
    if not isinstance(net, Tied):
        return {}
    names = (name for entry in entries if entry.ours == net.source for name in entry.also)
    name = next((name for name in names if name.endswith(_HEAD + _WEIGHT)), None)
    if name is None:
        return {}
    rows, width = flat[net.source].shape
    matrix = Matrix(net.target, None, None, (width,), (rows,), None)
    name = name.removesuffix(_WEIGHT)
    return {name: Module(name, None, (matrix,), transposed=True)}


def with_tied_head(net: Layer, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by path, with the head's where it is the table of the embedding.

    Args:
      net: the model, wide.
      flat: its weights.
    """
    if not isinstance(net, Tied) or net.source not in flat:
        return dict(flat)
    return {**flat, net.target: np.asarray(flat[net.source]).T}


def _first(matrix: Matrix) -> int:
    return matrix.rows[0] if matrix.rows else 0
