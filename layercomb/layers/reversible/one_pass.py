"""Outputs and gradients of a layer in one pass: `one_pass`, and what its rules ask of layers."""

from __future__ import annotations

import jax

from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import Cotangents, matched, vjp
from layercomb.layers.reversible.rules import Rules
from layercomb.trees import Tree


@Rules
def one_pass(
    layer: Layer,
    weights: Tree,
    state: Tree,
    inputs: Arrays,
    cts: Cotangents,
    *,
    rng: jax.Array | None = None,
    mode: Mode = Mode.TRAIN,
    state_cts: Tree | None = None,
) -> tuple[Arrays, Cotangents, Tree]:
    """Outputs and gradients in one pass, for a caller who knows the outputs' cotangents.

    Reversible layers use it in their backward pass. By default it is `jax.vjp` of the layer's
    `apply`. A class of layers that can do better has a rule: `Chunk` computes each slice once,
    attention goes head by head. A layer of one's own joins by `one_pass.register`. A subclass
    that overrides `apply` (or `route`) does not inherit the rule of the class above.

    Args:
      layer: any layer.
      weights, state, inputs, rng, mode: as of `apply`; `state` is taken as constant.
      cts: of the outputs; they may be wider than these, and are None for integers.
      state_cts: of the new state (its auxiliary losses), by path; what is absent is zero.

    Returns:
      Outputs, cotangents of inputs, cotangents of weights: None for what is no float.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> class Square(tl.Layer):
    ...     def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
    ...         (x,) = inputs
    ...         return (x * x,), state
    >>> x, ct = jnp.float32(3), jnp.float32(1)
    >>> outputs, d_inputs, d_weights = tl.one_pass(Square(), {}, {}, (x,), (ct,))
    >>> float(outputs[0]), float(d_inputs[0]), d_weights
    (9.0, 6.0, {})

    The same as a rule:

    >>> @tl.one_pass.register(Square)
    ... def _(layer, weights, state, inputs, cts, *, rng, mode, state_cts):
    ...     (x,), (ct,) = inputs, cts
    ...     print('by the rule')
    ...     return (x * x,), (2 * x * ct,), {}
    >>> net = tl.Serial(tl.Fn('Half', lambda x: x / 2), Square())
    >>> float(tl.one_pass(net, {}, {}, (x,), (ct,))[1][0])
    by the rule
    1.5
    """

    def run(weights: Tree, inputs: Arrays) -> tuple[Arrays, Tree]:
        return layer.apply(weights, state, inputs, rng=rng, mode=mode)

    (outputs, new), pull = vjp(run, weights, tuple(inputs))
    d_weights, d_inputs = pull((tuple(cts), matched(state_cts, new)))
    return outputs, d_inputs, d_weights


@Rules
def recomputes(layer: Layer) -> bool:
    """Whether the gradient of a layer computes the layer again; False by default.

    In one pass through layers in series, nothing inside such a layer is kept: its `one_pass` in the
    backward pass makes outputs and gradients together. It is true of `Remat` and `Chunk`.
    """
    return False


@Rules
def is_diagonal(layer: Layer) -> bool:
    """Whether a layer multiplies its one input by numbers that depend on the key alone.

    Then cotangents go the same way as values, by `apply`, and in one pass the layer before it knows
    the cotangents of its outputs. Such a layer has no weights and no state. False by default; it is
    true of `Dropout`.
    """
    return False
