"""`Narrow`: a matrix of int8, int4 or bfloat16 weights that stands in for a wide one.

Integers are symmetric and share scales in groups, ŵ = scale · q, along what a product sums over, so
that a product is a sum over groups of whole products. Where few rows are multiplied on a CPU, as in
decoding, `layercomb_kernels` reads the narrow weights themselves; otherwise they are widened first.

Axes are written in letters: ``i`` for those that groups run along, all of them together, and ``o``
for the others: ``'io'`` is a kernel (D, F), ``'iio'`` one from heads (H, K, D), ``'oi'`` a table of
rows. Two int4 share a byte, column j of n being in its low half and column j + n / 2 in its high
one, where n is the size of the last axes together: of ``'ioo'`` (D, H, K) are left (D, H·K / 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.bucketwise import IN_BOUNDS

BITS = (4, 8, 16)
FEW = 32  # rows, at most, for which a kernel is quicker than widening the weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['values', 'scales'],
    meta_fields=['axes', 'bits'],
)
@dataclasses.dataclass(frozen=True)
class Narrow:
    """A matrix of narrow weights, with what a layer asks of a wide one.

    Attributes:
      values: int8, uint8 of two int4, or bfloat16.
      scales: float32, groups in the place of the ``i`` axes; None for bfloat16.
      axes: see above.
      bits: 8, 4 or 16.
    """

    values: jax.Array
    scales: jax.Array | None
    axes: str
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the wide matrix."""
        if self.scales is None or self.bits == 8:
            return self.values.shape
        if self.axes == 'oi':
            return (*self.values.shape[:-1], 2 * self.values.shape[-1])
        return self.values.shape[: self.axes.count('i')] + self.scales.shape[1:]

    def wide(self) -> jax.Array:
        """The weights in float32, of shape `shape`."""
        if self.scales is None:
            return self.values.astype(jnp.float32)
        if self.axes == 'oi':
            q = _integers(self.values, self.bits)
            q = q.reshape(*self.scales.shape, -1)  # (…, D) → (…, G, g)
            return (q * self.scales[..., None]).reshape(self.shape)
        words, scales = self._matrix()
        q = _integers(words, self.bits)[:, : scales.shape[1]]
        q = q.reshape(len(scales), -1, scales.shape[1])  # (D, F) → (G, g, F)
        return (q * scales[:, None]).reshape(self.shape)

    def take(self, rows: jax.Array) -> jax.Array:
        """Rows of a table (``'oi'``) in float32, (…) → (…, D); NaN for rows that do not exist."""
        known: Any = {'mode': 'fill', 'fill_value': jnp.nan}
        if self.scales is None:
            return jnp.take(self.values, rows, axis=0, **known).astype(jnp.float32)
        values = jnp.take(self.values, rows, axis=0, mode='clip')
        scales = jnp.take(self.scales, rows, axis=0, **known)
        return dataclasses.replace(self, values=values, scales=scales).wide()

    def product(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """The sum of x times the weights over the ``i`` axes.

        Args:
          x: (…, *i), floating-point.
          dtype: of the result; None takes x's.

        Returns:
          (…, *o), summed in float32.
        """
        n_i = self.axes.count('i')
        lead = x.shape[: x.ndim - n_i]
        o = tuple(n for n, axis in zip(self.shape, self.axes, strict=True) if axis == 'o')
        x = x.reshape(math.prod(lead), -1)  # (…, *i) → (M, D)
        product = _product if _has_kernels(len(x)) else _plain_product
        return product(x, self).reshape(lead + o).astype(dtype or x.dtype)

    def gathered_product(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """x times some rows of a table, which are all that is read.

        Args:
          x: (…, D).
          rows: (…, K) int32, within bounds.

        Returns:
          (…, K), in x's dtype.
        """
        return self._gathered(_gathered_product, _plain_gathered_product, x, rows)

    def gathered_sum(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """The sum of some rows of a table, each times a number: (…, K), (…, K) → (…, D)."""
        return self._gathered(_gathered_sum, _plain_gathered_sum, x, rows)

    def _gathered(self, fast: Any, plain: Any, x: jax.Array, rows: jax.Array) -> jax.Array:
        lead, d = x.shape[:-1], x.shape[-1]
        x, rows = x.reshape(-1, d), rows.reshape(-1, rows.shape[-1])  # (M, …)
        y = (fast if _has_kernels(len(x)) else plain)(x, rows, self)
        return y.reshape(*lead, -1).astype(x.dtype)

    def _matrix(self) -> tuple[jax.Array, jax.Array]:
        """Words and scales as the matrices that kernels take."""
        none = jnp.zeros((0, 0), jnp.float32)
        if self.axes == 'oi':
            return self.values, none if self.scales is None else self.scales
        words = self.values.reshape(math.prod(self.values.shape[: self.axes.count('i')]), -1)
        return words, none if self.scales is None else self.scales.reshape(len(self.scales), -1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def narrow(
    wide: jax.Array, axes: str, bits: int, group_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """The values and scales nearest to a matrix, or to a stack of them.

    8 bits go to the nearest of −127 … 127 times max |w| / 127 in the group, so that no weight is
    off by more than half a scale. 4 bits have the scale, of a few, that leaves the least squared
    error in its group.

    Args:
      wide: the axes that `axes` names, with any others before them.
      axes: see `Narrow`.
      bits: 4, 8 or 16.
      group_size: how many weights share a scale: the divisor of what there are that is nearest, by
        ratio.
    """
    if bits == 16:
        return wide.astype(jnp.bfloat16), None
    lead, shape = wide.shape[: wide.ndim - len(axes)], wide.shape[wide.ndim - len(axes) :]
    wide = wide.astype(jnp.float32)
    if axes == 'oi':
        whole = shape[-1] // 2 if bits == 4 else shape[-1]  # a group lies in one half
        groups = wide.reshape(*lead, shape[0], -1, group_of(whole, group_size))  # (…, F, G, g)
        q, scales = _nearest(groups, bits, -1)
        q = q.reshape(wide.shape)
        return (_pack(q) if bits == 4 else q), scales.squeeze(-1)
    n_i = axes.count('i')
    i, o = shape[:n_i], shape[n_i:]
    size = group_of(math.prod(i), group_size)
    groups = wide.reshape(*lead, -1, size, math.prod(o))  # (…, G, g, F)
    q, scales = _nearest(groups, bits, -2)
    scales = scales.reshape(*lead, -1, *o)
    if bits == 8:
        return q.reshape(wide.shape), scales
    return _pack(q.reshape(*lead, *i, -1)), scales


def can_narrow(shape: tuple[int, ...], axes: str, bits: int) -> bool:
    """Whether a matrix of this shape has an int4 form: rows of a table are cut into two halves."""
    return not (bits == 4 and axes == 'oi' and shape[-1] % 2)


def group_of(length: int, group_size: int) -> int:
    """The divisor of a length that is nearest to a group's size, by ratio.

    >>> group_of(768, 64), group_of(100, 64), group_of(48, 64)
    (64, 50, 48)
    """
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    return min(divisors, key=lambda n: abs(math.log(n / group_size)))


def _nearest(groups: jax.Array, bits: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 values of the groups' shape, and a scale for each group along an axis, which is kept."""
    if bits == 8:
        scales = jnp.abs(groups).max(axis, keepdims=True) / 127
        return _rounded(groups, scales, -127, 127), scales
    low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
    extreme = jnp.where(-low > high, low, high)

    def attempt(parts: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        scales = extreme / -parts  # the extreme goes to −8, which has no counterpart
        q = _rounded(groups, scales, -8, 7)
        error = jnp.square(q.astype(jnp.float32) * scales - groups).sum(axis, keepdims=True)
        return error, q, scales

    best: tuple[jax.Array, ...] = attempt(8.0)
    for parts in (7.0, 7.5, 8.5, 9.0, 10.0):
        tried = attempt(parts)
        better = tried[0] < best[0]
        best = tuple(jnp.where(better, a, b) for a, b in zip(tried, best, strict=True))
    return best[1], best[2]


def _rounded(groups: jax.Array, scales: jax.Array, low: int, high: int) -> jax.Array:
    divisors = jnp.where(scales == 0, 1, scales)  # a group of zeros stays one
    return jnp.clip(jnp.round(groups / divisors), low, high).astype(jnp.int8)


def _pack(q: jax.Array) -> jax.Array:
    """int8 of −8 … 7, (…, n) → uint8 (…, ⌈n / 2⌉)."""
    n = -(-q.shape[-1] // 2)
    q = jnp.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, 2 * n - q.shape[-1])])
    q = lax.bitcast_convert_type(q, jnp.uint8)
    return (q[..., :n] & 15) | (q[..., n:] << 4)


def _integers(words: jax.Array, bits: int) -> jax.Array:
    """Words as float32, (…, n) → (…, 2n) for int4."""
    if bits == 8:
        return words.astype(jnp.float32)
    low, high = (lax.bitcast_convert_type(w, jnp.int8) >> 4 for w in (words << 4, words))
    return jnp.concatenate([low, high], -1).astype(jnp.float32)


def _has_kernels(n_rows: int) -> bool:
    """Whether to multiply so few rows by a kernel."""
    if n_rows > FEW or jax.default_backend() != 'cpu':
        return False
    import layercomb_kernels  # here, since it compiles, and most programs never come here

    return layercomb_kernels.available()


def _plain_product(x: jax.Array, w: Narrow) -> jax.Array:
    """(M, D) → (M, F) float32, of widened weights."""
    wide = w.wide().astype(x.dtype)
    if w.axes == 'oi':
        return jnp.einsum('md,fd->mf', x, wide, preferred_element_type=jnp.float32)
    return jnp.dot(x, wide.reshape(x.shape[1], -1), preferred_element_type=jnp.float32)


def _plain_gathered_product(x: jax.Array, rows: jax.Array, w: Narrow) -> jax.Array:
    wide = _rows(w, rows).astype(x.dtype)  # (M, K, D)
    return jnp.einsum('md,mkd->mk', x, wide, preferred_element_type=jnp.float32)


def _plain_gathered_sum(x: jax.Array, rows: jax.Array, w: Narrow) -> jax.Array:
    wide = _rows(w, rows).astype(x.dtype)  # (M, K, D)
    return jnp.einsum('mk,mkd->md', x, wide, preferred_element_type=jnp.float32)


def _rows(w: Narrow, rows: jax.Array) -> jax.Array:
    rows = jnp.clip(rows, 0, w.shape[0] - 1)
    return jax.tree.map(lambda x: x.at[rows].get(**IN_BOUNDS), w).wide()


def _kernel(name: str, plain: Any) -> Any:
    """The function `plain`, computed by a kernel on a CPU; its gradient is for x alone."""

    def by_kernel(*args: Any) -> jax.Array:
        import layercomb_kernels

        *xs, w = args
        x, *rows = xs
        words, scales = w._matrix()
        if name == 'product' and w.axes != 'oi':
            width = math.prod(w.shape[w.axes.count('i') :])
            return layercomb_kernels.column_products(x.astype(jnp.float32), words, scales, width)
        function: Any = {
            'product': layercomb_kernels.row_products,
            'gathered_product': layercomb_kernels.gathered_products,
            'gathered_sum': layercomb_kernels.gathered_sums,
        }[name]
        return function(x.astype(jnp.float32), *rows, words, scales)

    @jax.custom_vjp
    def fast(*args: Any) -> jax.Array:
        return lax.platform_dependent(*args, cpu=by_kernel, default=plain)

    def back(args: Any, ct: jax.Array) -> Any:
        _, pull = jax.vjp(lambda x: plain(x, *args[1:]), args[0])
        return (*pull(ct), *[None] * (len(args) - 1))

    fast.defvjp(lambda *args: (fast(*args), args), back)
    return fast


_product = _kernel('product', _plain_product)
_gathered_product = _kernel('gathered_product', _plain_gathered_product)
_gathered_sum = _kernel('gathered_sum', _plain_gathered_sum)


@jax.custom_jvp
def constant(x: jax.Array) -> jax.Array:
    """x, of which there is no derivative.

    Raises:
      ValueError: when a gradient for it is asked for.
    """
    return x


@constant.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        'quantized weights do not train: train the wide model and quantize it afterwards, or let '
        'only other weights train, with TrainTask(trainable=…)'
    )
