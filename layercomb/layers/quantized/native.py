"""Dispatch to `layercomb_kernels`, which is faster than XLA on a CPU: few rows, and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Imported here, not at a kernel's first use: `layercomb_kernels.off()` is part of JAX's cache key,
# so a later import would make JAX compile programs again. The import itself compiles nothing.
import layercomb_kernels

FEW = 32  # the most rows for which a kernel is faster than XLA


def has_kernels(n_rows: int, *wide: jax.Array) -> bool:
    """Whether a native kernel for few rows computes this call: see `runs_natively`.

    Args:
      n_rows: rows of activations, of which there must be 1 to `FEW`.
      *wide: arrays that the kernel takes as float32.
    """
    return 0 < n_rows <= FEW and runs_natively(*wide)


def runs_natively(*wide: jax.Array) -> bool:
    """Whether native kernels take these arrays.

    They need a CPU, a single device, and float32 arrays that are not empty. With several devices
    arrays may be sharded, and a kernel would be given whole arrays.

    Args:
      *wide: arrays that the kernel takes as float32.
    """
    if jax.default_backend() != 'cpu' or jax.device_count() > 1:
        return False
    if any(x.dtype != jnp.float32 or not x.size for x in wide):
        return False
    return layercomb_kernels.available()


def attends_natively(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether kernels compute attention of whole sequences, without bias and dropout.

    XLA computes the tiles of `flash` one after the other, on one thread. The kernels compute such
    tiles on all threads, and keep them in the caches: a fifth less work on a CPU.

    Args:
      q: (B, H, Lq, K).
      k: (B, G, Lk, K).
      v: (B, G, Lk, D).
    """
    whole = not any(x.shape[-1] % layercomb_kernels.DEPTH for x in (k, v))
    return whole and runs_natively(q, k, v)


def with_kernel(plain: Callable[..., Any], by_kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes `by_kernel` in programs for a CPU, and `plain` elsewhere.

    Args:
      plain: the function in JAX; derivatives are always its own.
      by_kernel: takes the same arguments and returns the same shapes and dtypes.
    """

    @jax.custom_jvp
    def fast(*args: Any) -> Any:
        return lax.platform_dependent(*args, cpu=by_kernel, default=plain)

    @fast.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return fast(*primals), jax.jvp(plain, primals, tangents)[1]

    return fast
