"""`Remat`: computes its layer again in the backward pass."""

from __future__ import annotations

from typing import Any

import jax

from layercomb.layers.core.layer import Arrays, Key
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.trees import Tree


class Remat(Wrapper):
    """Computes its layer again in the backward pass instead of keeping the activations inside.

    Under `Repeat`, training keeps only each block's inputs, so its memory grows with
    depth by these alone.

    Attributes:
      layer: the layer.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Applies the layer under `jax.checkpoint`; plainly in ``PREDICT``."""
        if mode is Mode.PREDICT:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        def run(weights: Tree, state: Tree, inputs: Arrays, rng: Any) -> tuple[Arrays, Tree]:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        return jax.checkpoint(run)(weights, state, tuple(inputs), rng)
