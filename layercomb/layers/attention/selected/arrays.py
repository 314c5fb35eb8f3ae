"""`check_arrays`: whether queries, keys, values and what goes with them fit together."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from layercomb.layers.attention.functions import check_mask, check_segments, check_shared_heads


def check_arrays(q: Any, k: Any, v: Any, mask: Any, segments: Any) -> None:
    """Checks the arrays of attention that selects, whose keys are those of the same positions.

    Args:
      q, k, v: (B, H, L, K), (B, G, L, K) and (B, G, L, D).
      mask: (B, L) bool; or None.
      segments: (B, L) int32; or None.

    Raises:
      ValueError: if shapes or dtypes do not fit together.
    """
    shapes = f'q {q.shape}, k {k.shape}, v {v.shape}'
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or not q.shape[2]:
        raise ValueError(
            'selected attention takes q (B, H, L, K), k (B, G, L, K) and v (B, G, L, D), got '
            f'{shapes}'
        )
    check_shared_heads(q.shape[1], k.shape[1], 'keys and values', shapes)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ValueError(f'attention takes floats, got q {q.dtype}, k {k.dtype}, v {v.dtype}')
    if mask is not None:
        check_mask(mask, (q.shape[0], q.shape[2]))
    check_segments(segments, q, k)
