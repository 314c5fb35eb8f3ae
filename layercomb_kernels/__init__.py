"""Products of a few rows of activations with narrow weights, in C++, for decoding on a CPU.

XLA widens int8, int4 and bfloat16 weights anew at every product, which at one position costs ten
times what the product does. These kernels read each weight once, at the speed of the memory. They
are compiled at first use, with the machine's own compiler; without one, or with
``LAYERCOMB_KERNELS=0``, `available` is false, and the library multiplies as XLA does.
``python -m layercomb_kernels`` says what there is, and compiles ahead.

Weights are float32, bfloat16, int8, or two int4 in a byte (uint8): byte j of a row of n holds
column j in its low half, and column j + n in its high one. Scales are float32, one for each group
of weights, or of shape (0, 0) where there are none. Letters: M rows of activations, D their width,
F outputs, K gathered rows, G groups.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from layercomb_kernels import build

_NAMES = ('column_products', 'row_products', 'gathered_products', 'gathered_sums')

_off = jax.make_user_context(False)


def available() -> bool:
    """Whether the kernels work here; the first call compiles them."""
    return why_not() is None


def why_not() -> str | None:
    """What keeps the kernels from being used, in one line; None if nothing does."""
    return 'switched off by layercomb_kernels.off()' if _off.value else _register()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A context without kernels, for programs that leave this process, such as `jax.export`'s.

    What is traced inside is not mixed up with what was traced outside.
    """
    with _off(True):
        yield


@functools.cache
def _register() -> str | None:
    try:
        library = build.load()
        for name in _NAMES:
            handler = jax.ffi.pycapsule(getattr(library, f'layercomb_{name}'))
            jax.ffi.register_ffi_target(f'layercomb_{name}', handler, platform='cpu')
    except build.Unavailable as e:
        return str(e)
    return None


def column_products(x: jax.Array, words: jax.Array, scales: jax.Array, width: int) -> jax.Array:
    """y[m, f] = Σ_d x[m, d] W[d, f].

    Args:
      x: (M, D) float32.
      words: (D, F), or (D, ⌈F / 2⌉) of int4.
      scales: (G, F), for groups of D / G weights of a column.
      width: F.

    Returns:
      (M, F) float32.
    """
    _check(x.shape[1] == words.shape[0] and width <= _columns(words), x, words)
    return _call('column_products', (x.shape[0], width), x, words, scales)


def row_products(x: jax.Array, words: jax.Array, scales: jax.Array) -> jax.Array:
    """y[m, f] = Σ_d x[m, d] W[f, d].

    Args:
      x: (M, D) float32.
      words: (F, D), or (F, D / 2) of int4.
      scales: (F, G), for groups of D / G weights of a row.

    Returns:
      (M, F) float32.
    """
    _check(x.shape[1] == _columns(words), x, words)
    return _call('row_products', (x.shape[0], words.shape[0]), x, words, scales)


def gathered_products(
    x: jax.Array, at: jax.Array, words: jax.Array, scales: jax.Array
) -> jax.Array:
    """y[m, k] = Σ_d x[m, d] W[at[m, k], d], reading no other rows.

    Args:
      x: (M, D) float32.
      at: (M, K) int32; what lies outside takes the nearest row.
      words, scales: as of `row_products`.

    Returns:
      (M, K) float32.
    """
    _check(x.shape[1] == _columns(words) and len(x) == len(at), x, at, words)
    return _call('gathered_products', at.shape, x, at, words, scales)


def gathered_sums(h: jax.Array, at: jax.Array, words: jax.Array, scales: jax.Array) -> jax.Array:
    """y[m, d] = Σ_k h[m, k] W[at[m, k], d], reading no other rows.

    Args:
      h: (M, K) float32.
      at, words, scales: as of `gathered_products`.

    Returns:
      (M, D) float32.
    """
    _check(h.shape == at.shape, h, at, words)
    return _call('gathered_sums', (h.shape[0], _columns(words)), h, at, words, scales)


def _columns(words: jax.Array) -> int:
    return words.shape[1] * (2 if words.dtype == jnp.uint8 else 1)


def _check(fits: bool, *args: jax.Array) -> None:
    """The kernels trust the shapes that they are given."""
    if not fits:
        shapes = ', '.join(str(tuple(x.shape)) for x in args)
        raise ValueError(f'the shapes do not fit together: {shapes}')


def _call(name: str, shape: tuple[int, ...], *args: jax.Array) -> jax.Array:
    reason = _register()
    if reason is not None:
        raise RuntimeError(f'there are no kernels: {reason}')
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(f'layercomb_{name}', result, vmap_method='sequential')(*args)
