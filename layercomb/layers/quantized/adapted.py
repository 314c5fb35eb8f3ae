"""`Adapted`: a matrix and a low-rank term, in the place of the matrix alone.

For many rows, as in training, W + A B is made before it is multiplied by x, piece by piece if W is
narrow. That takes r / M of the product's time, while a term of its own would read x and write y
once more. Its gradient is that of the term: no product as large as W's gradient is computed. For
few rows, for narrow x, whose precision would round a small A B away, and with dropout, the term is
added to the product.

Shape letters: M rows of x, D the summed axes, F the others, r the rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from layercomb.layers.facts.devices import own_key
from layercomb.layers.quantized import pieces
from layercomb.layers.quantized.matrix import Matrix, Narrow

PRODUCT = 'adapted_product'  # what a `jax.checkpoint` may keep by this name, so as not to multiply


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['base', 'a', 'b', 'magnitude', 'key'],
    meta_fields=['rate'],
)
@dataclasses.dataclass(frozen=True)
class Adapted(Matrix):
    """W + A B, for a matrix W that may be narrow: y = x W + drop(x) A B.

    With a magnitude m, each column of W + A B is scaled to the norm that m says: the norm is a
    constant in the gradient, as in DoRA.

    Attributes:
      base: W (*i, *o), an array or `Narrow`.
      a: A (*i, r).
      b: B (r, *o).
      magnitude: m (*o); None to scale nothing.
      key: for dropout; None for no dropout.
      rate: of the dropout.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    key: jax.Array | None = None
    rate: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W, as W has it."""
        shape: tuple[int, ...] = self.base.shape
        return shape

    def wide(self) -> jax.Array:
        """W + A B, scaled if there is a magnitude, in float32: (*i, *o)."""
        a, b = self._factors(jnp.float32)
        wide = self.base.wide() if isinstance(self.base, Narrow) else self.base
        wide = wide.astype(jnp.float32).reshape(len(a), b.shape[1]) + a @ b
        if self.magnitude is not None:
            wide = wide * self._scale(a, b)[None]
        return wide.reshape(self.a.shape[:-1] + self.b.shape[1:])

    def norms(self) -> jax.Array:
        """The norm of each column of W + A B, over the ``i`` axes: (*o) float32."""
        a, b = self._factors(jnp.float32)
        return jnp.sqrt(self._squares(a, b)).reshape(self.b.shape[1:])

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """y = x W + drop(x) A B, summed in float32: (…, *i) → (…, *o).

        Args:
          x: (…, *i), floating; y is rounded to its dtype.
          dtype: of y; None for the dtype of x.
        """
        lead = x.shape[: x.ndim - self.a.ndim + 1]
        flat = x.reshape(math.prod(lead), -1)  # (…, *i) → (M, D)
        a, b = self._factors(x.dtype)
        if self._is_merged(flat):
            y = _merged(flat, self._rows(), a, b)
        else:
            y = self._of_base(x, flat) + _low_rank(self.rate, flat, a, b, self.key)
        y = checkpoint_name(y.astype(x.dtype), PRODUCT)
        if self.magnitude is not None:
            y = y * self._scale(a, b)[None].astype(y.dtype)
        return y.reshape(lead + self.b.shape[1:]).astype(dtype or x.dtype)

    def _factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """A (D, r) and B (r, F)."""
        r = self.a.shape[-1]
        return self.a.reshape(-1, r).astype(dtype), self.b.reshape(r, -1).astype(dtype)

    def _rows(self) -> Any:
        """W as a matrix: an array (D, F), or `Narrow` rows."""
        if isinstance(self.base, Narrow):
            return self.base.in_rows().as_rows()
        return self.base.reshape(math.prod(self.a.shape[:-1]), -1)

    def _is_merged(self, x: jax.Array) -> bool:
        """Whether A B is added to W: where that is quicker, and as exact."""
        exact = isinstance(self.base, Narrow) or self.base.dtype == jnp.float32
        return len(x) >= x.shape[1] and exact and x.dtype == jnp.float32 and self.key is None

    def _of_base(self, x: jax.Array, flat: jax.Array) -> jax.Array:
        """x W: (M, F) float32."""
        if isinstance(self.base, Narrow):
            return self.base.product(x, jnp.float32).reshape(len(flat), -1)
        return jnp.dot(flat, self._rows(), preferred_element_type=jnp.float32)

    def _scale(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """What the magnitude multiplies each column by: (F,)."""
        assert self.magnitude is not None
        norms = jnp.sqrt(self._squares(a, b))
        return self.magnitude.reshape(-1).astype(jnp.float32) / jnp.where(norms == 0, 1, norms)

    def _squares(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The squared norm of each column, (F,), without derivative."""
        rows, a, b = lax.stop_gradient((self._rows(), *_in_float32(a, b)))
        if isinstance(rows, Narrow):
            return pieces.squares((rows, b.T), _with(a), len(a))
        return jnp.square(rows.astype(jnp.float32) + a @ b).sum(0)


