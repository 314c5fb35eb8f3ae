"""`quantize`: matrices of weights in few bits."""

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
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.axes import UNKNOWN, Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.adapted import Adapted
from layercomb.layers.quantized.constants import constant
from layercomb.layers.quantized.matrix import (
    BITS,
    SCALES,
    Narrow,
    can_narrow,
    group_of,
    in_panels,
    n_columns,
    narrow,
)
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.shapes import Signature, is_float
from layercomb.transforms.casting import Cast
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tied_rows import TiedRows
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_NO_GRAMS: Mapping[str, jax.Array] = MappingProxyType({})


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

    def narrow(self, weights: Tree, grams: Mapping[str, jax.Array] = _NO_GRAMS) -> Tree:
        """The leaf's weights with its large matrices narrow.

        Args:
          weights: the leaf's, possibly stacked on leading axes.
          grams: X Xᵀ of the inputs that a matrix is rounded for, by its path: see `narrow`.
        """
        for path, axes in self.chosen(weights).items():
            wide = trees.get(weights, path)
            values, scales = narrow(
                wide, axes, self.bits, self.group_size, self.minima, grams.get(path)
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
            shape = wide.shape[wide.ndim - len(axes) :]
            if math.prod(shape) >= self.smallest and can_narrow(shape, axes, self.bits):
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
            return f'->{first}G'
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
    letters = ''.join('i' if a in along else 'o' for a in range(declared.ndim))
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


def quantize(
    net: Layer,
    weights: Tree,
    bits: int = 8,
    group_size: int = 64,
    *,
    smallest: int = 4096,
    activation_bits: int = 16,
    calibrate: Any = None,
    state: Tree | None = None,
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits, for decoding or evaluation.

    Kernels of dense layers and projections, tables of embeddings, units of sparse feed-forwards and
    features of multiplicative layers become int8, int4 or bfloat16. Biases, norms, positions,
    controllers and small weights stay as they are. A narrow matrix is stored with the summed axis
    last, so a kernel (D, F) becomes (F, D). Integers have a float32 scale for each group of a row,
    at ``…_scales``. All names are kept. The ends of a `Tied` model stay tied if both are stored
    alike, as the table of an embedding and a head that is its transpose. If not, they are quantized
    separately, and are no longer tied.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      bits: 8, 4, or 16 for bfloat16, which has no scales.
      group_size: how many weights share a scale. If it does not divide the length of a row, the
        nearest divisor, by ratio, is used.
      smallest: matrices with fewer weights stay as they are.
      activation_bits: to how many bits a CPU's kernels may round what they multiply: 16, an error
        of 3e-5 of a product; or 8, of 5e-3, with which prompts are read up to twice as fast.
      calibrate: batches of what the model reads, a few thousand tokens without padding: an iterable
        of arrays such as token ids (B, L), or of tuples if the model takes several inputs. Each
        matrix of a dense layer or projection is then rounded for the inputs that it gets from them,
        through what is rounded before it, so that its products change least. Tables that are looked
        up, sparse feed-forwards and multiplicative layers are rounded to the nearest, as all are
        without `calibrate`. A warning names what it does not reach. It runs the model once, or
        twice if weights are tied or shared, and the result is the same each time.
      state: of the model, with `calibrate`; it is needed if there are running statistics.

    Returns:
      (layer, weights).

    Raises:
      TypeError: for batches that the model does not take.
      ValueError: for other bits; if values that come from `calibrate` are not finite; and when the
        gradient for a quantized weight is asked for.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net, weights = transforms.quantize(tl.Dense(64), {'kernel': jnp.ones((64, 64))})
    >>> net, weights['kernel'].dtype, weights['kernel_scales'].shape
    (Quantized(Dense(64)), dtype('uint32'), (64, 1))
    """
    if activation_bits not in (8, 16) or (activation_bits == 8 and bits == 16):
        raise ValueError(
            f'quantize: activation_bits={activation_bits} with bits={bits} is not to be had: '
            'inputs are rounded to 16 bits or, for weights of 8 or 4 bits, to 8'
        )
    if activation_bits != 16:
        net, weights = quantize(
            net, weights, bits, group_size, smallest=smallest, calibrate=calibrate, state=state
        )
        return rewrite(net, functools.partial(_rounding_inputs, activation_bits)), weights
    if calibrate is not None:
        from layercomb.transforms.calibration.calibrating import calibrated  # which rounds by this

        return calibrated(net, weights, (bits, group_size, smallest), calibrate, state)
    if isinstance(net, Tied):
        inner, whole = quantize(net.layer, net.untied(weights), bits, group_size, smallest=smallest)
        return tied_again(net, inner, whole)
    if isinstance(net, Quantized):
        raise ValueError('the model is quantized already: quantize the one that it was made from')
    if narrow_axes(bare(net)):
        quantized = Quantized(net, bits, group_size, smallest)
        made = quantized.narrow(weights)
        return (net, weights) if made is weights else (quantized, made)
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in net.children:
            child, part = quantize(layer, weights.get(key, {}), bits, group_size, smallest=smallest)
            children.append(child)
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Wrapper):
        inner, weights = quantize(net.layer, weights, bits, group_size, smallest=smallest)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def _rounding_inputs(bits: int, layer: Layer) -> Layer:
    return layer.replace(activation_bits=bits) if isinstance(layer, Quantized) else layer


def tied_again(net: Tied, inner: Layer, whole: Tree) -> tuple[Layer, Tree]:
    """A quantized model with one array for both ends of a tie, if they are stored alike.

    Args:
      net: the tied model before.
      inner: the quantized model without the tie.
      whole: its weights.
    """
    source, target = (_layouts(inner, whole, path) for path in (net.source, net.target))
    turned = net.via is jnp.transpose and (source, target) in TRANSPOSED
    is_narrow = set(source.values()) != {''}
    if not turned and (source != target or (net.via and is_narrow)):
        return inner, whole
    made = TiedRows if is_narrow and '' in source else Tied  # rows, or a layer of several weights
    whole = trees.drop(whole, net.target)
    if made is TiedRows and net.source + SCALES in trees.flatten(whole):
        whole = trees.drop(whole, net.target + SCALES)
    return made(inner, net.source, net.target, net.via, name=net.name), whole


# A table of rows and the kernel that is its transpose: both are kept as rows.
TRANSPOSED = (({'': 'oi'}, {'': 'io'}), ({'': 'io'}, {'': 'oi'}))


def _layouts(net: Layer, weights: Tree, at: str) -> dict[str, str]:
    """The axes of each narrow weight at or below a path, as of `Narrow`; '' for a wide one."""
    found = {
        path.removeprefix(at): ''
        for path in trees.flatten(weights)
        if path == at or path.startswith(f'{at}/')
    }
    for where, layer in walk(net):
        if isinstance(layer, Quantized):
            for rest, axes in narrow_axes(bare(layer)).items():
                below = joined(where, rest).removeprefix(at)
                if below in found and trees.get(weights, at + below).dtype != jnp.float32:
                    found[below] = axes
    return found
