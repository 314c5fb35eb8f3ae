"""The plainest leaves: `Dense`, `Embedding`, `Dropout`, `Flatten`, `Mean`."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from layercomb.layers.base import POSITION_AXES, Layer, Mode, Tree
from layercomb.layers.fields import Rate, Size
from layercomb.layers.initializers import Initializer, Normal, glorot_uniform, zeros
from layercomb.layers.narrow import Narrow
from layercomb.shapes import as_deep, check_axis, check_float, check_mask, check_width


class Dense(Layer):
    """y = x W + b over the last axis.

    Weights: ``kernel`` (D_in, n_units) and, unless `use_bias` is false, ``bias`` (n_units,).

    Attributes:
      n_units: the width of the output; None keeps the input's.
      use_bias: whether b is there.
      kernel_init: of W.
      bias_init: of b.

    >>> from layercomb import tl, shape_dtype
    >>> tl.Dense(3).output_signature(shape_dtype((2, 5)))
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32),)
    """

    n_units: Size | None = None
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    matrices = {'kernel': 'io'}

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('Dense', x)
        d = x.shape[-1]
        n = self.n_units or d
        kernel_key, bias_key = jax.random.split(rng)
        weights = {'kernel': self.kernel_init(kernel_key, (d, n))}
        if self.use_bias:
            weights['bias'] = self.bias_init(bias_key, (n,))
        return weights, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
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


def matmul(x: jax.Array, kernel: jax.Array | Narrow) -> jax.Array:
    """x W in float32: (…, D), (D, F) → (…, F)."""
    if isinstance(kernel, Narrow):
        return kernel.product(x, jnp.float32)
    if jax.default_backend() != 'cpu':
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    y = _row_products(x.reshape(-1, x.shape[-1]), kernel)  # (…, D) → (N, D)
    return y.reshape(*x.shape[:-1], kernel.shape[1])  # (N, F) → (…, F)


@jax.custom_jvp
def _row_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(N, D), (D, F) → (N, F) float32, whose gradient the CPU computes as fast as itself.

    The kernel's gradient is a sum over rows. XLA would read both factors across their rows, at half
    the speed; so the narrower one is transposed, and kept from being merged into the product.
    """
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


@functools.partial(_row_products.defjvp, symbolic_zeros=True)
def _row_products_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (d_x, d_kernel) = primals, tangents
    d_y = jnp.zeros((x.shape[0], kernel.shape[1]), jnp.float32)
    if not isinstance(d_x, SymbolicZero):
        d_y = _row_products(d_x, kernel)
    if not isinstance(d_kernel, SymbolicZero):
        # A checkpoint, so that x is kept and not what is made of it.
        d_y = d_y + jax.checkpoint(_by_kernel_of_gradient, prevent_cse=False)(x, d_kernel)
    return _row_products(x, kernel), d_y


def _by_kernel_of_gradient(x: jax.Array, d_kernel: jax.Array) -> jax.Array:
    """x times a tangent of the kernel, written for what it is backwards: the kernel's gradient."""
    barrier = jax.lax.optimization_barrier
    if x.shape[1] <= d_kernel.shape[1]:
        return jnp.dot(barrier(x.T).T, d_kernel, preferred_element_type=jnp.float32)
    # Backwards: a cotangent is transposed, multiplied by x, and the product transposed back.
    d_y = jnp.einsum('fd,nd->fn', barrier(d_kernel.T), x, preferred_element_type=jnp.float32)
    return barrier(d_y).T


def contract(spec: str, x: jax.Array, y: jax.Array | Narrow) -> jax.Array:
    """`jnp.einsum` of two arrays in x's dtype, summed in float32.

    A narrow y is summed over the axes that its groups run along, as `spec` must say.
    """
    if isinstance(y, Narrow):
        return y.product(x)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


