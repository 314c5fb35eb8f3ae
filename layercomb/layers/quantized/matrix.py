"""`Narrow`: a matrix of int8, int4 or bfloat16 weights in place of a float32 one.

Integers are symmetric and share scales in groups along the summed axis, ŵ = scale · q, so that a
product is a sum over groups. For few rows on a CPU, as in decoding, `layercomb_kernels` reads the
narrow weights directly. It may round activations to 16 bits, a relative error of 3e-5. For many
rows, as in training, some rows of the matrix at a time are widened, backwards too, so that no wide
matrix exists.

Kernels multiply many rows by bfloat16, too, and where integers are stored in `panels`, sixteen rows
interleaved. Matrices whose rows are looked up one by one are stored as rows.

Axes are written in letters: ``i`` for the axes that a product sums over, along which groups run,
and ``o`` for the others. ``'io'`` is a kernel (D, F), ``'iio'`` one from heads (H, K, D), ``'oi'``
a table of rows. A narrow matrix is always stored as rows, with its ``i`` axes merged into the last
axis: ``'ioo'`` (D, H, K) is stored as (H, K, D), ``'iio'`` (H, K, D) as (D, H·K). One row is read
for one output. Two int4 share a byte: in a row of n, weight j is the low half of byte j and weight
j + n / 2 its high half.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import layercomb_kernels
from layercomb.layers.quantized import panels, pieces
from layercomb.layers.quantized.native import FEW, has_kernels, runs_natively, with_kernel
from layercomb.layers.quantized.rows import IN_BOUNDS
from layercomb.shapes import is_float

BITS = (4, 8, 16)
SCALES = '_scales'  # a narrow matrix stands at its path, and its scales at path + SCALES


class Matrix:
    """What layers may be given in the place of an array (*i, *o): a pytree with a product."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix; several ``i`` axes may be merged."""
        raise NotImplementedError

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """x times the matrix, summed over the ``i`` axes: (…, *i) → (…, *o).

        Args:
          x: (…, *i), floating.
          dtype: of the result; None for the dtype of x.
        """
        raise NotImplementedError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['values', 'scales'],
    meta_fields=['axes', 'bits', 'activation_bits', 'minima'],
)
@dataclasses.dataclass(frozen=True)
class Narrow(Matrix):
    """A matrix of narrow weights, with the products that layers need.

    Attributes:
      values: (*o, i) int8 or bfloat16, or (*o, i / 2) uint8 of two int4 each; or in `panels`,
        (*o, words) uint32.
      scales: (*o, G) float32 or float16, one for each group of a row, in panels if the values are;
        (*o, 2G) with minima, which stand behind the scales; None for bfloat16.
      axes: letters ``i`` and ``o`` of the wide matrix, see the module.
      bits: 8, 4 or 16; 32 for a float table wrapped by `rows_of`.
      activation_bits: to how many bits a kernel may round x in products: 16, or 8, which is quicker
        where there are many rows, and less exact (5e-3; for bfloat16 2e-3).
      minima: whether each group has a minimum: ŵ = scale · (q + 2^(bits − 1)) + minimum.
    """

    values: jax.Array
    scales: jax.Array | None
    axes: str
    bits: int
    activation_bits: int = 16
    minima: bool = False

    @property
    def in_panels(self) -> bool:
        """Whether the values are in `panels`."""
        return self.values.dtype == jnp.uint32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the wide matrix, with its ``i`` axes merged."""
        *o, _ = self.values.shape
        n = n_columns(self.values, self.bits)
        return (*o, n) if self.axes == 'oi' else (n, *o)

    def wide(self) -> jax.Array:
        """The weights in float32, of shape `shape`."""
        rows = self.wide_rows()
        return rows if self.axes == 'oi' else jnp.moveaxis(rows, -1, 0)

    def wide_rows(self) -> jax.Array:
        """The weights in float32, in storage order: (*o, i)."""
        if self.in_panels:
            return self.in_rows().wide_rows()
        if self.scales is None:
            return self.values.astype(jnp.float32)
        q = _integers(self.values, self.bits)
        every = self.scales.astype(jnp.float32)
        parts = jnp.split(every, 1 + self.minima, axis=-1)
        groups = q.reshape(*parts[0].shape, -1)  # (…, D) → (…, G, g)
        if not self.minima:
            return (groups * every[..., None]).reshape(q.shape)
        scales, least = (part[..., None] for part in parts)
        return ((groups + 2 ** (self.bits - 1)) * scales + least).reshape(q.shape)

    def in_rows(self) -> Narrow:
        """The same matrix with its values stored as rows."""
        if not self.in_panels:
            return self
        values, scales = panels.as_rows(self.values, self.scales, self.values.ndim - 1, self.bits)
        return dataclasses.replace(self, values=values, scales=scales)

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows of a table (``'oi'``); NaN for rows that do not exist.

        Args:
          rows: (…) integers.

        Returns:
          (…, D) float32.
        """
        known: Any = {'mode': 'fill', 'fill_value': jnp.nan}
        if rows.dtype.itemsize <= 4:
            rows = rows.astype(jnp.int32)  # bytes cannot number the words of a table
        if self.scales is None:
            take = _table_rows if self.values.size and runs_natively() else _plain_table_rows
            found = take(self.values, rows.reshape(-1)).astype(jnp.float32)  # (…) → (M,)
            return found.reshape(*rows.shape, found.shape[-1])
        if self.in_panels:
            n = len(self.values)
            at = jnp.clip(rows, 0, n - 1)
            values, scales = panels.rows_at(self.values, self.scales, at, self.bits)
            scales = jnp.where(((rows < 0) | (rows >= n))[..., None], jnp.nan, scales)
        else:
            values = jnp.take(self.values, rows, axis=0, mode='clip')
            scales = jnp.take(self.scales, rows, axis=0, **known)
        return dataclasses.replace(self, values=values, scales=scales).wide()

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """x times the weights, summed over the ``i`` axes.

        Args:
          x: (…, *i), floating.
          dtype: of the result; None for the dtype of x.

        Returns:
          (…, *o), summed in float32.
        """
        n_i = self.axes.count('i')
        lead = x.shape[: x.ndim - n_i]
        x = x.reshape(math.prod(lead), math.prod(x.shape[len(lead) :]))  # (…, *i) → (M, D)
        if self._has_kernels(min(len(x), FEW) if self._multiplies_many(x) else len(x)):
            product = _product if len(x) <= FEW else _long_product
        else:
            product = _plain_product if len(x) <= FEW else _by_pieces
        y = product(x, self.as_rows()).reshape(lead + self.values.shape[:-1])
        return y.astype(dtype or x.dtype)

    def as_rows(self) -> Narrow:
        """The same weights as a matrix (F, D) of rows, its ``o`` axes merged."""
        f = math.prod(self.values.shape[:-1])
        merged = jax.tree.map(lambda x: x.reshape(f, x.shape[-1]), self)
        return dataclasses.replace(merged, axes='io')

    def factored_product(self, x: jax.Array, modules: jax.Array) -> jax.Array:
        """y[m, s, f] = Σ_d x[m, d] A[s, d] W[f, d], with W a table of rows.

        Args:
          x: (M, D), floating.
          modules: A (S, D), floating.

        Returns:
          (M, S, F), in the dtype of x.
        """
        if self.in_panels:
            scaled = x[:, None] * modules.astype(x.dtype)[None]  # (M, S, D)
            return self.product(scaled)
        product = _factored_product if self._has_kernels(len(x)) else _plain_factored_product
        return product(x, modules, self).astype(x.dtype)

    def gathered_product(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """y[…, k] = Σ_d x[…, d] W[rows[…, k], d]; no other rows of the table W are read.

        Args:
          x: (…, D), floating.
          rows: (…, K) int32, within bounds.

        Returns:
          (…, K), in the dtype of x.
        """
        return self._gathered(_gathered_product, _plain_gathered_product, x, rows)

    def gathered_sum(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """y[…, d] = Σ_k x[…, k] W[rows[…, k], d]; no other rows of the table W are read.

        Args:
          x: (…, K), floating.
          rows: (…, K) int32, within bounds.

        Returns:
          (…, D), in the dtype of x.
        """
        return self._gathered(_gathered_sum, _plain_gathered_sum, x, rows)

    def _gathered(self, fast: Any, plain: Any, x: jax.Array, rows: jax.Array) -> jax.Array:
        if self.in_panels:
            return self.in_rows()._gathered(fast, plain, x, rows)
        lead, d = x.shape[:-1], x.shape[-1]
        x = x.reshape(math.prod(lead), d)  # (…, D) → (M, D)
        rows = rows.reshape(len(x), rows.shape[-1])  # (…, K) → (M, K)
        y = (fast if self._has_kernels(len(x)) else plain)(x, rows, self)
        return y.reshape(*lead, y.shape[-1]).astype(x.dtype)

    @property
    def _has_halves(self) -> bool:
        return self.scales is not None and self.scales.dtype == jnp.float16

    def _multiplies_many(self, x: jax.Array) -> bool:
        """Whether a kernel multiplies many rows of x, which spares a wide copy of the matrix."""
        is_half = self.values.dtype == jnp.bfloat16 and x.dtype == jnp.float32
        return self.in_panels or is_half

    def _has_kernels(self, n_rows: int) -> bool:
        if not self.in_panels and (self.minima or self._has_halves):
            return False
        known = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.uint32)
        return self.values.dtype in known and self.values.size > 0 and has_kernels(n_rows)

    def _matrix(self) -> tuple[jax.Array, jax.Array]:
        """Values and scales as matrices, in the form that kernels take."""
        words = self.values.reshape(-1, self.values.shape[-1])
        if self.scales is None:
            return words, jnp.zeros((0, 0), jnp.float32)
        return words, self.scales.reshape(len(words), -1)


def n_columns(values: Any, bits: int) -> int:
    """How many weights are in a row of `values`, which are as of `Narrow`."""
    width: int = values.shape[-1] * values.dtype.itemsize * 8
    return width // bits


def in_panels(
    values: Any, scales: Any, n_o: int, bits: int, minima: bool = False
) -> tuple[Any, Any]:
    """Values and scales in panels, where rows and groups are whole words; else as they are.

    Args:
      values, scales: as of `Narrow`, of rows, (…, *o, n) and (…, *o, G).
      n_o: how many ``o`` axes there are.
      bits: 4, 8 or 16.
      minima: whether half of the scales are minima.
    """
    if bits == 16:
        return values, scales
    columns = n_columns(values, bits)
    if not panels.fit(columns, columns * (1 + minima) // scales.shape[-1], bits):
        return values, scales
    return panels.of_rows(values, scales, n_o)


def rows_of(table: jax.Array | Narrow) -> Narrow:
    """A table (F, D), an array or `Narrow`, as a `Narrow` with axes ``'oi'``."""
    return table if isinstance(table, Narrow) else Narrow(table, None, 'oi', 32)


def _integers(words: jax.Array, bits: int) -> jax.Array:
    """Stored integers as float32: (…, n) → (…, n), or (…, 2n) for int4."""
    if bits == 8:
        return words.astype(jnp.float32)
    low, high = (lax.bitcast_convert_type(w, jnp.int8) >> 4 for w in (words << 4, words))
    return jnp.concatenate([low, high], -1).astype(jnp.float32)


def _plain_table_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table; NaN for those that do not exist: (F, D), (M,) → (M, D)."""
    return jnp.take(table, rows, axis=0, mode='fill', fill_value=jnp.nan)


def _native_table_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    at = jnp.clip(rows, 0, len(table) - 1).astype(jnp.int32)
    found = layercomb_kernels.table_rows(table, at)
    return jnp.where(((rows < 0) | (rows >= len(table)))[:, None], jnp.nan, found)


def _plain_product(x: jax.Array, w: Narrow) -> jax.Array:
    """The product by widened weights: (M, D) → (M, F) float32."""
    wide = w.wide_rows().reshape(-1, x.shape[1]).astype(x.dtype)  # (*o, D) → (F, D)
    return jnp.einsum('md,fd->mf', x, wide, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _by_pieces(x: jax.Array, w: Narrow) -> jax.Array:
    """The product by rows that are widened a piece at a time: (M, D) → (M, F) float32."""
    return pieces.product(x, w.in_rows(), Narrow.wide_rows)


def _by_pieces_back(kept: Any, ct: jax.Array) -> tuple[jax.Array, None]:
    like, w = kept
    return pieces.product_back(ct, w.in_rows(), Narrow.wide_rows, like), None


def _with_like(product: Any) -> Any:
    return lambda x, w: (product(x, w), (jnp.zeros((0, *x.shape[1:]), x.dtype), w))


_by_pieces.defvjp(_with_like(_by_pieces), _by_pieces_back)


@jax.custom_vjp
def _long_product(x: jax.Array, w: Narrow) -> jax.Array:
    """The product of many rows by a kernel: (M, D) → (M, F) float32."""
    return lax.platform_dependent(x, w, cpu=_by_kernel, default=_by_pieces)


_long_product.defvjp(_with_like(_long_product), _by_pieces_back)


def _plain_factored_product(x: jax.Array, modules: jax.Array, w: Narrow) -> jax.Array:
    wide = w.wide_rows().astype(x.dtype)  # (F, D)
    scaled = x[:, None] * modules.astype(x.dtype)[None]  # (M, S, D)
    # XLA reads the table fastest in this order of operands.
    y = jnp.einsum('fd,msd->mfs', wide, scaled, preferred_element_type=jnp.float32)
    return y.swapaxes(1, 2)


def _plain_gathered_product(x: jax.Array, rows: jax.Array, w: Narrow) -> jax.Array:
    wide = _rows(w, rows).astype(x.dtype)  # (M, K, D)
    return jnp.einsum('md,mkd->mk', x, wide, preferred_element_type=jnp.float32)


def _plain_gathered_sum(x: jax.Array, rows: jax.Array, w: Narrow) -> jax.Array:
    wide = _rows(w, rows).astype(x.dtype)  # (M, K, D)
    return jnp.einsum('mk,mkd->md', x, wide, preferred_element_type=jnp.float32)


def _rows(w: Narrow, rows: jax.Array) -> jax.Array:
    rows = jnp.clip(rows, 0, w.shape[0] - 1)
    return jax.tree.map(lambda x: x.at[rows].get(**IN_BOUNDS), w).wide()


def _with_kernel(plain: Any, kernel: Any) -> Any:
    def by_kernel(*args: Any) -> jax.Array:
        *arrays, w = args
        floats = (x.astype(jnp.float32) if is_float(x) else x for x in arrays)
        return kernel(*floats, *w._matrix())

    return with_kernel(plain, by_kernel)


def _by_kernel(x: jax.Array, w: Narrow) -> jax.Array:
    words, scales = w._matrix()
    x = x.astype(jnp.float32)
    if not w.in_panels:
        return layercomb_kernels.row_products(x, words, scales, w.activation_bits // 8)
    return layercomb_kernels.panel_products(x, words, scales, w.activation_bits // 8, w.minima)


_table_rows = with_kernel(_plain_table_rows, _native_table_rows)
_product = with_kernel(_plain_product, _by_kernel)
_factored_product = _with_kernel(_plain_factored_product, layercomb_kernels.factored_products)
_gathered_product = _with_kernel(_plain_gathered_product, layercomb_kernels.gathered_products)
_gathered_sum = _with_kernel(_plain_gathered_sum, layercomb_kernels.gathered_sums)
