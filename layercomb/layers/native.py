"""Functions that `layercomb_kernels` computes where few rows are multiplied on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FEW = 32  # rows, at most, for which a kernel is quicker than XLA


def has_kernels(n_rows: int, *wide: jax.Array) -> bool:
    """Whether to multiply so few rows by a kernel, with arrays that must be float32 for it."""
    if n_rows > FEW or jax.default_backend() != 'cpu':
        return False
    if any(x.dtype != jnp.float32 for x in wide):
        return False
    import layercomb_kernels  # here, since it compiles, and most programs never come here

    return layercomb_kernels.available()


def with_kernel(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function `plain`, computed by `kernel` in programs for a CPU.

    Its gradient is that of `plain`; it has no forward-mode derivative.
    """

    @jax.custom_vjp
    def fast(*args: Any) -> Any:
        return lax.platform_dependent(*args, cpu=kernel, default=plain)

    fast.defvjp(lambda *args: (fast(*args), args), lambda args, ct: jax.vjp(plain, *args)[1](ct))
    return fast
