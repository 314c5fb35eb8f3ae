"""Helpers of the attention functions: products, loops and dropout of one tile of scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from layercomb.layers.facts.devices import own_key

# Stands for infinity. It is finite: FAR − FAR is 0, where ∞ − ∞ would be NaN.
FAR = 1e30
# Queries and keys of a block. On the CPU a block of one head's scores is 64 kB, which fits the L2
# cache of the core that computes it. Elsewhere larger products are faster.
CPU_BLOCK_LEN, BLOCK_LEN = 128, 512
# (query, key) pairs computed together on the CPU, from one or more heads.
CPU_PAIRS = CPU_BLOCK_LEN**2
# About how many (query, key) pairs one head's tile of chunks holds.
CPU_PAIRS_IN_TILE, PAIRS_IN_TILE = 1 << 17, 1 << 24


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays: products in the dtype of `y`, sums in float32.

    On the CPU both are widened to float32 first: XLA has no CPU kernel for some bfloat16 products
    with a float32 result.

    Args:
      spec: of `jnp.einsum`.
      x, y: floating arrays.

    Returns:
      float32, of the shape that `spec` gives.
    """
    dtype = jnp.float32 if jax.default_backend() == 'cpu' else y.dtype
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def softmax_of(seen: jax.Array, s: jax.Array) -> jax.Array:
    """Probabilities over what is seen, zeros where nothing is or all is −∞: (N, J) float32.

    Args:
      seen: (N, J) bool.
      s: scores (N, J) float32; NaN among those seen makes all of them NaN.
    """
    seen = seen & (s != -jnp.inf)  # −∞ counts nothing, and −∞ − −∞ would be NaN
    s = jnp.where(seen, s, jnp.finfo(jnp.float32).min)
    p = jnp.where(seen, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1.0)


def block_len() -> int:
    """The default length of a block of queries or keys."""
    return CPU_BLOCK_LEN if jax.default_backend() == 'cpu' else BLOCK_LEN


def pairs_in_tile() -> int:
    """The default number of (query, key) pairs in a tile of chunks."""
    return CPU_PAIRS_IN_TILE if jax.default_backend() == 'cpu' else PAIRS_IN_TILE


def even_share(n: int, at_most: int) -> int:
    """How many of `n` items to take at a time, at most `at_most` (at least 1).

    It is a divisor of `n` if one is more than half of `at_most`; else the share that pads least.

    Args:
      n: number of items.
      at_most: the largest share.

    >>> even_share(512, 42), even_share(10, 4), even_share(7, 100)
    (32, 4, 7)
    """
    at_most = max(1, at_most)
    whole = next(g for g in range(min(n, at_most), 0, -1) if n % g == 0)
    n_shares = -(-n // at_most)
    return whole if 2 * whole > at_most else -(-n // n_shares)


def over_heads(
    f: Callable[..., Any],
    heads: tuple[Any, ...],
    n_pairs: int,
    at_most: int | None = None,
    *,
    group: int = 1,
    shared: tuple[int, ...] = (),
    summed: tuple[int, ...] = (),
) -> Any:
    """Maps `f` over the two leading axes (B, H) of every array in `heads`.

    Args:
      f: a function of one head's arrays.
      heads: its arguments, trees of arrays (B, H, ...).
      n_pairs: (query, key) pairs that `f` holds at a time.
      at_most: heads computed together, at most. None: on the CPU as many as fit the caches,
        elsewhere all.
      group: R. If it is not 1, R heads share some arguments: these have leading axes (B, H / R),
        and the others (B, H / R, R).
      shared: the places of the arguments that a group shares.
      summed: the places of the results that are summed over a group, in float32. They have leading
        axes (B, H / R), and the others (B, H / R, R).

    Returns:
      The results of `f`, with leading axes (B, H), or as `group` and `summed` say.
    """
    n_rows, n_heads = jax.tree.leaves(heads)[0].shape[:2]
    n = n_rows * n_heads
    if at_most is None:
        at_most = CPU_PAIRS // n_pairs if jax.default_backend() == 'cpu' else n * group
    if group > 1:
        f = by_group(f, shared, summed, together=at_most >= group)
    at_most = max(1, at_most // group)
    together = next((g for g in range(min(n, at_most), 0, -1) if n % g == 0), n)
    if together == n:
        return jax.vmap(jax.vmap(f))(*heads)
    flat = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), heads)  # (B·H, ...)
    batch_size = together if together > 1 else None
    out = lax.map(lambda head: f(*head), flat, batch_size=batch_size)
    return jax.tree.map(lambda x: x.reshape(n_rows, n_heads, *x.shape[1:]), out)


def by_group(
    f: Callable[..., Any], shared: tuple[int, ...], summed: tuple[int, ...], together: bool
) -> Callable[..., Any]:
    """`f`, a function of one head, for R heads that share some arguments, which are not repeated.

    Args:
      f: takes arrays, or trees of them, and returns a tuple of arrays.
      shared: the places of the arguments that the heads share; the others get a leading axis R.
      summed: the places of the results that are summed over the heads, in float32; the others get a
        leading axis R.
      together: whether the heads are computed all at once, or one after the other.
    """

    def of_group(*args: Any) -> Any:
        own = [None if i in shared else x for i, x in enumerate(args)]

        def one(own: Any) -> Any:
            return f(*[x if i in shared else own[i] for i, x in enumerate(args)])

        if together:
            out = jax.vmap(one)(own)
            return tuple(
                x.sum(0, dtype=jnp.float32) if i in summed else x for i, x in enumerate(out)
            )

        def step(totals: Any, own: Any) -> Any:
            out = one(own)
            totals = tuple(total + out[i] for total, i in zip(totals, summed, strict=True))
            return totals, tuple(x for i, x in enumerate(out) if i not in summed)

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], own))
        zeros = tuple(jnp.zeros(shapes[i].shape, jnp.float32) for i in summed)
        totals, stacked = lax.scan(step, zeros, own)
        sums, rest = dict(zip(summed, totals, strict=True)), iter(stacked)
        return tuple(sums[i] if i in summed else next(rest) for i in range(len(shapes)))

    return of_group


