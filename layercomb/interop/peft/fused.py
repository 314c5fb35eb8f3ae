"""The adapter of one module there, from those of the matrices that it is made of here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layercomb.interop.peft.modules import Matrix
from layercomb.interop.peft.names import Factors


@dataclasses.dataclass(frozen=True)
class Part:
    """A matrix, and its adapter if it has one.

    Attributes:
      matrix: which.
      scale: what multiplies the product of its factors.
      values: 'a' (*i, r), 'b' (r, *o) and perhaps 'magnitude' (*o); empty without an adapter.
    """

    matrix: Matrix
    scale: float
    values: Mapping[str, np.ndarray]

    @property
    def path(self) -> str:
        """The path of the matrix."""
        return self.matrix.path

    @property
    def is_adapted(self) -> bool:
        """Whether it has an adapter other than zeros."""
        return bool(self.values) and len(self.factors()[0]) > 0

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in) and B (out, r), without the ranks at the end that are padding: zeros in both.

        An A that was drawn has no zeros, so what was not trained yet is no padding.
        """
        a = self.matrix.their_a(self.values['a'])
        b = self.matrix.their_b(self.values['b'])
        used = np.flatnonzero(a.any(1) | b.any(0))
        rank = used[-1] + 1 if len(used) else 0
        return a[:rank], b[:, :rank]


def fused(parts: Sequence[Part], base: Mapping[str, Any]) -> tuple[Factors, float]:
    """The factors of a module, and the scale of their product.

    Parts with one A share it. Others stand side by side: A is stacked, and B is block-diagonal.

    Args:
      parts: of the module, in order; at least one has an adapter.
      base: the wide weights by path, which give the magnitudes of parts without adapters.
    """
    adapted = [part for part in parts if part.is_adapted]
    factors = [part.factors() for part in adapted]
    scale = adapted[0].scale
    first = factors[0][0]
    n_rows = sum(part.matrix.n_results for part in parts)
    shared = all(np.array_equal(a, first) for a, _ in factors)
    a = first if shared else np.concatenate([a for a, _ in factors])
    b = np.zeros((n_rows, len(a)), np.float32)
    row = column = 0
    blocks = iter(factors)
    for part in parts:
        rows = slice(row, row + part.matrix.n_results)
        row = rows.stop
        if not part.is_adapted:
            continue
        _, block = next(blocks)
        at = 0 if shared else column
        ratio = np.float32(part.scale / scale)
        b[rows, at : at + block.shape[1]] = block if ratio == 1 else block * ratio
        column += block.shape[1]
    return Factors(a, b, _magnitudes(parts, base)), scale


def _magnitudes(parts: Sequence[Part], base: Mapping[str, Any]) -> np.ndarray | None:
    """Those of all parts; None if no part has any."""
    if not any('magnitude' in part.values for part in parts):
        return None
    return np.concatenate([_magnitude(part, base) for part in parts])


def _magnitude(part: Part, base: Mapping[str, Any]) -> np.ndarray:
    if 'magnitude' in part.values:
        return part.values['magnitude'].reshape(-1)
    matrix = part.matrix
    wide = np.asarray(base[matrix.path], np.float32)
    wide = wide if matrix.number is None else wide[matrix.number]
    norms: np.ndarray = np.sqrt(np.square(wide.reshape(-1, matrix.n_results)).sum(0))
    return norms
