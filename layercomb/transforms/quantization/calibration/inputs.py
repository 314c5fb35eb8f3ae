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
from layercomb.layers.quantized.fitting import Inputs
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.transforms.casting import Cast
from layercomb.transforms.quantization.calibration.values import Stack, rows_of_stack
from layercomb.transforms.quantization.layer import bare

Read = dict[str, Inputs]  # by the paths of weights


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
@multiplied.register(MixtureFF)
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


def read_by(leaf: Layer, values: Stack, before: Stack | None = None) -> Read | None:
    """What each matrix of a leaf multiplies, at all positions of all batches.

    Args:
      leaf: with matrices, or a `Cast` around one.
      values: its inputs.
      before: what they were before anything was rounded; None if that is not to be made up for.

    Returns:
      By the paths of weights; None if nobody has said what the leaf multiplies.
    """
    total: Read | None = None
    own = rows_of_stack(values)
    for inputs, its in zip(
        own, rows_of_stack(before) if before else [None] * len(own), strict=True
    ):
        made = _read(
            bare(leaf), _narrowed(leaf, inputs), None if its is None else _narrowed(leaf, its)
        )
        total = made if total is None else together(total, made or {})
        if total is None:
            return None
    return total


def together(a: Read, b: Read) -> Read:
    """The inputs of both, by paths."""
    return {path: a[path] + b[path] if path in a and path in b else (a | b)[path] for path in a | b}


def _narrowed(leaf: Layer, inputs: Arrays) -> Arrays:
    return leaf.narrowed(inputs) if isinstance(leaf, Cast) else inputs


@functools.partial(jax.jit, static_argnums=0)
def _read(leaf: Layer, inputs: Arrays, before: Arrays | None) -> Read | None:
    found = multiplied(leaf, inputs)
    if found is None:
        return None
    was = {} if before is None else multiplied(leaf, before) or {}
    return {path: _inputs(x, was.get(path)) for path, x in found.items()}


def _inputs(x: jax.Array, before: jax.Array | None) -> Inputs:
    """x and before: (…, n)."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # (…, n) → (N, n)
    product = functools.partial(jnp.dot, precision='highest')
    if before is None:
        return Inputs(product(x.T, x))
    return Inputs(product(x.T, x), product(x.T, before.reshape(x.shape).astype(jnp.float32) - x))