class Embedding(Layer):
    """Rows of a table: integers (…) → vectors (…, d_model).

    Weights: ``table`` (vocab_size, d_model). Out of the vocabulary there is nothing to look up: an
    id outside raises where values are known, and gives NaN inside `jit`, where they are not.

    Attributes:
      vocab_size: ids run from 0 to vocab_size − 1.
      d_model: the width of a row.
      table_init: of the table.
    """

    vocab_size: Size
    d_model: Size
    table_init: Initializer = Normal(1.0)

    float32 = True
    matrices = {'table': 'oi'}

    def init(self, signature, rng, mode=Mode.TRAIN):
        (ids,) = signature
        self._check_integers(ids)
        return {'table': self.table_init(rng, (self.vocab_size, self.d_model))}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (ids,) = inputs
        self._check_integers(ids)
        self.check_ids(ids)
        ids = jnp.where(ids < 0, self.vocab_size, ids)  # or −1 would take the last row
        table = weights['table']
        if isinstance(table, Narrow):
            return (table.take(ids),), state
        return (jnp.take(table, ids, axis=0, mode='fill', fill_value=jnp.nan),), state

    def _check_integers(self, ids: Any) -> None:
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f'Embedding takes integers, got {ids.dtype}{list(ids.shape)}: give token ids as '
                'int32'
            )

    def check_ids(self, ids: jax.Array) -> None:
        """Raises a ValueError if a known id lies outside the vocabulary; a traced one passes."""
        if isinstance(ids, jax.core.Tracer) or ids.size == 0:
            return
        known = np.asarray(ids)  # not jnp: inside jit even constants would be traced
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f'token id {high if high >= self.vocab_size else low} is outside the vocabulary of '
                f'{self.vocab_size}: ids run from 0 to {self.vocab_size - 1}; check the tokenizer, '
                'or raise vocab_size'
            )


class Dropout(Layer):
    """Zeroes entries with probability `rate` in training, and scales the others by 1 / (1 − rate).

    Attributes:
      rate: the probability, 0 ≤ rate < 1.
      shared_axes: axes along which all entries are dropped or kept together, e.g. (1,) for one
        mask over all positions, which saves drawing it.

    Raises:
      ValueError: in training, without a key.

    References:
      Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    rate: Rate
    shared_axes: tuple[int, ...] = ()

    float32 = True  # it keeps the dtype of a stream
    diagonal = True
    mixes_positions = property(lambda self: any(a in POSITION_AXES for a in self.shared_axes))

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        for axis in self.shared_axes:
            if not -len(x.shape) <= axis < len(x.shape):
                raise ValueError(
                    f'Dropout: shared_axes={self.shared_axes} are axes of the input, which has '
                    f'the shape {tuple(x.shape)}'
                )
        return {}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        if not mode.is_training or self.rate == 0:
            return (x,), state
        if rng is None:
            raise ValueError(
                f'Dropout({self.rate}) draws in training: pass rng=jax.random.key(…) to apply'
            )
        shape = list(x.shape)
        for axis in self.shared_axes:
            shape[axis] = 1
        # In float32, since what is drawn for a float64 is something else.
        kept = jax.random.bernoulli(rng, np.float32(1 - self.rate), shape)
        return (jnp.where(kept, x / (1 - self.rate), 0),), state


class Flatten(Layer):
    """Joins all axes from `first_axis` on into one: (B, H, W, C) → (B, H·W·C).

    Raises:
      ValueError: when applied to an input without that axis.
    """

    first_axis: Size = 1

    mixes_positions = property(lambda self: self.first_axis == 1)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        if self.first_axis >= len(x.shape):
            n = len(x.shape)
            lower = f'give first_axis below {n}, or ' if n > 1 else 'give '
            raise ValueError(
                f'Flatten: there is no axis {self.first_axis} to join with those after it in the '
                f'shape {tuple(x.shape)}: {lower}x[...{", None" * (self.first_axis + 1 - n)}]'
            )
        return (
            x.reshape(*x.shape[: self.first_axis], math.prod(x.shape[self.first_axis :])),
        ), state


class Mean(Layer):
    """The mean over `axis`, weighted by a mask where `masked`.

    With `masked`, a second input (B, L) boolean says which positions of axis 1 are real; a row
    without any gives zeros.
    """

    axis: int = 1
    masked: bool = False

    mixes_positions = True
    float32 = True
    n_in = property(lambda self: 1 + self.masked)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked and self.axis != 1:
            raise ValueError(f'Mean: a mask (B, L) runs along axis 1, got axis={self.axis}')

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        x = inputs[0]
        check_axis('Mean', x, self.axis)
        if not self.masked:
            return (x.mean(self.axis),), state
        check_mask(inputs[1], tuple(x.shape[:2]))
        real = inputs[1].astype(x.dtype)  # (B, L)
        total = jnp.einsum('bl...,bl->b...', x, real)
        count = jnp.maximum(real.sum(1), 1)
        return (total / count.reshape(-1, *[1] * (total.ndim - 1)),), state
