"""Convolutions over one and two axes. Channels come last."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.basic.initializers import Initializer, he_normal, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.decoding.seek import held
from layercomb.layers.facts.sequence import surrounded
from layercomb.shapes import Signature, as_deep, check_float, check_rank, check_width
from layercomb.trees import Tree


class Conv1D(Layer):
    """A convolution along the length: (B, L, D) → (B, L', n_units).

    y[t] = Σ_j x[stride·t + dilation·j − pad] W[j] + b. With padding 'causal', outputs depend on no
    later input. In ``PREDICT`` the state keeps earlier inputs, so decoding position by position
    gives the same outputs as the whole sequence.

    Weights: ``kernel`` (width, D / groups, n_units), ``bias`` (n_units,).

    Attributes:
      n_units: output channels.
      width: how many taps the kernel has.
      stride: every stride-th output is computed.
      padding: 'same', 'valid' or 'causal'.
      dilation: the distance between taps.
      groups: how many groups channels are split into, each with its own kernel.
      use_bias: whether to add b.
      kernel_init: of W.
      bias_init: of b.

    Raises:
      ValueError: in ``PREDICT``, unless the padding is causal and the stride 1; for an input
        that is shorter than the kernel, if the padding is 'valid'.
    """

    n_units: Size
    width: Size = 3
    stride: Size = 1
    padding: str = 'same'
    dilation: Size = 1
    groups: Size = 1
    use_bias: bool = True
    kernel_init: Initializer = he_normal()
    bias_init: Initializer = zeros()

    weight_axes = {'kernel': 'W|D->F', 'bias': '->F'}  # a matrix for each place
    position_wise = False
    spans_devices = property(
        lambda self: self.stride == 1 and (self.padding == 'causal' or self.width == 1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding not in ('same', 'valid', 'causal'):
            raise ValueError(
                f"Conv1D: padding is 'same', 'valid' or 'causal', got {self.padding!r}"
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """Weights; in ``PREDICT`` a state for the inputs of L positions, else none.

        Args:
          signature: of the input, (B, L, D) floating-point.
          rng: a typed key.
          mode: see `Mode`.

        Raises:
          TypeError: for integers.
          ValueError: for another rank, or if `groups` does not divide D and `n_units`.
        """
        (x,) = signature
        check_rank('Conv1D', x, '(batch, length, channels)', 3)
        weights = _weights(self, (self.width,), x, rng)
        if mode is not Mode.PREDICT:
            return weights, {}
        if self.padding != 'causal' or self.stride != 1:
            raise ValueError(
                "Conv1D decodes step by step only with padding='causal' and stride=1, this one has "
                f'padding={self.padding!r} and stride={self.stride}'
            )
        return weights, Past.empty(x, self._reach)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """(B, L, D) → (B, L', n_units); in ``PREDICT`` the L inputs are the next positions."""
        (x,) = inputs
        check_width(x, self.groups * weights['kernel'].shape[-2])
        check_window('Conv1D', (self._reach + 1,), x, self.padding)
        padding: Any = self.padding.upper()
        if self.padding == 'causal':
            if mode is Mode.PREDICT:
                x, state = held(state, Past).extend(x, self._reach)
            else:
                x = surrounded(x, self._reach)
            padding = 'VALID'
        y = convolve(
            x, weights['kernel'], (self.stride,), padding, (self.dilation,), groups=self.groups
        )
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state

    @property
    def _reach(self) -> int:
        """How many positions back the kernel sees."""
        return self.dilation * (self.width - 1)


class Conv2D(Layer):
    """A convolution over height and width: (B, H, W, D) → (B, H', W', n_units).

    Weights: ``kernel`` (kh, kw, D / groups, n_units), ``bias`` (n_units,).

    Attributes:
      n_units: output channels.
      kernel_size: (kh, kw).
      strides: along height and width.
      padding: 'same' or 'valid'.
      groups: how many groups channels are split into, each with its own kernel.
      use_bias: whether to add a bias.
      kernel_init: of the kernel.
      bias_init: of the bias.

    Raises:
      ValueError: for another padding; for an input smaller than the kernel, if it is 'valid'.
    """

    n_units: Size
    kernel_size: tuple[Size, Size] = (3, 3)
    strides: tuple[Size, Size] = (1, 1)
    padding: str = 'same'
    groups: Size = 1
    use_bias: bool = True
    kernel_init: Initializer = he_normal()
    bias_init: Initializer = zeros()

    weight_axes = {'kernel': 'YX|D->F', 'bias': '->F'}  # a matrix for each place
    position_wise = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_padding('Conv2D', self.padding)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """Weights, for an input (B, H, W, D); no state.

        Raises:
          TypeError: for integers.
          ValueError: for another rank, or if `groups` does not divide D and `n_units`.
        """
        (x,) = signature
        check_rank('Conv2D', x, '(batch, height, width, channels)', 4)
        return _weights(self, self.kernel_size, x, rng), {}

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """(B, H, W, D) → (B, H', W', n_units)."""
        (x,) = inputs
        check_width(x, self.groups * weights['kernel'].shape[-2])
        check_window('Conv2D', self.kernel_size, x, self.padding)
        y = convolve(
            x, weights['kernel'], self.strides, self.padding.upper(), (1, 1), groups=self.groups
        )
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    padding: str,
    dilation: tuple[int, ...],
    groups: int,
) -> jax.Array:
    """The convolution of x (B, *lengths, D) with a kernel (*sizes, D / groups, F).

    On the CPU, reverse-mode gradients are rearranged here; elsewhere they are XLA's own. The CPU's
    fast routine needs channels last. A gradient is a convolution with batch and channels exchanged,
    which XLA rearranges for that routine, but not inside ``lax.scan``: there its plain loops are
    about twenty times slower.

    Args:
      x: the input.
      kernel: the kernel; both are promoted to one dtype.
      strides: one for each length.
      padding: 'SAME' or 'VALID'.
      dilation: the distances between taps, one for each length.
      groups: how many groups the channels are split into.

    Returns:
      (B, *lengths', F).
    """
    reach = [d * (size - 1) for d, size in zip(dilation, kernel.shape, strict=False)]
    lengths, seen = x.shape[1:-1], [n + 1 for n in reach]
    pads = tuple(jax.lax.padtype_to_pads(lengths, seen, strides, padding))
    convolution = _convolve_on_cpu if jax.default_backend() == 'cpu' else _convolve
    x, kernel = (v.astype(jnp.promote_types(x.dtype, kernel.dtype)) for v in (x, kernel))
    return convolution(x, kernel, _Windows(strides, pads, dilation, groups))


class _Windows(NamedTuple):
    """Where the windows of a convolution lie; `holes` is the distance of neighbours in x."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    holes: tuple[int, ...] | None = None


def _convolve(x: jax.Array, kernel: jax.Array, windows: _Windows) -> jax.Array:
    strides, pads, dilation, groups, holes = windows
    axes = 'HW'[: len(strides)]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        lhs_dilation=holes,
        rhs_dilation=dilation,
        dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'),
        feature_group_count=groups,
    )


_convolve_on_cpu = jax.custom_vjp(_convolve, nondiff_argnums=(2,))


def _forward(x: jax.Array, kernel: jax.Array, windows: _Windows) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, windows), (x, kernel)


def _backward(windows: _Windows, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dx: dy, spread by the strides, with the flipped kernel. dW: x with dy as the kernel."""
    (x, kernel), (strides, pads, dilation, groups, _) = kept, windows
    axes = range(len(strides))
    back, across = [], []
    for i in axes:
        before, reach = pads[i][0], dilation[i] * (kernel.shape[i] - 1)
        last, length = strides[i] * (dy.shape[1 + i] - 1), x.shape[1 + i]
        back.append((reach - before, length + before - last - 1))
        across.append((before, last + reach + 1 - length - before))
    flipped = _swap(jnp.flip(kernel, tuple(axes)), -2, groups)  # (*sizes, F / G, D)
    dx = _convolve(dy, flipped, _Windows((1,) * len(axes), tuple(back), dilation, groups, strides))
    x = _swap(x, 0, groups)  # (D / G, *lengths, G·B)
    dy = jnp.moveaxis(dy, 0, -2)  # (*lengths', B, F)
    dw = _convolve(x, dy, _Windows(dilation, tuple(across), strides, groups))
    return dx, jnp.moveaxis(dw, 0, -2)  # (D / G, *sizes, F) → (*sizes, D / G, F)


def _swap(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Exchanges the axis with the channels of each group, which are last."""
    axis %= x.ndim
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    x = jnp.swapaxes(x, axis, -1)  # (…, G, n)
    return x.reshape(*x.shape[:-2], groups * x.shape[-1])


_convolve_on_cpu.defvjp(_forward, _backward)


def check_padding(owner: str, padding: str) -> None:
    """Raises a ValueError unless the padding is 'same' or 'valid'."""
    if padding not in ('same', 'valid'):
        raise ValueError(f"{owner}: padding is 'same' or 'valid', got {padding!r}")


def check_window(owner: str, window: tuple[int, ...], x: jax.Array, padding: str) -> None:
    """Raises a ValueError if nothing is padded and a window is longer than x (B, *lengths, D)."""
    lengths = x.shape[1:-1]
    if padding == 'valid' and any(n < size for n, size in zip(lengths, window, strict=True)):
        raise ValueError(
            f'{owner}: a window of {_times(window)} does not fit into {_times(lengths)}: give a '
            "smaller one, or padding='same'"
        )


def _times(sizes: tuple[int, ...]) -> str:
    return ' × '.join(map(str, sizes))


def _weights(layer: Any, size: tuple[int, ...], x: Any, rng: jax.Array) -> dict[str, Any]:
    check_float(type(layer).__name__, x)
    channels = x.shape[-1]
    if channels % layer.groups or layer.n_units % layer.groups:
        raise ValueError(
            f'{type(layer).__name__}: groups={layer.groups} must divide the {channels} input '
            f'channels and n_units={layer.n_units}; groups={math.gcd(channels, layer.n_units)} does'
        )
    kernel_key, bias_key = jax.random.split(rng)
    shape = (*size, channels // layer.groups, layer.n_units)
    weights = {'kernel': layer.kernel_init(kernel_key, shape)}
    if layer.use_bias:
        weights['bias'] = layer.bias_init(bias_key, (layer.n_units,))
    return weights
