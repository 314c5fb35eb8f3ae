"""`Dense`, and the matrix products that other layers use."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from layercomb.checks import Size
from layercomb.layers.basic.initializers import Initializer, glorot_uniform, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Matrix
from layercomb.shapes import Signature, as_deep, check_float, check_width
from layercomb.trees import Tree


class Dense(Layer):
    """y = x W + b over the last axis: (…, D_in) → (…, n_units), in x's dtype, summed in float32.

    Weights: ``kernel`` (D_in, n_units) and, unless `use_bias` is false, ``bias`` (n_units,).

    Attributes:
      n_units: the width of the output; None keeps the input's.
      use_bias: whether to add b.
      kernel_init: of W.
      bias_init: of b.

    Raises:
      TypeError: for integers.
      ValueError: when applied to an input of another width than D_in.

    >>> from layercomb import tl, shape_dtype
    >>> tl.Dense(3).output_signature(shape_dtype((2, 5)))
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32),)
    """

    n_units: Size | None = None
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    weight_axes = {'kernel': 'D->F', 'bias': '->F'}
    makes_logits = True
    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights, float32, for an input (…, D_in); no state.

        Raises:
          TypeError: if the input is not floating-point, or has no axis.
        """
        (x,) = signature
        check_float('Dense', x)
        d = x.shape[-1]
        n = self.n_units or d
        kernel_key, bias_key = jax.random.split(rng)
        weights = {'kernel': self.kernel_init(kernel_key, (d, n))}
        if self.use_bias:
            weights['bias'] = self.bias_init(bias_key, (n,))
        return weights, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…, D_in) → (…, n_units), in the input's dtype."""
        (x,) = inputs
        return (dense(weights, x),), state


def dense(weights: Tree, x: jax.Array) -> jax.Array:
    """x W + b in x's dtype, summed in float32.

    Args:
      weights: ``kernel`` (D_in, D_out), ``bias`` (D_out,) or none.
      x: (…, D_in).

    Returns:
      (…, D_out).

    Raises:
      ValueError: if the widths do not fit.
    """
    kernel = weights['kernel']
    check_width(x, kernel.shape[0])
    y = matmul(x, kernel).astype(x.dtype)
    return y + as_deep(weights['bias'], y) if 'bias' in weights else y


def matmul(x: jax.Array, kernel: jax.Array | Matrix) -> jax.Array:
    """x W, summed and returned in float32: (…, D), (D, F) → (…, F).

    Args:
      x: (…, D), of any floating dtype.
      kernel: (D, F), an array or a `Matrix`: quantized, or with an adapter.
    """
    if isinstance(kernel, Matrix):
        return kernel.product(x, jnp.float32)
    if jax.default_backend() != 'cpu':
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    y = _row_products(x.reshape(-1, x.shape[-1]), kernel)  # (…, D) → (N, D)
    return y.reshape(*x.shape[:-1], kernel.shape[1])  # (N, F) → (…, F)


@jax.custom_jvp
def _row_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(N, D), (D, F) → (N, F) float32, with a kernel gradient that is as fast on the CPU.

    The kernel's gradient sums over rows. XLA would read both factors across their rows, at half the
    speed. So the narrower factor is transposed, behind a barrier against merging it back.
    """
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


@functools.partial(_row_products.defjvp, symbolic_zeros=True)
def _row_products_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (d_x, d_kernel) = primals, tangents
    d_y = jnp.zeros((x.shape[0], kernel.shape[1]), jnp.float32)
    if not isinstance(d_x, SymbolicZero):
        d_y = _row_products(d_x, kernel)
    if not isinstance(d_kernel, SymbolicZero):
        # A checkpoint, so that x is kept and not its transpose.
        d_y = d_y + jax.checkpoint(_by_kernel_of_gradient, prevent_cse=False)(x, d_kernel)
    return _row_products(x, kernel), d_y


def _by_kernel_of_gradient(x: jax.Array, d_kernel: jax.Array) -> jax.Array:
    """x times a tangent of the kernel, written so that its transpose, the gradient, is fast."""
    barrier = jax.lax.optimization_barrier
    if x.shape[1] <= d_kernel.shape[1]:
        return jnp.dot(barrier(x.T).T, d_kernel, preferred_element_type=jnp.float32)
    # Backwards: a cotangent is transposed, multiplied by x, and the product transposed back.
    d_y = jnp.einsum('fd,nd->fn', barrier(d_kernel.T), x, preferred_element_type=jnp.float32)
    return barrier(d_y).T


def contract(spec: str, x: jax.Array, y: jax.Array | Matrix) -> jax.Array:
    """`jnp.einsum` of two arrays, summed in float32, in x's dtype.

    Args:
      spec: as of `jnp.einsum`. If y is a `Matrix`, it must sum over the ``i`` axes of y.
      x: an array.
      y: an array or a `Matrix`: quantized, or with an adapter.
    """
    if isinstance(y, Matrix):
        return y.product(x)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)
