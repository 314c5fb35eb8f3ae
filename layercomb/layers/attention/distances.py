"""Biases of the scores that depend only on the distance of key and query, a block at a time.

One head's bias is a vector b of N = 2R + 1 numbers: a key at position s adds b[s − t + R] to the
score of a query at t. From distance R on it does not change: b[0] is of all keys at least R before,
b[2R] of all keys at least R after. No (Lq, Lk) matrix of biases exists. `padded` adds n entries at
each end, so that each block of q queries and c keys cuts its n = q + c distances from one place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles


def padded(bias: jax.Array, n: int) -> jax.Array:
    """Repeats the first and the last entry n times: (…, N) → (…, N + 2n)."""
    return jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(n, n)], mode='edge')


def unpadded(d_bias: jax.Array, n: int) -> jax.Array:
    """The transpose of `padded`: (…, N + 2n) → (…, N)."""
    middle = d_bias[..., n:-n]
    middle = middle.at[..., 0].add(d_bias[..., :n].sum(-1))
    return middle.at[..., -1].add(d_bias[..., -n:].sum(-1))


def window_start(bias: jax.Array, first: Any, n_queries: int, n_keys: int) -> Any:
    """Where the distances of a block begin in a padded bias.

    Args:
      bias: (N + 2n,), as of `padded` for n = q + c.
      first: distance from the block's first query to its first key, int32 ().
      n_queries, n_keys: q and c.

    Returns:
      int32 (). Blocks all of whose distances are beyond the bias share the places at its ends.
    """
    n = n_queries + n_keys
    reach = (len(bias) - 2 * n - 1) // 2
    return tiles.most(0, tiles.least(first - n_queries + n + reach, len(bias) - n))


def of_block(bias: jax.Array, first: Any, n_queries: int, n_keys: int) -> jax.Array:
    """The biases of a block of scores.

    Args:
      bias, first, n_queries, n_keys: as of `window_start`.

    Returns:
      (q, c).
    """
    at = window_start(bias, first, n_queries, n_keys)
    window = lax.dynamic_slice_in_dim(bias, at, n_queries + n_keys)
    return spread(window, n_queries, n_keys)


def add_of_block(d_bias: jax.Array, d_scores: jax.Array, first: Any) -> jax.Array:
    """Adds the cotangent of a block's biases to that of a padded bias: the transpose of `of_block`.

    Args:
      d_bias: (N + 2n,) float32.
      d_scores: (q, c) float32.
      first: as of `window_start`.

    Returns:
      (N + 2n,).
    """
    n_queries, n_keys = d_scores.shape
    at = window_start(d_bias, first, n_queries, n_keys)
    old = lax.dynamic_slice_in_dim(d_bias, at, n_queries + n_keys)
    transposed = jax.linear_transpose(lambda w: spread(w, n_queries, n_keys), old)
    return lax.dynamic_update_slice_in_dim(d_bias, old + transposed(d_scores)[0], at, 0)


def spread(window: jax.Array, n_queries: int, n_keys: int) -> jax.Array:
    """A matrix with equal diagonals: y[a, b] = window[b − a + q], without a gather.

    Rows of n numbers, laid out one after the other and read again in rows of n − 1, move by one
    place a row.

    Args:
      window: (n,), n = q + c.
      n_queries, n_keys: q and c.

    Returns:
      (q, c).
    """
    n = n_queries + n_keys
    turned = jnp.concatenate([window[n_queries:], window[:n_queries]])
    rows = jnp.broadcast_to(turned[None], (n_queries, n)).reshape(-1)  # (q·n,)
    return rows[: n_queries * (n - 1)].reshape(n_queries, n - 1)[:, :n_keys]


def of_one_query(bias: jax.Array, position: jax.Array, n_keys: int) -> jax.Array:
    """The biases of one query per row to all keys.

    Args:
      bias: (N, H).
      position: of the query, (B,) int32.
      n_keys: Lk.

    Returns:
      (B, H, Lk) float32.
    """
    reach = len(bias) // 2
    distance = jnp.arange(n_keys, dtype=jnp.int32)[None] - position[:, None]  # (B, Lk)
    entry = jnp.clip(distance, -reach, reach) + reach
    return jnp.take(bias.astype(jnp.float32), entry, axis=0).swapaxes(1, 2)  # (B, H, Lk)


def check_bias(bias: Any, n_heads: int) -> None:
    """Raises a ValueError unless a bias is a floating (N, H), with N odd."""
    fits = bias.ndim == 2 and bias.shape[1] == n_heads and bias.shape[0] % 2
    if not (fits and jnp.issubdtype(bias.dtype, jnp.floating)):
        raise ValueError(
            f'bias must be floats (2·reach + 1, {n_heads} heads), one for each distance, as '
            f'RelativeBias({n_heads}) makes them, got {bias.dtype}{list(bias.shape)}'
        )
