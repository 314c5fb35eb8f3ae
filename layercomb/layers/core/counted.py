"""Which positions of a batch count: they stand in a state under `COUNTED`, in training.

What is averaged over positions inside a model (a mixture's balance, the statistics of `BatchNorm`)
must leave out padding as the loss does, but only the loss is given its weights. So these go in
through the state, as recorded decisions do: `losses.apply_counted` puts a boolean array beside the
state of every layer that says ``counts_positions``, and takes it out again, so that a state that is
kept never holds one.

The array is (B, …), one for all blocks of a `Repeat`; a layer reads it by `counted_positions`, and
one that loops over its state or its positions takes it out before and puts it into each part.

Shape letters: B batch, L length, D d_model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layercomb.layers.core.decisions import put_back, take_out
from layercomb.trees import Tree

COUNTED = 'counted_positions'


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
    if COUNTED not in state:
        return state, None
    rest = {key: value for key, value in state.items() if key != COUNTED}
    return rest, _fitted(state[COUNTED], x.shape[:-1])


def take_counted(state: Tree) -> tuple[Tree, Tree]:
    """Separates a state from what says which positions count, both with their paths."""
    return take_out(state, COUNTED)


def put_counted(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_counted`."""
    return put_back(state, found, COUNTED)


def along_length(found: Tree, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, each array (B, L, …), so that it may be cut along axis 1.

    Args:
      found: a tree of boolean arrays.
      shape: (B, L), of what is cut. An array of other rows is left out.
    """
    made: Tree = {}
    for key, value in found.items():
        if key != COUNTED:
            inner = along_length(value, shape)
            made |= {key: inner} if inner else {}
            continue
        fits = value if value.shape[:2] == shape else _fitted(value, shape)
        made |= {} if fits is None else {key: fits}
    return made


def after_memory(found: Tree, real: jax.Array, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, for positions that stand behind those of a memory.

    Args:
      found: a tree of boolean arrays.
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
