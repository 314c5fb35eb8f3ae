"""Attention of whole sequences by `layercomb_kernels`: a fifth less work than XLA's on a CPU.

XLA computes the tiles of `flash` one after the other, on one thread. The kernels compute
such tiles on all threads, and keep them in the caches.
"""

from __future__ import annotations

import jax

import layercomb_kernels
from layercomb.layers.quantized.native import runs_natively


def applies(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether the kernels compute this call, without bias and dropout.

    Args:
      q: (B, H, Lq, K).
      k: (B, G, Lk, K).
      v: (B, G, Lk, D).
    """
    whole = not any(x.shape[-1] % layercomb_kernels.DEPTH for x in (k, v))
    return whole and runs_natively(q, k, v)
