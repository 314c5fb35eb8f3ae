"""What the attention functions share: products, loops and dropout of one tile of scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Large and finite: differences of two of them are zero, where infinities would give NaN.
FAR = 1e30
# Queries and keys of a block. On the CPU a block of one head's scores is 64 kB, which the second
# cache holds, and one core computes it; elsewhere large products pay.
CPU_BLOCK_LEN, BLOCK_LEN = 128, 512
# (query, key) pairs taken together on the CPU, from as many heads as it takes.
CPU_PAIRS = CPU_BLOCK_LEN**2
# Pairs that one head's tile of chunks holds, about.
CPU_PAIRS_IN_TILE, PAIRS_IN_TILE = 1 << 17, 1 << 24


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contracts `x` with `y` as `spec` says: products in the dtype of `y`, sums in float32.

    On the CPU, narrow blocks are widened first: some products of bfloat16 with a float32
    result have no kernel there.
    """
    dtype = jnp.float32 if jax.default_backend() == 'cpu' else y.dtype
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def block_len() -> int:
    """The length of blocks where nobody says another."""
    return CPU_BLOCK_LEN if jax.default_backend() == 'cpu' else BLOCK_LEN


def pairs_in_tile() -> int:
    """Pairs of a query and a key in a tile of chunks, where nobody says another number."""
    return CPU_PAIRS_IN_TILE if jax.default_backend() == 'cpu' else PAIRS_IN_TILE


def even_share(n: int, at_most: int) -> int:
    """How many of `n` to take at a time, at most `at_most` or 1, so that little is padded.

    >>> even_share(512, 42), even_share(10, 4), even_share(7, 100)
    (32, 4, 7)
    """
    at_most = max(1, at_most)
    whole = next(g for g in range(min(n, at_most), 0, -1) if n % g == 0)
    n_shares = -(-n // at_most)
    return whole if 2 * whole > at_most else -(-n // n_shares)


def over_heads(
    f: Callable[..., Any], heads: tuple[Any, ...], n_pairs: int, at_most: int | None = None
) -> Any:
    """Maps `f` over the two leading axes (B, H) of every array in `heads`.

    Args:
      f: a function of one head's arrays.
      heads: its arguments, trees of arrays (B, H, ...).
      n_pairs: (query, key) pairs that `f` holds at a time.
      at_most: how many heads are taken together. None takes on the CPU as many as keep the
        temporaries in the caches; elsewhere all.

    Returns:
      What `f` returns, with leading axes (B, H).
    """
    n_rows, n_heads = jax.tree.leaves(heads)[0].shape[:2]
    n = n_rows * n_heads
    if at_most is None:
        at_most = max(1, CPU_PAIRS // n_pairs) if jax.default_backend() == 'cpu' else n
    together = next((g for g in range(min(n, at_most), 0, -1) if n % g == 0), n)
    if together == n:
        return jax.vmap(jax.vmap(f))(*heads)
    flat = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), heads)  # (B·H, ...)
    batch_size = together if together > 1 else None
    out = lax.map(lambda head: f(*head), flat, batch_size=batch_size)
    return jax.tree.map(lambda x: x.reshape(n_rows, n_heads, *x.shape[1:]), out)


def keys_of_heads(rng: jax.Array, n_heads: int) -> jax.Array:
    """A key for every head, (H,): folded in one key, or already so many.

    Raises:
      TypeError, ValueError: for what is neither.
    """
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise TypeError(f'rng is {rng.dtype}{rng.shape}: give a typed key, jax.random.key(…)')
    if rng.shape not in ((), (n_heads,)):
        raise ValueError(
            f'rng holds keys {rng.shape} for {n_heads} heads: give one key, or one each'
        )
    if rng.ndim:
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(n_heads, dtype=jnp.int32))


def key_per_head(rng: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """A key for every head of every row, (B, H), from one key or from one for every head."""
    if rng is None:
        return None
    n_rows, n_heads = shape
    by_row = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return by_row(keys_of_heads(rng, n_heads), jnp.arange(n_rows, dtype=jnp.int32))


def drop(rate: float, rng: jax.Array | None, tile: Any, probabilities: jax.Array) -> jax.Array:
    """Sets a share of the probabilities to zero and scales up the others; none without a key.

    The choice is a function of the key and of the tile's number, so that a backward pass can
    make it again instead of keeping it.
    """
    if rng is None:
        return probabilities
    # Sixteen random bits hold the rate to within 2⁻¹⁷ and cost half of what thirty-two would.
    n_dropped = min(round(rate * 65536), 65535)
    bits = jax.random.bits(jax.random.fold_in(rng, tile), probabilities.shape, jnp.uint16)
    return jnp.where(bits >= n_dropped, probabilities * (65536 / (65536 - n_dropped)), 0.0)


def loop(low: Any, high: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` that leaves no loop behind where it is known to run never or once."""
    if isinstance(low, int) and isinstance(high, int) and high - low <= 1:
        return body(low, carry) if high > low else carry
    # A Python number would be counted in what JAX's default integers are set to.
    low, high = (np.int32(x) if isinstance(x, int) else x for x in (low, high))
    return lax.fori_loop(low, high, body, carry)


def each(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, n: int) -> tuple[Any, Any]:
    """`lax.scan` over 0 … n − 1 that leaves no loop behind where it runs once."""
    if n == 1:
        carry, out = body(carry, 0)
        return carry, jax.tree.map(lambda x: x[None], out)
    return lax.scan(body, carry, jnp.arange(n, dtype=jnp.int32))


def least(*xs: Any) -> Any:
    """The least of integers: a Python integer if all of them are."""
    return min(xs) if all(isinstance(x, int) for x in xs) else functools.reduce(jnp.minimum, xs)


def most(*xs: Any) -> Any:
    """The greatest of integers: a Python integer if all of them are."""
    return max(xs) if all(isinstance(x, int) for x in xs) else functools.reduce(jnp.maximum, xs)
