"""Which positions of a batch count in training: layers are told through their state.

What is averaged over positions inside a model (a mixture's balance, the statistics of `BatchNorm`)
must leave out padding as the loss does, but only the loss is given its weights. So these go in
through the state, as recorded decisions do: `losses.apply_counted` puts a `Counted` beside the
state of every layer that says ``counts_positions``, and takes it out again, so that a state that is
kept never holds one.

Its array is (B, …), one for all blocks of a `Repeat`. A layer reads it by `counted_positions`. One
that loops over its state or its positions takes it out before, and puts it into each piece.

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
    """A layer's state that says which positions count, (B, …) bool, for `counted_positions`.

    For one layer; `losses.apply_counted` reaches all layers of a model.
    """
    return beside(state, Counted(mask))


def counted_positions(state: Tree, x: jax.Array) -> tuple[Tree, jax.Array | None]:
    """A layer's state without what says which positions count, and that, for its input.

    A layer of one's own that averages over positions sets ``counts_positions = True``, and begins
    with this in training. It must be ready for none to count, where its mean would be 0 / 0.

    Args:
      state: the layer's.
      x: (…, D), its input.

    Returns:
      The state to go on with, and a boolean array of ``x.shape[:-1]``, true where a position's loss
      weight is not 0. Positions are told apart by their number alone: where x has another number of
      them than there are loss weights (pooled, strided, joined to others), all of a row count if
      one of its weights is not 0. None, and all count, if nothing was given, or if rows of x are
      not those of the batch.

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
    """Separates a state from what says which positions count, both with their paths."""
    return take_out(state, Counted)


def put_counted(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_counted`."""
    return put_back(state, found)


def along_length(found: Tree, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, with arrays (B, L, …) that may be cut along axis 1.

    Args:
      found: a tree of `Counted`.
      shape: (B, L), of what is cut. An array of other rows is left out.
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
    """What `take_counted` found, for positions that stand behind those of a memory.

    Args:
      found: a tree of `Counted`.
      real: (B, M), which positions of the memory are real; of a row that counts, these count.
      shape: (B, L), of the positions behind it. An array of another shape stays as it is.
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
