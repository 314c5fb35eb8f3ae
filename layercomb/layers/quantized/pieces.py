"""Products by a matrix that is never wide as a whole: its rows are widened a piece at a time.

A matrix is a pytree of arrays whose first axis counts its rows, as `Narrow` keeps them, and a
function that widens some rows, ``wide(rows) -> (f, D)``. Shape letters: M rows of x, D the summed
axis, F rows of the matrix, f rows of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Wide = Callable[[Any], jax.Array]

# Weights that are wide at a time. On a CPU a piece stays in the cache, and that is as fast as the
# whole matrix; an accelerator needs larger ones to be busy.
ON_CPU, ELSEWHERE = 2**18, 2**24


def product(x: jax.Array, rows: Any, wide: Wide) -> jax.Array:
    """x Wᵀ, summed in float32: (M, D), (F, D) → (M, F) float32.

    Args:
      x: (M, D), floating.
      rows: W, as the module describes.
      wide: widens some of its rows.
    """

    def part(some: Any) -> jax.Array:
        weights = wide(some).astype(x.dtype)  # (f, D)
        return jnp.einsum('md,fd->mf', x, weights, preferred_element_type=jnp.float32)

    return _filled(rows, x.shape[1], part, axis=1)


def product_back(ct: jax.Array, rows: Any, wide: Wide, like: jax.Array) -> jax.Array:
    """ct W, the cotangent of x in `product`: (M, F), (F, D) → (M, D).

    Args:
      ct: of the product, (M, F) float32.
      rows, wide: as of `product`.
      like: of any number of rows, as wide as x and of its dtype, which the result has.
    """
    ct, width = ct.astype(like.dtype), like.shape[1]
    size, n, rest = _sizes(rows, width)

    def part(first: Any, size: int) -> jax.Array:
        weights = wide(_some(rows, first, size)).astype(like.dtype)  # (f, D)
        cts = lax.dynamic_slice_in_dim(ct, first, size, 1)  # (M, f)
        return jnp.einsum('mf,fd->md', cts, weights, preferred_element_type=jnp.float32)

    total = part(0, size)
    if n > 1:
        total = lax.fori_loop(1, n, lambda i, total: total + part(i * size, size), total)
    return (total + part(n * size, rest) if rest else total).astype(like.dtype)


def squares(rows: Any, wide: Wide, width: int) -> jax.Array:
    """The sum of squares of each row: (F, D) → (F,) float32.

    Args:
      rows, wide: as of `product`.
      width: D.
    """
    return _filled(rows, width, lambda some: jnp.square(wide(some)).sum(-1), axis=0)


def _filled(rows: Any, width: int, part: Wide, axis: int) -> jax.Array:
    """What `part` makes of each piece of the rows, joined along an axis."""
    size, n, rest = _sizes(rows, width)
    if n == 1 and not rest:
        return part(rows)

    def put(whole: jax.Array, first: Any, size: int) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(whole, part(_some(rows, first, size)), first, axis)

    shape = list(jax.eval_shape(part, _some(rows, 0, size)).shape)
    shape[axis] = n * size + rest
    whole = jnp.zeros(shape, jnp.float32)
    whole = lax.fori_loop(0, n, lambda i, whole: put(whole, i * size, size), whole)
    return put(whole, n * size, rest) if rest else whole


def _sizes(rows: Any, width: int) -> tuple[int, int, int]:
    """How many rows a piece has, how many pieces there are, and how many rows remain.

    None remain if a number of pieces near the wanted one divides the rows.
    """
    n_rows = len(jax.tree.leaves(rows)[0])
    limit = ON_CPU if jax.default_backend() == 'cpu' else ELSEWHERE
    wanted = min(max(-(-n_rows * width // limit), 1), n_rows)
    n = next((n for n in range(wanted, 2 * wanted) if n_rows % n == 0), wanted)
    size = -(-n_rows // n)
    return size, n_rows // size, n_rows % size


def _some(rows: Any, first: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 0), rows)
