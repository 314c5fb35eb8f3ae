"""`LocalConv`: a causal convolution over positions and modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import layercomb_kernels
from layercomb.checks import Size
from layercomb.layers.basic.convolution import convolve
from layercomb.layers.basic.initializers import Initializer, lecun_normal, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.decoding.seek import held
from layercomb.layers.facts.sequence import surrounded
from layercomb.layers.quantized.native import has_kernels, with_kernel
from layercomb.layers.sparse.multiplicative import (
    check_modules,
)
from layercomb.shapes import Signature, as_deep, check_float, check_sequence, check_width
from layercomb.trees import Tree


class LocalConv(Layer):
    """A causal convolution over positions and modules: (B, L, S·M) → n_outputs of (B, L, S·M).

    With x reshaped to (B, L, S, M), i counting positions back and j modules to either side::

        y[t, s] = Σᵢⱼ x[t − i, s + j] W[i, j] + b

    All modules share the kernel, so there are few weights. One convolution computes all outputs,
    each with a kernel of its own.

    In ``PREDICT`` the state keeps the inputs, with room for the length of the signature given to
    `init`.

    Weights: ``kernel`` (positions, modules, M, n_outputs·M), ``bias`` (n_outputs, M).

    Attributes:
      n_modules: S, which must divide the width.
      kernel_size: how many positions an output sees, the last being its own, and how many modules,
        its own in the middle.
      n_outputs: number of outputs.
      kernel_init: of W.
      bias_init: of b.

    Raises:
      ValueError: if S does not divide the width, naming the nearest number that does.

    References:
      Jaszczur et al. 2021, section 3.2, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl
    >>> tl.LocalConv(4, n_outputs=3).n_out
    3
    """

    n_modules: Size
    kernel_size: tuple[Size, Size] = (3, 3)
    n_outputs: Size = 1
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    n_out = property(lambda self: self.n_outputs)
    # One matrix: with separate ones per place of the kernel, optimizer steps would be too large.
    weight_axes = {'kernel': 'WXM->F', 'bias': 'N|->M'}
    position_wise = False
    spans_devices = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """Weights as the class lists them, float32; the state is a `Past` in ``PREDICT``.

        Args:
          signature: of x (B, L, S·M), floating.
          rng: a typed key.
          mode: see `Mode`.

        Raises:
          ValueError: if S does not divide the width.
        """
        (x,) = signature
        check_sequence('LocalConv', x)
        check_float('LocalConv', x)
        check_modules('LocalConv', self.n_modules, x.shape[-1])
        m, n = x.shape[-1] // self.n_modules, self.n_outputs
        kernel_key, bias_key = jax.random.split(rng)
        kernel = self.kernel_init(kernel_key, (*self.kernel_size, m, n * m))
        weights = {'kernel': kernel, 'bias': self.bias_init(bias_key, (n, m))}
        if mode is not Mode.PREDICT:
            return weights, {}
        return weights, Past.empty(x, self._reach)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """`n_outputs` arrays (B, L, S·M), and the new state.

        Args:
          weights: as of `init`.
          state: in ``PREDICT`` a `Past`.
          inputs: x (B, L, S·M); in ``PREDICT`` the next positions.
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: if shapes do not fit, or the cache overflows.
        """
        (x,) = inputs
        check_sequence('LocalConv', x)
        m, length = weights['kernel'].shape[2], x.shape[1]
        check_width(x, self.n_modules * m)
        if mode is Mode.PREDICT:
            x, state = held(state, Past).extend(x, self._reach)
        else:
            x = surrounded(x, self._reach)
        side = self.kernel_size[1] - 1
        x = x.reshape(*x.shape[:2], self.n_modules, m)  # (B, reach + L, S, M)
        x = jnp.pad(x, ((0, 0), (0, 0), (side // 2, side - side // 2), (0, 0)))
        one = mode is Mode.PREDICT and length == 1
        fast = one and has_kernels(x.shape[0], x, weights['kernel'])
        y = (_convolve_one if fast else _convolve)(x, weights['kernel'])  # (B, L, S, n·M)
        y = y.reshape(*y.shape[:3], self.n_outputs, m)  # (B, L, S, n, M)
        y = y + as_deep(weights['bias'], y)
        return tuple(
            y[..., i, :].reshape(x.shape[0], length, self.n_modules * m)
            for i in range(self.n_outputs)
        ), state

    @property
    def _reach(self) -> int:
        """How many earlier positions the kernel sees."""
        return self.kernel_size[0] - 1


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel, (1, 1), 'VALID', (1, 1), groups=1)


def _convolve_by_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return layercomb_kernels.module_convolution(x, kernel)[:, None]  # (B, 1, S, F)


_convolve_one = with_kernel(_convolve, _convolve_by_kernel)
