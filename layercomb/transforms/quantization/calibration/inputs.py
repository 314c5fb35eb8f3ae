"""What the matrices of a leaf multiply, and the products of these inputs with themselves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.embedding import Embedding
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.transforms.casting import Cast
from layercomb.transforms.quantization.calibration.values import Stack, rows_of_stack
from layercomb.transforms.quantization.layer import bare

Grams = dict[str, jax.Array]


@functools.singledispatch
def multiplied(layer: Layer, inputs: Arrays) -> dict[str, jax.Array] | None:
    """What each narrow weight of a leaf multiplies, for `quantize` with ``calibrate=``.

    Your own layer can take part. Register it, with the features of each input last::

        transforms.multiplied.register(Mine, lambda layer, inputs: {'kernel': inputs[0]})

    Args:
      layer: a leaf that is registered at `narrow_paths`.
      inputs: of the leaf.

    Returns:
      By the paths of its weights, arrays (…, n) of as many features as a narrow row has weights.
      Weights that are left out are rounded by themselves. None if nobody has said.
    """
    del layer, inputs
    return None


@multiplied.register(Embedding)
@multiplied.register(MultiplicativeDense)
@multiplied.register(MultiplicativeHead)
@multiplied.register(SparseFF)
def _nothing(layer: Layer, inputs: Arrays) -> dict[str, jax.Array]:
    """Rows are looked up, chosen, or multiplied by factors of their own."""
    del layer, inputs
    return {}


@multiplied.register(Dense)
@multiplied.register(SplitHeads)
def _by_kernel(layer: Layer, inputs: Arrays) -> dict[str, jax.Array]:
    del layer
    return {'kernel': inputs[0]}


@multiplied.register(MergeHeads)
def _by_merged(layer: Layer, inputs: Arrays) -> dict[str, jax.Array]:
    del layer
    x = jnp.moveaxis(inputs[0], 1, -2)  # (B, H, L, K) → (B, L, H, K)
    return {'kernel': x.reshape(*x.shape[:-2], -1)}  # (B, L, H·K)


@multiplied.register(GatedDense)
def _by_gate(layer: Layer, inputs: Arrays) -> dict[str, jax.Array]:
    del layer
    return {'gate': inputs[0], 'up': inputs[0]}


def grams(leaf: Layer, values: Stack) -> Grams | None:
    """X Xᵀ of all positions of all batches, for each matrix that multiplies X.

    Args:
      leaf: with matrices, or a `Cast` around one.
      values: its inputs.

    Returns:
      (n, n) float32 by the paths of weights; None if nobody has said what the leaf multiplies.
    """
    total: Grams | None = None
    for inputs in rows_of_stack(values):
        inputs = leaf.narrowed(inputs) if isinstance(leaf, Cast) else inputs
        made = _grams(bare(leaf), inputs)
        total = made if total is None else jax.tree.map(jnp.add, total, made)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _grams(leaf: Layer, inputs: Arrays) -> Grams | None:
    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # (…, n) → (N, n)
        return jnp.dot(x.T, x, precision='highest')

    return jax.tree.map(one, multiplied(leaf, inputs))
