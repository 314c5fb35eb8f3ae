"""`Once`: a layer that decoding computes only in its first call."""

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
    """`kept` if `has_run`, else ``run(kept)``.

    It is a loop of at most one round, since a loop updates its value in place; a branch would copy
    `kept` in every call.

    Args:
      has_run: bool ().
      kept: a tree of arrays.
      run: returns a tree of the same shapes and dtypes.
    """

    def body(carry: Any) -> Any:
        return jnp.ones((), bool), run(carry[1])

    return jax.lax.while_loop(lambda carry: ~carry[0], body, (has_run, kept))[1]


class Once(Wrapper):
    """A layer of a whole sequence that runs once in ``PREDICT``, as in ``EVAL``.

    It is for the encoder of a model whose decoder takes its inputs step by step, and for the keys
    and values of a memory. Every call is given the same sequence. The first call computes the
    outputs and keeps them in the state. In other modes it is the inner layer unchanged.
    """

    carries_counted = True
    reads_memory = True

    position_wise = property(of_sublayers)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The layer's weights and state; in ``PREDICT`` also room for its outputs, and no caches.

        Args:
          signature: of the layer's inputs.
          rng: a typed key.
          mode: see `Mode`.
        """
        if mode is not Mode.PREDICT:
            return self.layer.init(signature, rng, mode)
        outputs, weights, state = self.layer.init_with_outputs(signature, rng, Mode.EVAL)
        made = {str(i): jnp.zeros(y.shape, y.dtype) for i, y in enumerate(outputs)}
        return weights, {'layer': state, 'outputs': made, 'has_run': jnp.zeros((), bool)}

    def inner_state(self, state: Tree) -> Tree:
        """The inner layer's own state, from the state of ``PREDICT``."""
        inner: Tree = state['layer']
        return inner

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The layer's outputs and state; in ``PREDICT`` the outputs of the first call.

        Args:
          weights: of the layer.
          state: as of `init`.
          inputs: of the layer, the same in every call of ``PREDICT``.
          rng: a typed key, if the layer needs one; not used in ``PREDICT``.
          mode: see `Mode`.
        """
        if mode is not Mode.PREDICT:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        def run(_: Tree) -> Tree:
            made, _ = self.layer.apply(weights, self.inner_state(state), inputs, mode=Mode.EVAL)
            return {str(i): y for i, y in enumerate(made)}

        made = run_once(state['has_run'], state['outputs'], run)
        outputs = tuple(made[str(i)] for i in range(self.n_out))
        return outputs, {**state, 'outputs': made, 'has_run': jnp.ones((), bool)}
