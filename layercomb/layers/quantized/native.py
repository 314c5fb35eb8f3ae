"""Functions that `layercomb_kernels` computes where few rows are multiplied on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Here, and not at a kernel's first use: programs depend on whether `layercomb_kernels.off()`
# surrounds them, so JAX would compile again what it compiled before. Nothing is compiled by this.
import layercomb_kernels

FEW = 32  # rows, at most, for which a kernel is quicker than XLA


def has_kernels(n_rows: int, *wide: jax.Array) -> bool:
    """Whether a kernel is to take so few rows, and arrays that must be float32 for it.

    Where there are several devices arrays may be sharded, of which kernels know nothing: each of
    them would then be given the whole.
    """
    if not 0 < n_rows <= FEW or jax.default_backend() != 'cpu' or jax.device_count() > 1:
        return False
    if any(x.dtype != jnp.float32 or not x.size for x in wide):
        return False
    return layercomb_kernels.available()


def with_kernel(plain: Callable[..., Any], by_kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function `plain`, computed by another one in programs for a CPU.

    Its derivatives are those of `plain`.
    """

    @jax.custom_jvp
    def fast(*args: Any) -> Any:
        return lax.platform_dependent(*args, cpu=by_kernel, default=plain)

    @fast.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return fast(*primals), jax.jvp(plain, primals, tangents)[1]

    return fast
