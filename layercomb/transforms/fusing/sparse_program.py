"""`SparseProgram`: a `Program` with the instructions of sparse layers, too.

Shape letters: B batch, T new positions, D width, S modules, F features of a module or units, R the
rank of a controller, P positions and J modules of a convolution, M the width of a module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import layercomb_kernels
from layercomb.layers.quantized.matrix import Narrow, rows_of
from layercomb.transforms.fusing.program import Program, Value, Written, need


class Routing(NamedTuple):
    """How a mixture chooses experts, and what they compute.

    Attributes:
      n_experts, n_chosen, n_shared: of them all, of the chosen, and of those that are always on.
      softmax: whether scores are made by it; else each is a sigmoid.
      normalize: whether the scores of the chosen are divided by their sum.
      scale: what the chosen are multiplied by, beside their scores.
      activation: of the units, one of `ACTIVATIONS`.
    """

    n_experts: int
    n_chosen: int
    n_shared: int
    softmax: bool
    normalize: bool
    scale: float
    activation: str

    @property
    def n_routed(self) -> int:
        """How many there are to choose from."""
        return self.n_experts - self.n_shared


class SparseProgram(Program):
    """Instructions of any layers, sparse ones included."""

    def view(self, x: Value, shape: Sequence[int]) -> Value:
        """The same value, as layers see it in another shape: heads, or their features."""
        return Value(x.number, tuple(shape), x.width)

    def join(self, parts: Sequence[Value], width: int) -> Value:
        """Values (B, T, D) side by side, (B, T, width), without what is beyond the width."""
        y = self._value((*parts[0].shape[:2], width), width)
        self._emit('join', (y, len(parts), *parts), parts, (y,))
        return y

    def factored_product(self, x: Value, modules: Any, features: Any, bias: Any) -> Value:
        """y[s·F + f] = Σ_d x[d] modules[s, d] features[f, d] + bias.

        Args:
          x: (B, T, D).
          modules: (S, D) float32.
          features: (F, D), a float32 array or `Narrow`.
          bias: float32 of the first outputs; or None.

        Returns:
          (B, T, S·F).
        """
        (s, d), f = modules.shape, features.shape[0]
        need(_is_float32(modules) and d == x.width and s * f > 0, 'modules of another kind')
        need(bias is None or _is_float32(bias, 1), 'a bias of another kind')
        need(bias is None or len(bias) <= s * f, 'a bias of another width')
        words, scales, options = _table(features, f, d)
        y, scaled = self._value((*x.shape[:2], s * f), s * f), self._value(x.shape, s * d)
        n, at = self._n_products, self.operand(words)
        self._n_products += 1
        its = self.operand(modules), at, at if scales is None else self.operand(scales)
        prepared = 'prepared', n
        # x is scaled here, or in the parts, which then read it.
        self._emit('factors', (n, x, y, scaled, *its, *options), (x,), (prepared, scaled))
        self._emit('product', (1, n), (x, prepared), (y, scaled), by_row=False)
        last = at if bias is None else self.operand(bias)
        self._emit('product', (2, n, y, last, bias is not None), (y, scaled), (y,))
        return y

    def convolve(
        self, x: Value, past: Any, taken: Any, kernel: Any, bias: Any
    ) -> tuple[tuple[Value, ...], Written]:
        """A causal convolution over positions and modules, which keeps its inputs.

        Args:
          x: (B, T, S·M).
          past: (B, P − 1 + L, S·M) float32, what is kept.
          taken: (B,) int32, the positions taken.
          kernel: (P, J, M, N·M) float32.
          bias: (N, M) float32.

        Returns:
          N values (B, T, S·M), and what is kept then.
        """
        self._check_taken(taken)
        (n_p, n_j, m, f), (n, _) = kernel.shape, bias.shape
        need(_is_float32(kernel) and kernel.size > 0, 'a kernel of another kind')
        need(_is_float32(bias) and bias.shape == (n, m) and f == n * m, 'a bias of another kind')
        need(_is_float32(past, 3) and len(past) == self.batch, 'past inputs of another kind')
        need(past.shape[2] == x.width and x.width % m == 0, 'modules of another width')
        need(self.operand(past) not in self._written, 'one past for two layers')
        to, n_s, room = self.written(past), x.width // m, past.shape[1] - n_p + 1
        made = [self.like(x) for _ in range(n)]
        its = [self.operand(each) for each in (taken, kernel, bias)]
        number = self._n_convolutions
        self._n_convolutions += 1
        words = number, x, to, *its, n_p, n_j, n_s, room, n, *made
        self._emit('convolve', (0, *words), (x,), (to,))
        self._emit('convolve', (1, number), (to,), made, by_row=False)
        return tuple(made), to

    def chosen(
        self, x: Value, kernels: tuple[Any, Any], controller: tuple[Any, Any],
        biases: tuple[Any, Any], block_size: int, activation: str,
    ) -> Value:  # fmt: skip
        """A feed-forward of one unit of each block of N, that whose logits are largest.

        Args:
          x: (B, T, D).
          kernels: W₁ and W₂ (F, D), float32 arrays or `Narrow`.
          controller: (D, R) and (R, F) float32, whose product with x are the logits.
          biases: (F,) and (D,) float32, or None.
          block_size: N.
          activation: of the units, one of `ACTIVATIONS`.

        Returns:
          (B, T, D).
        """
        down, up = controller
        rank, f = up.shape
        need(_is_float32(up) and f % block_size == 0, 'a controller of another kind')
        _check_biases(biases, ((f,), (x.width,)))
        first, second = (self._chosen_rows(kernel, f, x.width) for kernel in kernels)
        b1, b2 = ((first[0] if b is None else self.operand(b), b is not None) for b in biases)
        n, lead, n_blocks = self._n_choices, x.shape[:2], f // block_size
        self._n_choices += 1
        inner = self.product(x, down, None, (*lead, rank))
        h, y = self._value((*lead, n_blocks), n_blocks), self.like(x)
        prepared, units = ('rounded', n), ('units', n)
        self._emit('choose', (0, n, x, *first, n_blocks), (x,), (prepared,))
        words = 1, n, inner, h, self.operand(up), *b1, *second
        # Floats are prepared by leaving them where they are, so x is read here, too.
        self._emit('choose', words, (x, inner, prepared), (h, units), by_row=False)
        a = self.activate(h, activation)
        self._emit('choose', (2, n, a, y, *second, *b2), (a, units), (y,), by_row=False)
        return y

    def mixture(
        self, x: Value, kernels: Sequence[Any], router: tuple[Any, Any], biases: tuple[Any, Any],
        routing: Routing,
    ) -> Value:  # fmt: skip
        """A feed-forward of experts, of which some are shared, and others chosen by their scores.

        Args:
          x: (B, T, D).
          kernels: W₁, W₂ and perhaps V (E, M, D), float32 arrays or `Narrow`.
          router: (D, R) float32, whose product with x makes the scores, and what is added to these
            for the choice, (R,) float32 or None.
          biases: (E, M) and (D,) float32, or None.
          routing: how experts are chosen, and what they compute.

        Returns:
          (B, T, D).
        """
        kernel, bias = router
        (n_experts, m, _), lead = kernels[0].shape, x.shape[:2]
        f = n_experts * m
        need(n_experts == routing.n_experts, 'experts of another number')
        shapes = (routing.n_routed,), (n_experts, m), (x.width,)
        _check_biases((bias, *biases), shapes)
        need(_is_float32(kernel, 2) and kernel.shape[1] == routing.n_routed, 'another router')
        its = [self._chosen_rows(each, f, x.width) for each in kernels]
        first, second, up = its[0], its[1], its[-1]
        gated, n = len(its) > 2, self._n_mixtures
        self._n_mixtures += 1
        choice, b1, b2 = ((first[0] if b is None else self.operand(b), b is not None)
                          for b in (bias, *biases))  # fmt: skip
        s = self.product(x, kernel, None, (*lead, routing.n_routed))
        s = s if routing.softmax else self.activate(s, 'sigmoid')
        width = (routing.n_chosen + routing.n_shared) * m
        gates, h = (self._value((*lead, width), width) for _ in range(2))
        g = self.like(h) if gated else h
        how = routing.n_chosen, routing.n_shared, routing.softmax, routing.normalize
        scale = self._factor(routing.scale)
        words = 0, n, x, s, gates, *choice, *how, scale, *first, *up, gated
        experts, made = ('experts', n), dict.fromkeys((h, g))
        self._emit('route', words, (x, s), (gates, experts))
        # Floats are prepared by leaving them where they are, so x is read here, too.
        self._emit('route', (1, n, h, g, *b1, *second), (x, experts), made, by_row=False)
        a = self.activate(h, routing.activation)
        a = self.combine('multiply', a, g) if gated else a
        a, y = self.combine('multiply', a, gates), self.like(x)
        self._emit('route', (2, n, a, y, *second, *b2), (a, experts), (y,), by_row=False)
        return y

    def _chosen_rows(self, table: Any, f: int, d: int) -> tuple[int, int]:
        """The numbers of words and scales of a table whose rows are chosen."""
        words, scales, _ = _table(table, f, d, chosen=True)
        at = self.operand(words)
        return at, at if scales is None else self.operand(scales)


def _check_biases(biases: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises `Unfit` unless all are None or float32 arrays of their shapes."""
    for bias, shape in zip(biases, shapes, strict=True):
        known = bias is None or (_is_float32(bias) and bias.shape == shape)
        need(known, 'a bias of another kind')


