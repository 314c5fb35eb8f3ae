"""`Quantized`: a leaf whose matrices are kept in few bits, and which of its weights may be."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Size
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.embedding import Embedding
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.basic.recurrent.gated import GatedRecurrent
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.axes import UNKNOWN, Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.adapted import Adapted
from layercomb.layers.quantized.constants import constant
from layercomb.layers.quantized.fitting import Inputs
from layercomb.layers.quantized.matrix import BITS, SCALES, Narrow, in_panels, n_columns
from layercomb.layers.quantized.rounding import can_narrow, group_of, narrow
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.shapes import Signature, is_float
from layercomb.transforms.casting import Cast
from layercomb.trees import Tree

_UNKNOWN: Mapping[str, Inputs] = MappingProxyType({})


@functools.singledispatch
def narrow_paths(layer: Layer) -> tuple[str, ...]:
    """The paths of a leaf's weights that may be narrow.

    Your own layer can take part if it multiplies by the weights through `core.dense`, `core.matmul`
    or `core.contract`, and declares their axes in `weight_axes`. Register it::

        transforms.narrow_paths.register(Mine, lambda layer: ('kernel',))
    """
    del layer
    return ()


@narrow_paths.register(Dense)
@narrow_paths.register(SplitHeads)
@narrow_paths.register(MergeHeads)
def _of_kernel(layer: Layer) -> tuple[str, ...]:
    del layer
    return ('kernel',)


@narrow_paths.register(GatedRecurrent)
def _of_inputs(layer: Layer) -> tuple[str, ...]:
    """The recurrent kernel is left out: its rounding would add up along the positions."""
    del layer
    return ('kernel',)


@narrow_paths.register(GatedDense)
def _of_gate(layer: Layer) -> tuple[str, ...]:
    del layer
    return 'gate', 'up'


@narrow_paths.register(Embedding)
def _of_table(layer: Layer) -> tuple[str, ...]:
    del layer
    return ('table',)


@narrow_paths.register(MultiplicativeDense)
@narrow_paths.register(MultiplicativeHead)
def _of_features(layer: Layer) -> tuple[str, ...]:
    del layer
    return ('features',)


@narrow_paths.register(SparseFF)
def _of_units(layer: Layer) -> tuple[str, ...]:
    """The controller is left out: it is small, and rounding would make it choose other units."""
    del layer
    return 'in/kernel_transposed', 'out/kernel'


@narrow_paths.register(MixtureFF)
def _of_experts(layer: Layer) -> tuple[str, ...]:
    """The router is left out, as controllers are."""
    up = ('up/kernel_transposed',) if getattr(layer, 'gated', True) else ()
    return 'in/kernel_transposed', *up, 'out/kernel'


class Quantized(Wrapper):
    """A leaf whose matrices are kept in few bits; `quantize` makes it, with the weights.

    ``kernel`` becomes integers under the same name, with float32 ``kernel_scales`` beside it;
    bfloat16 has no scales. Gradients exist for inputs, and for weights that are not narrow.

    Attributes:
      layer: a leaf, or a `Cast` around one.
      bits: 8, 4, or 16 for bfloat16.
      group_size: about how many weights share a scale: see `quantize`.
      smallest: matrices with fewer weights stay as they are.
      minima: whether each group has a minimum beside its scale, in the second half of the scales.
      activation_bits: to how many bits a CPU's kernels may round inputs: 16, or 8, which is quicker
        for prompts and less exact.
      half_scales: whether scales are float16, as those of files are.

    Raises:
      ValueError: for other bits.
      TypeError: if the layer has no matrices.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    bits: int = 8
    group_size: Size = 64
    smallest: Size = 4096
    minima: bool = False
    activation_bits: int = 16
    half_scales: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_bits not in (8, 16):
            raise ValueError(
                f'Quantized: activation_bits={self.activation_bits} is not to be had: choose 16, '
                'or 8, which is quicker for prompts and less exact'
            )
        if self.bits not in BITS:
            raise ValueError(
                f'Quantized: bits={self.bits} is not to be had: choose 8 or 4, or 16 for bfloat16'
            )
        if not narrow_axes(bare(self.layer)):
            raise TypeError(
                f'Quantized holds a leaf with matrices, not a {type(self.layer).__name__}: '
                'transforms.quantize(net, weights) reaches every one inside'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        weights, state = self.layer.init(signature, rng, mode)
        return self.narrow(weights), state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        return self.layer.apply(self.seen(weights), state, inputs, rng=rng, mode=mode)

    def narrow(self, weights: Tree, inputs: Mapping[str, Inputs] = _UNKNOWN) -> Tree:
        """The leaf's weights with its large matrices narrow.

        Args:
          weights: the leaf's, possibly stacked on leading axes.
          inputs: that a matrix is rounded for, by its path: see `narrow`.
        """
        for path, axes in self.chosen(weights).items():
            wide = trees.get(weights, path)
            values, scales = narrow(
                wide, axes, self.bits, self.group_size, self.minima, inputs.get(path)
            )
            if scales is not None and self.half_scales:
                scales = _halved(scales)
            values, scales = self.stored(path, values, scales)
            weights = trees.put(trees.drop(weights, path), path, values)
            if scales is not None:
                weights = trees.put(weights, path + SCALES, scales)
        return weights

    def stored(
        self, path: str, values: Any, scales: Any, n_o: int | None = None
    ) -> tuple[Any, Any]:
        """Values and scales as the leaf keeps them: in panels, unless rows are chosen one by one.

        Args:
          path: of the weight, in the leaf.
          values, scales: of rows, as `narrow` makes them; possibly stacked on leading axes.
          n_o: how many axes count rows; None for as many as the matrix has.
        """
        layer = bare(self.layer)
        if Axes(layer.weight_axes[path]).has_chosen_rows:
            return values, scales
        n_o = narrow_axes(layer)[path].count('o') if n_o is None else n_o
        return in_panels(values, scales, n_o, self.bits, self.minima)

    def chosen(self, weights: Tree) -> dict[str, str]:
        """Which of the leaf's wide matrices become narrow, and their axes as of `narrow_axes`."""
        found = {}
        for path, axes in narrow_axes(bare(self.layer)).items():
            wide = trees.get(weights, path)
            n_axes = Axes(bare(self.layer).weight_axes[path]).ndim  # experts are counted, too
            is_large = math.prod(wide.shape[wide.ndim - n_axes :]) >= self.smallest
            shape = wide.shape[wide.ndim - len(axes) :]
            if is_large and can_narrow(shape, axes, self.bits):
                found[path] = axes
        return found

    def seen(self, weights: Tree) -> Tree:
        """The weights as the leaf sees them, each narrow matrix as one `Narrow`.

        Args:
          weights: the leaf's, not stacked. A matrix may be the base of an `Adapted`, and stays so.
        """
        for path, axes in narrow_axes(bare(self.layer)).items():
            given, scales = trees.get(weights, path), None
            values = given.base if isinstance(given, Adapted) else given
            if values.dtype == jnp.float32:
                continue
            if is_float(values):
                values = constant(values)
            else:
                scales = constant(trees.get(weights, path + SCALES))
                weights = trees.drop(weights, path + SCALES)
            matrix: Any = self.matrix(values, scales, axes)
            if isinstance(given, Adapted):
                matrix = dataclasses.replace(given, base=matrix)
            weights = trees.put(trees.drop(weights, path), path, matrix)
        return weights

    def matrix(self, values: Any, scales: Any, axes: str) -> Narrow:
        """A narrow matrix of the leaf.

        Args:
          values, scales: as of `Narrow`; scales are None for bfloat16.
          axes: letters ``i`` and ``o``.

        Raises:
          ValueError: if there are other scales than the bits and groups of the leaf have.
        """
        if scales is None:
            return Narrow(values, None, axes, self.bits, self.activation_bits)
        n = n_columns(values, self.bits)
        group = group_of(n // 2 if self.bits == 4 else n, self.group_size)
        n_scales, wanted = scales.shape[-1], n // group * (1 + self.minima)
        if n_scales != wanted:  # as of weights of other bits, which may have the same shape
            raise ValueError(
                f'Quantized: rows of {n} weights have {n_scales} scales, and {self.bits} bits in '
                f'groups of {group}{" with minima" * self.minima} have {wanted}: these weights are '
                'of a model that was quantized otherwise'
            )
        return Narrow(values, scales, axes, self.bits, self.activation_bits, self.minima)

    def narrow_spec(self, path: str, leaf: Any) -> str | None:
        """The axes of a narrow matrix or of its scales, as `facts.axes` writes them.

        Args:
          path: of the weight, in the leaf.
          leaf: the value there, an array or `jax.ShapeDtypeStruct`.

        Returns:
          The axes, such as 'F<-D'; None for a weight that is not narrow.
        """
        of_matrix = path.removesuffix(SCALES)
        layer = bare(self.layer)
        if of_matrix not in narrow_axes(layer) or (path == of_matrix and leaf.dtype == jnp.float32):
            return None
        wide = Axes(layer.weight_axes[of_matrix])
        first, second = (''.join(wide.letters[i] for i in side) for side in _rows(wide))
        if path != of_matrix:
            of_each = ''.join(wide.letters[i] for i in wide.separate)
            return f'{of_each}|->{first}G' if of_each else f'->{first}G'
        if wide.is_table or wide.has_chosen_rows:
            return wide.spec
        return f'{first}<-{second if len(second) == 1 else f"({second})"}'


def _halved(scales: jax.Array) -> jax.Array:
    """Scales in float16.

    Raises:
      ValueError: if they are known, and do not fit.
    """
    made = scales.astype(jnp.float16)
    if not isinstance(scales, jax.core.Tracer):
        lost = ~jnp.isfinite(made) | ((made == 0) & (scales != 0))
        if bool(lost.any()):
            raise ValueError(
                'Quantized: a scale is too large or too small for float16: leave half_scales out'
            )
    return made


def narrow_axes(layer: Layer) -> dict[str, str]:
    """The weights of a leaf that may be narrow, and their axes as `Narrow` writes them.

    Tables and units are rounded along their rows, other matrices along the axes that a product
    sums over.

    Raises:
      TypeError: for a weight that is not declared as a matrix or table.
    """
    return {path: _narrow_axes(layer, path) for path in narrow_paths(layer)}


def _narrow_axes(layer: Layer, path: str) -> str:
    declared = Axes(layer.weight_axes.get(path, UNKNOWN))
    _, along = _rows(declared)
    matrix = range(len(declared.separate), declared.ndim)
    letters = ''.join('i' if a in along else 'o' for a in matrix)
    if letters not in ('io', 'ioo', 'iio', 'oi'):
        raise TypeError(
            f'{type(layer).__name__}: {path!r} is declared as {declared.spec!r}, and a narrow '
            "weight is a matrix such as 'D->F' or 'F<-D', or a table such as 'V:D': mend "
            'weight_axes'
        )
    return letters


def _rows(wide: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that count the rows of a narrow matrix, and those along which a row lies."""
    if wide.is_table or wide.has_chosen_rows:
        return wide.first, wide.second
    return wide.given, wide.summed


def n_weights(net: Layer, weights: Tree) -> int:
    """How many weights a model has; narrow ones count as what they stand for, without scales.

    Args:
      net: any layer.
      weights: of it, arrays or `jax.ShapeDtypeStruct`.
    """
    flat = dict(trees.flatten(weights))
    n = 0
    for leaf, layer in walk(net):
        if isinstance(layer, Quantized):
            for path in (joined(leaf, name) for name in narrow_axes(bare(layer))):
                if path in flat and flat[path].dtype != jnp.float32:
                    values = flat.pop(path)
                    n += math.prod(values.shape[:-1]) * n_columns(values, layer.bits)
                    flat.pop(path + SCALES, None)
    return n + trees.count(trees.unflatten(flat))


def bits_of(layer: Layer) -> int:
    """In how many bits a leaf keeps its large matrices; 32 if it is not `Quantized`."""
    if isinstance(layer, Quantized):
        return layer.bits
    return bits_of(layer.layer) if isinstance(layer, Wrapper) else 32


def bare(layer: Layer) -> Layer:
    """The layer inside `Cast` and `Quantized`; any other layer is returned as it is."""
    return bare(layer.layer) if isinstance(layer, (Cast, Quantized)) else layer
