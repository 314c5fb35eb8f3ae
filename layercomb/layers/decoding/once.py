"""`Once`: what decoding computes at its first call alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Arrays, Key
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.shapes import Signature
from layercomb.trees import Tree


def run_once(has_run: jax.Array, kept: Any, run: Callable[[Any], Any]) -> Any:
    """`kept` if `has_run`, and else what `run` makes of it.

    A loop of one round at most, and not a branch: a loop writes over what it is given, while a
    branch would copy at every call what it returns unchanged.
    """

    def body(carry: Any) -> Any:
        return jnp.ones((), bool), run(carry[1])

    return jax.lax.while_loop(lambda carry: ~carry[0], body, (has_run, kept))[1]


class Once(Wrapper):
    """A layer of a whole sequence, which in ``PREDICT`` runs once, as it evaluates.

    For the encoder of a model whose decoder takes its inputs step by step, and for what makes keys
    and values of a memory. It is handed the same sequence at every call, runs at the first, and
    keeps its outputs in the state. In other modes it is the layer itself.
    """

    carries_counted = True
    reads_memory = True

    position_wise = property(of_sublayers)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The layer's, without caches; in ``PREDICT`` with room for its outputs."""
        if mode is not Mode.PREDICT:
            return self.layer.init(signature, rng, mode)
        outputs, weights, state = self.layer.init_with_outputs(signature, rng, Mode.EVAL)
        made = {str(i): jnp.zeros(y.shape, y.dtype) for i, y in enumerate(outputs)}
        return weights, {'layer': state, 'outputs': made, 'has_run': jnp.zeros((), bool)}

    def inner_state(self, state: Tree) -> Tree:
        """The layer's own state, in this one's of ``PREDICT``."""
        inner: Tree = state['layer']
        return inner

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The layer's; in ``PREDICT`` what it gave at the first call."""
        if mode is not Mode.PREDICT:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        def run(_: Tree) -> Tree:
            made, _ = self.layer.apply(weights, self.inner_state(state), inputs, mode=Mode.EVAL)
            return {str(i): y for i, y in enumerate(made)}

        made = run_once(state['has_run'], state['outputs'], run)
        outputs = tuple(made[str(i)] for i in range(self.n_out))
        return outputs, {**state, 'outputs': made, 'has_run': jnp.ones((), bool)}
