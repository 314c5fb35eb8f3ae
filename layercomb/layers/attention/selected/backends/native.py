"""Selected attention by `layercomb_kernels`, where each query reads what it sees and nothing else.

XLA computes whole tiles, of which most keys are not seen where few of a bucket are asked for.
"""

from __future__ import annotations

from typing import Any

import jax

import layercomb_kernels
from layercomb.layers.attention.selected.backends.sets import Plan
from layercomb.layers.quantized.native import runs_natively

NARROW = 256  # keys of a window


def applies(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether the kernels compute this call: they know no dropout, some depths and narrow windows.

    Where a window is wide, tiles are full, and products of whole tiles are faster.

    Args:
      plan: the static description.
      q, k, v: (B, H, L, K), (B, G, L, K) and (B, G, L, D).
    """
    fits = q.shape[-1] == v.shape[-1] and v.shape[-1] in layercomb_kernels.DEPTHS
    narrow = max(n for n, _ in plan.windows) <= NARROW
    return fits and narrow and not plan.dropout_rate and runs_natively(q, k, v)


def forward(plan: Plan, q: Any, k: Any, v: Any, buckets: Any, mask: Any, segments: Any) -> Any:
    """The output (B, H, L, D) and the logsumexp (B, H, L).

    Args:
      plan: the static description.
      q, k, v, buckets, mask, segments: as of `selected_attention`, the buckets as a pair.
    """
    return layercomb_kernels.selected_forward(_said(plan), q, k, v, buckets, mask, segments)


def backward(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    buckets: Any,
    mask: Any,
    segments: Any,
    kept: Any,
    d_out: Any,
) -> Any:
    """The gradients of q, k and v.

    Args:
      plan, q, k, v, buckets, mask, segments: as of `forward`.
      kept: what that returned.
      d_out: (B, H, L, D), the cotangent of the output.
    """
    return layercomb_kernels.selected_backward(
        _said(plan), q, k, v, buckets, kept, d_out, mask, segments
    )


def chooses(q: jax.Array, means: jax.Array) -> bool:
    """Whether the kernels choose blocks: XLA sorts all products of a query with means.

    Args:
      q: (B, H, P, K).
      means: (B, G, N, K).
    """
    return runs_natively(q, means)


def _said(plan: Plan) -> layercomb_kernels.Selection:
    return layercomb_kernels.Selection(
        n_buckets=plan.n_buckets,
        n_keys=plan.n_keys,
        local_len=plan.local_len,
        n_sinks=plan.n_sinks,
        causal=plan.causal,
        once=plan.once,
        scale=plan.scale,
        softcap=plan.softcap,
    )