def _in_float32(*arrays: jax.Array) -> Any:
    return tuple(x.astype(jnp.float32) for x in arrays)


def _with(a: jax.Array) -> pieces.Wide:
    """Widens rows of W + A B, from some rows of W and of Bᵀ."""

    def wide(some: Any) -> jax.Array:
        rows, b = some
        return rows.wide_rows() + b @ a.T  # (f, D)

    return wide


@jax.custom_vjp
def _merged(x: jax.Array, base: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (W + A B): (M, D) → (M, F) float32; W is an array (D, F) or `Narrow` rows (F, D)."""
    if isinstance(base, Narrow):
        return pieces.product(x, (base, b.T), _with(a))
    return jnp.dot(x, base + a @ b, preferred_element_type=jnp.float32)


def _merged_back(kept: Any, ct: jax.Array) -> Any:
    x, base, a, b = kept
    d_a, d_b = _factor_gradients(x, a, b, ct)
    if isinstance(base, Narrow):
        return pieces.product_back(ct, (base, b.T), _with(a), x), None, d_a, d_b
    d_x = jnp.dot(ct, (base + a @ b).T, preferred_element_type=jnp.float32)
    # The gradient of W costs nothing where it is not asked for: a compiler leaves it out.
    return d_x, jnp.dot(x.T, ct, preferred_element_type=jnp.float32), d_a, d_b


_merged.defvjp(lambda x, base, a, b: (_merged(x, base, a, b), (x, base, a, b)), _merged_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(
    rate: float, x: jax.Array, a: jax.Array, b: jax.Array, key: jax.Array | None
) -> jax.Array:
    """drop(x) A B: (M, D) → (M, F) float32. Kept is x alone."""
    z = jnp.dot(_dropped(rate, x, key), a, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.dot(z, b, preferred_element_type=jnp.float32)


def _low_rank_back(rate: float, kept: Any, ct: jax.Array) -> Any:
    x, a, b, key = kept
    ct = ct.astype(x.dtype)
    key = None if key is None else jax.random.clone(key)  # the same numbers again, on purpose
    drop = functools.partial(_dropped, rate)
    d_a, d_b = _factor_gradients(drop(x, key), a, b, ct)
    u = jnp.dot(ct, b.T, preferred_element_type=jnp.float32).astype(x.dtype)
    d_x = jnp.dot(u, a.T, preferred_element_type=jnp.float32).astype(x.dtype)
    key = None if key is None else jax.random.clone(key)
    return drop(d_x, key), d_a, d_b, None


_low_rank.defvjp(lambda rate, *given: (_low_rank(rate, *given), given), _low_rank_back)


def _factor_gradients(
    x: jax.Array, a: jax.Array, b: jax.Array, ct: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of A and B, (D, r) and (r, F), from x (M, D) and ct (M, F).

    The factor with r columns is transposed behind a barrier: XLA would read both across their rows.
    """
    u = jnp.dot(ct, b.T, preferred_element_type=jnp.float32).astype(x.dtype)  # (M, r)
    z = jnp.dot(x, a, preferred_element_type=jnp.float32).astype(x.dtype)  # (M, r)
    u, z = lax.optimization_barrier((u.T, z.T))
    d_a = jnp.dot(u, x, preferred_element_type=jnp.float32).T
    d_b = jnp.dot(z, ct, preferred_element_type=jnp.float32)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


def _dropped(rate: float, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """x with a share of its values zero and the others larger; with one key always the same."""
    if key is None:
        return x
    keep = jax.random.bernoulli(own_key(key), np.float32(1 - rate), x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
