"""Leaves whose matrices have low-rank products added, each row of a batch its own.

Shape letters: B rows, T any positions, L length, D and F widths, H heads, K head depth, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.quantized.matrix import SCALES
from layercomb.transforms.quantization.layer import bare
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree

LEAVES: tuple[type[Layer], ...] = (Dense, SplitHeads, MergeHeads, GatedDense)
Factors = Callable[[str], tuple[jax.Array, jax.Array]]


def outputs_with(layer: Layer, weights: Tree, inputs: Arrays, factors: Factors) -> jax.Array:
    """The output of a leaf, with (x A) B added to the product of each of its matrices.

    The leaf multiplies by its own matrices as it does alone, so narrow ones stay narrow.

    Args:
      layer: one of `LEAVES`, or `Cast` or `Quantized` around one.
      weights: of it.
      inputs: of it; the first axis is that of the rows.
      factors: from the name of a matrix to A (B, *i, R) and B (B, R, *o), one of each a row.
    """
    leaf = bare(layer)
    if isinstance(leaf, GatedDense):
        gate, up = (_half(layer, leaf, weights, inputs, factors, name) for name in ('gate', 'up'))
        return elementwise('GatedDense', leaf.activation)(gate) * up
    (y,), _ = layer.apply(weights, {}, inputs)
    return y + _product(leaf, inputs[0], *factors('kernel')).astype(y.dtype)


def _half(
    layer: Layer, leaf: GatedDense, weights: Tree, inputs: Arrays, factors: Factors, name: str
) -> jax.Array:
    """One of the two projections of a `GatedDense`: a `Dense`, in the same wrappers."""
    dense = Dense(leaf.n_units, leaf.use_bias)
    wrapped = rewrite(layer, lambda each: dense if isinstance(each, GatedDense) else each)
    names = {'kernel': name, f'kernel{SCALES}': f'{name}{SCALES}', 'bias': f'{name}_bias'}
    its = {ours: weights[theirs] for ours, theirs in names.items() if theirs in weights}
    return outputs_with(wrapped, its, inputs, lambda _: factors(name))


@functools.singledispatch
def _product(leaf: Layer, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x A) B of each row, in float32."""
    raise NotImplementedError(type(leaf).__name__)


@_product.register(Dense)
def _of_dense(leaf: Dense, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    del leaf
    rows = x.reshape(len(x), -1, x.shape[-1])  # (B, …, D) → (B, T, D)
    y = _sum('btr,brf->btf', _sum('btd,bdr->btr', rows, a), b)
    return y.reshape(*x.shape[:-1], b.shape[-1])


@_product.register(SplitHeads)
def _of_split(leaf: SplitHeads, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    del leaf
    return _sum('blr,brhk->bhlk', _sum('bld,bdr->blr', x, a), b)


@_product.register(MergeHeads)
def _of_merge(leaf: MergeHeads, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    del leaf
    return _sum('blr,brd->bld', _sum('bhlk,bhkr->blr', x, a), b)


def _sum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x.astype(jnp.float32), y)