def _is_float32(array: Any, ndim: int | None = None) -> bool:
    shaped = isinstance(array, jax.Array | np.ndarray) and ndim in (None, array.ndim)
    return shaped and bool(array.dtype == jnp.float32)


def _table(table: Any, f: int, d: int, chosen: bool = False) -> tuple[Any, Any, tuple[int, bool]]:
    """Words, scales or None, and how many bytes of activations count, and whether minima are there.

    Args:
      table: a float32 array (F, D), or a `Narrow`; of experts, (E, M, D) with F rows in all.
      f, d: of which shape it must be.
      chosen: whether rows are chosen, for which there are no panels.
    """
    need(isinstance(table, jax.Array | np.ndarray | Narrow), 'a table of another kind')
    its = rows_of(table)
    need(
        its.axes == 'oi' and its.shape[-1] == d and math.prod(its.shape) == f * d > 0,
        'another table',
    )
    options = its.activation_bits // 8, its.minima
    if its.in_panels:
        need(not chosen, 'rows in panels')
        layercomb_kernels.check_panels(its.values, its.scales, d, its.minima)
        return its.values, its.scales, options
    halves = its.scales is not None and its.scales.dtype != jnp.float32
    need(not its.minima and not halves, 'rows with minima or short scales')
    kinds = jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8
    need(its.values.dtype in kinds, 'rows of another kind')
    return its.values, its.scales, options
