"""`GatedDense`: a projection, multiplied by a gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import dense
from layercomb.layers.basic.initializers import Initializer, glorot_uniform, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import Signature, check_float
from layercomb.trees import Tree


class GatedDense(Layer):
    """y = act(x W_gate + b_gate) · (x W_up + b_up) over the last axis: (…, D_in) → (…, n_units).

    It is the first half of a gated feed-forward: SwiGLU with 'silu', GEGLU with 'gelu'. A `Dense`
    back to the width of the stream is the second half. The result has x's dtype, and products are
    summed in float32.

    Weights: ``gate`` and ``up`` (D_in, n_units) and, with `use_bias`, ``gate_bias`` and ``up_bias``
    (n_units,).

    Attributes:
      n_units: the width of the output.
      activation: of the gate: the name of an elementwise activation.
      use_bias: whether to add the two biases.
      kernel_init: of W_gate and W_up.
      bias_init: of the biases.

    Raises:
      TypeError: for integers.
      ValueError: for an unknown activation; when applied to an input of another width than D_in.

    References:
      Shazeer 2020, https://arxiv.org/abs/2002.05202

    >>> from layercomb import tl, shape_dtype
    >>> tl.GatedDense(3).output_signature(shape_dtype((2, 5)))
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32),)
    """

    n_units: Size
    activation: str = 'silu'
    use_bias: bool = False
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    weight_axes = {'gate': 'D->F', 'up': 'D->F', 'gate_bias': '->F', 'up_bias': '->F'}
    position_wise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        elementwise('GatedDense', self.activation)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights, float32, for an input (…, D_in); no state.

        Raises:
          TypeError: if the input is not floating-point, or has no axis.
        """
        (x,) = signature
        check_float('GatedDense', x)
        weights: Tree = {}
        for name, key in zip(('gate', 'up'), jax.random.split(rng), strict=True):
            kernel_key, bias_key = jax.random.split(key)
            weights[name] = self.kernel_init(kernel_key, (x.shape[-1], self.n_units))
            if self.use_bias:
                weights[f'{name}_bias'] = self.bias_init(bias_key, (self.n_units,))
        return weights, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D_in) → (…, n_units), in the input's dtype."""
        (x,) = inputs
        gate, up = (dense(self._kernel_and_bias(weights, name), x) for name in ('gate', 'up'))
        return (_gated(elementwise('GatedDense', self.activation), gate, up),), state

    def _kernel_and_bias(self, weights: Tree, name: str) -> Tree:
        """The weights of one of the two projections, as `dense` takes them."""
        bias = {'bias': weights[f'{name}_bias']} if self.use_bias else {}
        return {'kernel': weights[name], **bias}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gated(act: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) · up. Training keeps one array for each of the two gradients."""
    return act(gate) * up


@_gated.defjvp
def _gated_jvp(act: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (gate, up), (d_gate, d_up) = primals, tangents
    y, slope = jax.jvp(act, (gate,), (jnp.ones_like(gate),))
    return y * up, (slope * up) * d_gate + y * d_up
