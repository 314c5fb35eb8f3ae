"""`ClassNames`: what the logits of a classifier stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.shapes import Signature
from layercomb.trees import Tree

Label = str | int


class ClassNames(Layer):
    """y = x, a logit for each named class: (…, N) → (…, N).

    It is the last layer of a classifier that `transforms.classifier` makes, so that a model says
    what it tells apart, wherever it goes.

    Attributes:
      names: N different strings or integers, in the order of the logits.

    Raises:
      ValueError: for fewer than two names, or one twice; when applied, for another number of
        logits.
    """

    position_wise = True

    names: tuple[Label, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f'ClassNames: give two or more different names, got {self.names!r}')

    def init(self, signature: Signature, rng: Any, mode: Mode = Mode.TRAIN) -> tuple[Tree, Tree]:
        """No weights and no state; checks the number of logits."""
        self._check(signature[0])
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The logits, unchanged."""
        self._check(inputs[0])
        return inputs, state

    def _check(self, x: Any) -> None:
        if x.shape[-1:] != (len(self.names),):
            raise ValueError(
                f'ClassNames has {len(self.names)} names, got logits {tuple(x.shape)}: give '
                'tl.Dense before it as many units'
            )


def class_names(net: Layer) -> Sequence[Label] | None:
    """The names of a classifier's classes; None for a model that names none."""
    found = (layer.names for _, layer in walk(net) if isinstance(layer, ClassNames))
    return next(found, None)