def split_group(x: Any, group: int) -> Any:
    """Arrays (B, H, …) as (B, H / R, R, …), for R = `group`; None and R = 1 change nothing."""
    if group == 1:
        return x
    return jax.tree.map(lambda x: x.reshape(len(x), -1, group, *x.shape[2:]), x)


def join_group(x: jax.Array, group: int) -> jax.Array:
    """Undoes `split_group`: (B, H / R, R, …) → (B, H, …)."""
    return x if group == 1 else x.reshape(len(x), -1, *x.shape[3:])


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """c·tanh(scores / c) for c = `softcap`; `scores` themselves without one."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def uncapped(d_scores: jax.Array, scores: jax.Array, softcap: float | None) -> jax.Array:
    """The cotangent of the arguments of `capped`, from that of its results, `scores`."""
    return d_scores if softcap is None else d_scores * (1 - jnp.square(scores / softcap))


def keys_of_heads(rng: jax.Array, n_heads: int) -> jax.Array:
    """A random key for every head.

    Args:
      rng: one typed key (), or one for each head (H,), which is returned unchanged.
      n_heads: H.

    Returns:
      Typed keys (H,).

    Raises:
      TypeError: if `rng` is no typed key.
      ValueError: if its shape is neither () nor (H,).
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
    """A random key for every head of every row.

    Args:
      rng: one typed key (), or one for each head (H,); or None.
      shape: (B, H).

    Returns:
      Typed keys (B, H); None without a key.
    """
    if rng is None:
        return None
    n_rows, n_heads = shape
    by_row = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return by_row(keys_of_heads(rng, n_heads), jnp.arange(n_rows, dtype=jnp.int32))


def drop(rate: float, rng: jax.Array | None, tile: Any, probabilities: jax.Array) -> jax.Array:
    """Dropout: sets a share of the probabilities to zero and scales up the others.

    The mask depends only on the key and the tile's number, so that the backward pass computes it
    again.

    Args:
      rate: share set to zero, in [0, 1).
      rng: a typed key; None for no dropout.
      tile: the tile's number, int32 ().
      probabilities: float32, any shape.

    Returns:
      float32, of the same shape.
    """
    if rng is None:
        return probabilities
    # 16 random bits give the rate to within 2⁻¹⁷, at half the cost of 32.
    n_dropped = min(round(rate * 65536), 65535)
    bits = jax.random.bits(jax.random.fold_in(own_key(rng), tile), probabilities.shape, jnp.uint16)
    return jnp.where(bits >= n_dropped, probabilities * (65536 / (65536 - n_dropped)), 0.0)


def loop(low: Any, high: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop`, without a loop where it is known to run at most once.

    Args:
      low, high: bounds, `high` exclusive: Python integers or int32 ().
      body: ``body(i, carry)`` → the next carry.
      carry: the first carry.

    Returns:
      The last carry.
    """
    if isinstance(low, int) and isinstance(high, int) and high - low <= 1:
        return body(low, carry) if high > low else carry
    # A Python integer would take JAX's default integer type, int32 or int64.
    low, high = (np.int32(x) if isinstance(x, int) else x for x in (low, high))
    return lax.fori_loop(low, high, body, carry)


def each(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, n: int) -> tuple[Any, Any]:
    """`lax.scan` over 0 … n − 1, without a loop where n is 1.

    Args:
      body: ``body(carry, i)`` → the next carry, and an output.
      carry: the first carry.
      n: how many rounds, at least 1.

    Returns:
      The last carry, and the outputs with a leading axis (n).
    """
    if n == 1:
        carry, out = body(carry, 0)
        return carry, jax.tree.map(lambda x: x[None], out)
    return lax.scan(body, carry, jnp.arange(n, dtype=jnp.int32))


def least(*xs: Any) -> Any:
    """The minimum of integers: a Python integer if all are, else an int32 array ()."""
    return min(xs) if all(isinstance(x, int) for x in xs) else functools.reduce(jnp.minimum, xs)


def most(*xs: Any) -> Any:
    """The maximum of integers: a Python integer if all are, else an int32 array ()."""
    return max(xs) if all(isinstance(x, int) for x in xs) else functools.reduce(jnp.maximum, xs)
