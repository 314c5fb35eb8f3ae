"""Which positions of a batch count in training; the state tells layers.

Averages over positions inside a model (a mixture's balance, the statistics of `BatchNorm`) must
leave out padding as the loss does, but only the loss is given loss weights. `losses.apply_counted`
therefore puts a `Counted` beside the state of every layer that declares ``counts_positions``, for
one call, and takes it out of the new state.

Its array is (B, …), the same for all blocks of a `Repeat`. A layer reads it by `counted_positions`.
A layer that loops over its state or its positions takes it out first, and puts it into each slice.

Shape letters: B batch, L length, D d_model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layercomb.layers.state.parts import Part, beside, own, put_back, take_out, without
from layercomb.trees import Tree


class Counted(Part):
    """Which positions count, beside the state of a layer that averages over them.

    Attributes:
      mask: (B, …) bool.
    """

    mask: jax.Array


def count_only(state: Tree, mask: jax.Array) -> Tree:
    """One layer's state with a mask of the positions that count, for `counted_positions`.

    `losses.apply_counted` does this for all layers of a model.

    Args:
      state: the layer's.
      mask: (B, …) bool.
    """
    return beside(state, Counted(mask))


def counted_positions(state: Tree, x: jax.Array) -> tuple[Tree, jax.Array | None]:
    """Separates a layer's state from the mask of the positions that count, made to fit its input.

    A layer of one's own that averages over positions sets ``counts_positions = True``, and calls
    this first in training. All entries of the mask may be False: avoid a mean of 0 / 0.

    Args:
      state: the layer's.
      x: (…, D), its input.

    Returns:
      The state without the mask, and the mask: a boolean array of ``x.shape[:-1]``, True where the
      position's loss weight is not 0. If x has another length than the loss weights (pooled,
      strided, joined to others), a whole row is True if any of its weights is not 0. The mask is
      None, and all positions count, if the state has none, or if the batch sizes differ.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> tl.counted_positions({'mean': 0.0}, jnp.ones((2, 3, 4)))
    ({'mean': 0.0}, None)
    """
    counted = own(state, Counted)
    if counted is None:
        return state, None
    return without(state, Counted), _fitted(counted.mask, x.shape[:-1])


def take_counted(state: Tree) -> tuple[Tree, Tree]:
    """Splits a state into (the state without `Counted`, a tree of `Counted`), at their paths."""
    return take_out(state, Counted)


def put_counted(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_counted`: `state` with the tree of `Counted` put in."""
    return put_back(state, found)


def along_length(found: Tree, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, with arrays (B, L, …) that can be sliced along axis 1.

    Args:
      found: a tree of `Counted`.
      shape: (B, L) of the values to be sliced. An array of another batch size is left out.
    """
    made: Tree = {}
    for key, value in found.items():
        if isinstance(value, dict):
            inner = along_length(value, shape)
            made |= {key: inner} if inner else {}
            continue
        mask = value.mask
        fits = mask if mask.shape[:2] == shape else _fitted(mask, shape)
        made |= {} if fits is None else {key: Counted(fits)}
    return made


def after_memory(found: Tree, real: jax.Array, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, with a memory's positions put in front: (B, L) → (B, M + L).

    Args:
      found: a tree of `Counted`.
      real: (B, M) boolean, which positions of the memory are real. They count in every row in
        which any other position counts.
      shape: (B, L), of the positions after the memory. An array of another shape is unchanged.
    """

    def one(counted: jax.Array) -> jax.Array:
        if counted.shape != shape:
            return counted
        return jnp.concatenate([real & counted.any(1, keepdims=True), counted], 1)  # (B, M + L)

    return jax.tree.map(one, found)


def _fitted(counted: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """(B, …) as `shape`; None if the rows differ."""
    shared = min(counted.ndim, len(shape))
    if counted.shape[:1] != shape[: min(counted.ndim, 1)]:
        return None
    if counted.shape[:shared] != shape[:shared]:
        shared = 1
    counted = counted.any(tuple(range(shared, counted.ndim)))
    wider = counted.reshape(counted.shape + (1,) * (len(shape) - shared))
    return jnp.broadcast_to(wider, shape)
