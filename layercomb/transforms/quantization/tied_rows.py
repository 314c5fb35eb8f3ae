"""`TiedRows`: a tie whose two ends are narrow, and stored alike."""

from __future__ import annotations

from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import SCALES
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


class TiedRows(Tied):
    """A `Tied` model whose two ends are narrow: they share the rows, and the scales of the rows.

    A table (V, D) and a kernel (D, V) are stored alike when they are narrow, as V rows of D, so
    both ends read one array, and nothing is transposed.

    Attributes:
      layer: the model.
      source: the path of the weight that exists, e.g. ``'embedding/table'``.
      target: the path of the weight that it is too, e.g. ``'head/kernel'``.
      via: what made the one of the other when they were wide; it is not called.
    """

    def init_with_outputs(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        """As of `Tied`; the scales at `target` are left out too."""
        outputs, weights, state = super().init_with_outputs(signature, rng, mode)
        scales = self.target + SCALES
        return outputs, trees.drop(weights, scales) if _has(weights, scales) else weights, state

    def misfit(self, whole: Tree) -> str | None:
        """Why the rows at `source` cannot be used at `target`; None if they can.

        Args:
          whole: the weights of the model without the tie.

        Raises:
          KeyError: if one of the paths does not exist.
        """
        ends = [trees.get(whole, path) for path in (self.source, self.target)]
        source, target = (f'{end.dtype}{list(end.shape)}' for end in ends)
        if source == target:
            return None
        return (
            f'{self.source!r} is {source} and {self.target!r} is {target}: both must be narrow, '
            'in as many bits'
        )

    def untied(self, weights: Tree) -> Tree:
        """The weights of the model without the tie: rows and scales are filled in."""
        whole = trees.put(weights, self.target, trees.get(weights, self.source))
        if not _has(weights, self.source + SCALES):
            return whole
        return trees.put(whole, self.target + SCALES, trees.get(weights, self.source + SCALES))

    def tied(self, whole: Tree) -> Tree:
        """The inverse of `untied`: rows and scales at `target` are left out."""
        weights, scales = super().tied(whole), self.target + SCALES
        return trees.drop(weights, scales) if _has(weights, scales) else weights


def _has(weights: Tree, path: str) -> bool:
    try:
        trees.get(weights, path)
    except KeyError:
        return False
    return True
