"""Attention of new positions to keys and values as a decoding cache keeps them, narrow or not.

Shape letters: B batch, H heads, G heads of keys and values, T new positions, M room, K head depth,
D depth of values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.layers.attention.functions import dot_product_attention
from layercomb.layers.decoding.narrow import Kept, Rounded, is_narrow, widened
from layercomb.layers.quantized.native import has_kernels, with_kernel


def cached_attention(
    q: jax.Array,
    k: Kept,
    v: Kept,
    dtype: Any,
    *,
    offset: jax.Array,
    mask: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Causal `dot_product_attention` to a cache. Narrow keys and values are widened to float32.

    On a CPU a single position reads them as they are. Several positions, a bias, and several
    devices need a float32 copy of the whole cache for a moment.

    Args:
      q: (B, H, T, K), floating.
      k: (B, G, M, K), an array or `Rounded`.
      v: (B, G, M, D), likewise.
      dtype: of new keys and values, and of the result.
      offset: (B,) int32, the position of the first query, where the first key is at 0.
      mask, window, scale, softcap, bias: as of `dot_product_attention`.

    Returns:
      (B, H, T, D).
    """
    options: Any = {'scale': scale, 'softcap': softcap}
    more: Any = {'offset': offset, 'mask': mask, 'window': window, 'bias': bias, 'causal': True}
    if not is_narrow(k, dtype) and not is_narrow(v, dtype):
        return dot_product_attention(q, k, v, **options, **more)
    q = q.astype(jnp.float32)
    if bias is None and _are_read(q, k, v):
        seen = _seen(offset, k.shape[2], window, mask)
        y = _by_kernel(scale, softcap)(q, k, v, seen)
    else:
        y = dot_product_attention(q, widened(k), widened(v), **options, **more)
    return y.astype(dtype)


def _are_read(q: jax.Array, k: Kept, v: Kept) -> bool:
    """Whether the kernel for a single query reads what is kept."""
    rounded = [isinstance(x, Rounded) for x in (k, v)]
    halves = [not each and x.dtype == jnp.bfloat16 for each, x in zip(rounded, (k, v), strict=True)]
    return q.shape[2] == 1 and has_kernels(1, q) and (all(rounded) or all(halves))


def _seen(offset: jax.Array, n_keys: int, window: int | None, mask: jax.Array | None) -> jax.Array:
    """The keys that the single query of each row sees, (B, M) bool."""
    behind = offset[:, None] - jnp.arange(n_keys, dtype=jnp.int32)[None]
    seen = behind >= 0
    seen = seen if window is None else seen & (behind < window)
    return seen if mask is None else seen & mask


@functools.cache
def _by_kernel(scale: float | None, softcap: float | None) -> Callable[..., jax.Array]:
    """Attention of queries (B, H, 1, K) to the seen keys, (B, M) bool → (B, H, 1, D)."""

    def plain(q: jax.Array, k: Kept, v: Kept, seen: jax.Array) -> jax.Array:
        options: Any = {'scale': scale, 'softcap': softcap}
        return dot_product_attention(q, widened(k), widened(v), mask=seen, **options)

    def by_kernel(q: jax.Array, k: Kept, v: Kept, seen: jax.Array) -> jax.Array:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (k, v))  # → (B·G, M, …)
        scales = None
        if isinstance(k, Rounded):
            (k, k_scales), (v, v_scales) = jax.tree.leaves(k), jax.tree.leaves(v)
            scales = k_scales, v_scales
        query = q.reshape(-1, q.shape[-1]) * factor  # (B·H, K)
        y = layercomb_kernels.query_attention(query, k, v, seen, softcap, scales)
        return y.reshape(*q.shape[:3], -1)  # (B, H, 1, D)

    return with_kernel(plain, by_kernel)
